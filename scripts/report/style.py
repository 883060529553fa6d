"""What all figures share: one look a system, lines with bands over seeds, and rows of a CSV file."""

import csv
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

__all__ = [
    *("Rows", "cells", "draw_bars", "draw_lines", "finished", "legend_below", "losses_by", "panels"),
    *("plain_log", "read", "shared", "style", "values", "whiskers"),
]

#: Okabe and Ito's palette, told apart by every eye; the markers without colours as well.
STYLES = {
    "flash_lm": ("#0072B2", "o"),
    "transformer_lm": ("#D55E00", "s"),
    "transformer_pp_lm": ("#009E73", "^"),
    "flash_quad_lm": ("#56B4E9", "D"),
    "mc_transformer_pp_lm": ("#E69F00", "v"),
    "flash_local_lm": ("#CC79A7", "P"),
    "flash_global_lm": ("#000000", "X"),
    "transformer_plus_lm": ("#7F7F7F", "<"),
    "FLASH-pytorch": ("#8C510A", ">"),
}
ENDINGS = ("_tiny", "_gpt", "_big")
Rows = list[dict[str, str]]


def style(name: str, names: Iterable[str]) -> dict:
    """Colour and marker of a system, whatever its size; names that are not known get dashed lines.

    Args:
        name: Of the system.
        names: Of all systems of the figure.
    """
    known = _without_size(name)
    if known in STYLES:
        colour, marker = STYLES[known]
        return {"color": colour, "marker": marker}
    there = {_without_size(other) for other in names}
    others = sorted(other for other in names if _without_size(other) not in STYLES)
    free = [look for system, look in STYLES.items() if system not in there] or list(STYLES.values())
    colour, marker = free[others.index(name) % len(free)]
    return {"color": colour, "marker": marker, "linestyle": "--", "markerfacecolor": "white"}


def _without_size(name: str) -> str:
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def read(path: Path, columns: Iterable[str]) -> Rows:
    """The rows of a CSV file; of a comparison, not those that only looked for a speed or a learning rate.

    Raises:
        ValueError: it is missing, empty, or lacks one of ``columns``.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; a measurement writes it")
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no rows with {', '.join(missing)}; allowed: what a measurement writes")
    return [row for row in rows if row.get("stage") not in ("speed", "rate")]


def finished(rows: Rows, quantity: str) -> Rows:
    """Rows that succeeded and have a finite ``quantity``."""
    good = [row for row in rows if row.get("status", "ok") == "ok" and row[quantity]]
    return [row for row in good if math.isfinite(float(row[quantity]))]


def values(rows: Rows, key: str) -> list[str]:
    """Distinct values of a column: systems in the order of their styles, numbers in theirs."""
    order = list(STYLES)

    def rank(value: str) -> tuple:
        known = _without_size(value)
        place = order.index(known) if known in STYLES else len(order)
        return (float(value), 0, "") if _is_number(value) else (math.inf, place, value)

    return sorted({row[key] for row in rows}, key=rank)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def cells(rows: Rows, keys: Iterable[str]) -> dict[str, Rows]:
    """Rows that may share a panel, by its title: those with the same values of ``keys``."""
    found: dict[tuple, Rows] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key, "") for key in keys), []).append(row)
    order = {key: values(rows, key) for key in keys if rows and key in rows[0]}
    ranks = sorted(
        found, key=lambda cell: [order[k].index(v) for k, v in zip(keys, cell, strict=True) if k in order]
    )
    return {shared(found[cell], keys): found[cell] for cell in ranks}


def shared(rows: Rows, keys: Iterable[str]) -> str:
    """The values of ``keys`` in words, for a title."""
    words = {"threads": "{} threads", "torch": "torch {}", "jobs": "{} at a time", "n": "{} tokens a row"}
    found = {key: values(rows, key) for key in keys if rows and key in rows[0]}
    return ", ".join(
        words.get(key, "{}").format(" / ".join(map(_readable, each)))
        for key, each in found.items()
        if each != [""]
    )


def _readable(value: str) -> str:
    """Of a budget such as ``1000000tokens``; anything else stays as it is."""
    budget = re.fullmatch(r"(\d+)(tokens|updates|minutes)", value)
    return f"{int(budget[1]):,} {budget[2]}" if budget else value


def panels(
    lines: int, columns: int, bars: Optional[list[int]] = None
) -> tuple[plt.Figure, list[list[plt.Axes]]]:
    """An empty figure of several panels, line by line; each high enough for its number of ``bars``."""
    size = (4 * columns, max(3.2, 2.6 * lines)) if bars is None else (9, 0.36 * sum(bars))
    options = {"figsize": size, "height_ratios": bars, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, **options)
    return figure, axes.tolist()


def plain_log(axis: plt.Axes, x: str, ticks: Iterable[str] = (), *, y: bool = True) -> None:
    """Makes the axes logarithmic, with numbers as one writes them.

    Args:
        axis: Of the panel.
        x: Label of the horizontal axis.
        ticks: Its numbers; none for the usual places.
        y: Whether the vertical axis is logarithmic too.
    """
    axis.set(xscale="log", xlabel=x, **({"yscale": "log"} if y else {}))
    for each in (axis.xaxis, axis.yaxis) if y else (axis.xaxis,):
        each.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
        each.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
        each.set_minor_formatter(ticker.NullFormatter())
    if ticks := sorted(map(float, ticks)):
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8, rotation=30)
        axis.set_xticks([], minor=True)


def legend_below(figure: plt.Figure) -> None:
    """One legend for all panels, which hides nothing."""
    found: dict = {}
    for axis in figure.axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    columns = min(len(found), max(2, int(figure.get_figwidth() // 2.4)))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def draw_lines(axis: plt.Axes, rows: Rows, x: str, y: str, unit: float = 1.0, **look: object) -> None:
    """A line for each system through the means of ``y`` at each ``x``, with a band from lowest to highest.

    Args:
        axis: Where to draw.
        rows: Of any systems; those that failed are left out.
        x: A column of numbers.
        y: A column of numbers above 0.
        unit: What ``y`` is divided by.
        look: Differs from the system's.
    """
    names = values(rows, "name")
    for name in names:
        groups: dict[float, list[float]] = {}
        for row in finished(rows, y):
            if row["name"] == name and float(row[y]) > 0:
                groups.setdefault(float(row[x]), []).append(float(row[y]) / unit)
        if not groups:
            continue
        places, found = zip(*sorted(groups.items()), strict=True)
        own = {"markersize": 6, **style(name, names), **look}
        axis.plot(places, [mean(group) for group in found], label=name, **own)
        if max(map(len, found)) > 1:
            band = [min(group) for group in found], [max(group) for group in found]
            axis.fill_between(places, *band, color=own["color"], alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3)


def losses_by(rows: Rows, *keys: str) -> dict[str, list[float]]:
    """The losses of rows that have the same words in ``keys``, by these words."""
    found: dict[str, list[float]] = {}
    for row in rows:
        words = ": ".join(filter(None, (row[key] for key in keys)))
        found.setdefault(words, []).append(float(row["valid_loss"]))
    return found


def draw_bars(axis: plt.Axes, losses: dict[str, list[float]], base: str, colours: dict[str, str]) -> None:
    """Bars of mean losses less that of ``base``, from below; the means and numbers of seeds beside them."""
    for place, (name, found) in enumerate(losses.items()):
        height = mean(found) - mean(losses[base])
        reach = whiskers([found]) if len(found) > 1 else None
        axis.barh(place, height, xerr=reach, color=colours[name], capsize=3, height=0.7)
        text = f"{mean(found):.3f} ({len(found)})"
        axis.text(1.01, place, text, va="center", transform=axis.get_yaxis_transform())
    axis.set(yticks=range(len(losses)), yticklabels=losses)
    axis.set_xlabel(f"loss less that of {base}, nats a token (beside: the loss, of how many seeds)")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(alpha=0.3, axis="x")


def whiskers(groups: list[list[float]]) -> list[list[float]]:
    """How far each group reaches below and above its mean, as matplotlib takes it."""
    return [[abs(pick(group) - mean(group)) for group in groups] for pick in (min, max)]
