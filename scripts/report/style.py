"""What all figures share: one look a system, lines with bands over seeds, records as a table of pandas."""

import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import matplotlib
import numpy
import pandas

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from runs import table

__all__ = [
    *("Records", "cells", "draw_bars", "draw_lines", "finished", "frame", "legend_below", "losses_by"),
    *("in_lines", "numbers", "panels", "plain_log", "read", "shared", "style", "values", "whiskers"),
]

#: Okabe and Ito's palette and three more, told apart by every eye; the markers without colours as well.
STYLES = {
    "flash_lm": ("#0072B2", "o"),
    "flash2_lm": ("#332288", "*"),
    "transformer_lm": ("#D55E00", "s"),
    "transformer_pp_lm": ("#009E73", "^"),
    "flash_quad_lm": ("#56B4E9", "D"),
    "mc_transformer_pp_lm": ("#E69F00", "v"),
    "flash_local_lm": ("#CC79A7", "P"),
    "flash_global_lm": ("#000000", "X"),
    "transformer_plus_lm": ("#7F7F7F", "<"),
    "FLASH-pytorch": ("#8C510A", ">"),
}
#: Models of other tasks, layers alone, and candidates, look as the language model that they are built as.
BUILT_AS = {
    "flash_masked_lm": "flash_lm",
    "flash_seq2seq": "flash_lm",
    "flash_quad_masked_lm": "flash_quad_lm",
    "transformer": "transformer_lm",
    "roberta": "transformer_lm",
    "roberta_prenorm": "transformer_plus_lm",
    "flash": "flash_lm",
    "flash/triton": "flash_lm",
    "flash/recomputed": "flash_lm",
    "flash_local/auto": "flash_local_lm",
    "flash2": "flash2_lm",
    "local+shift": "flash_local_lm",
    "transformer_pp": "transformer_pp_lm",
    "mc_transformer_pp": "mc_transformer_pp_lm",
}
BARE = {"linestyle": ":", "markerfacecolor": "white"}
ENDINGS = ("_tiny", "_gpt", "_big")
Records = pandas.DataFrame  # of words, as a CSV file has them


def style(name: str, names: Iterable[str]) -> dict:
    """Colour and marker of a system, whatever its size; names that are not known get dashed lines.

    Args:
        name: Of the system.
        names: Of all systems of the figure.
    """
    known, _, options = _without_size(name).partition(" ")
    if known in STYLES:
        colour, marker = STYLES[known]
        # Of a system with options and without, in one figure, the latter is dotted.
        bare = not options and any(other.startswith(f"{name} ") for other in names)
        return {"color": colour, "marker": marker, **(BARE if bare else {})}
    there = {_without_size(other) for other in names}
    others = sorted(other for other in names if _without_size(other) not in STYLES)
    free = [look for system, look in STYLES.items() if system not in there] or list(STYLES.values())
    colour, marker = free[others.index(name) % len(free)]
    return {"color": colour, "marker": marker, "linestyle": "--", "markerfacecolor": "white"}


def _without_size(name: str) -> str:
    short = next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)
    system, space, options = short.partition(" ")
    return f"{BUILT_AS.get(system, system)}{space}{options}"


def frame(records: Iterable[dict]) -> Records:
    """Records of a CSV file, words in every cell."""
    return pandas.DataFrame(list(records), dtype=object).fillna("").astype(str)


def read(path: Path, columns: Iterable[str]) -> Records:
    """The records of a CSV file; of a comparison, not those that only looked for a speed or a learning rate.

    Raises:
        ValueError: it is missing, empty, or lacks one of ``columns``.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; a measurement writes it")
    records = frame(table.read(path))
    missing = [column for column in columns if column not in records]
    if missing:
        raise ValueError(
            f"{path} has no records with {', '.join(missing)}; allowed: what a measurement writes"
        )
    return records[~records["stage"].isin(("speed", "rate"))] if "stage" in records else records


def numbers(records: Records, column: str) -> pandas.Series:
    """The column, as numbers; NaN for an empty cell."""
    return pandas.to_numeric(records[column], errors="coerce")


def finished(records: Records, quantity: str) -> Records:
    """Records that succeeded and have a finite ``quantity``."""
    ok = records["status"] == "ok" if "status" in records else True
    return records[numpy.isfinite(numbers(records, quantity)) & ok]


def values(records: Records, key: str) -> list[str]:
    """Distinct values of a column: systems in the order of their styles, numbers in theirs."""
    order = list(STYLES)

    def rank(value: str) -> tuple:
        number, known = pandas.to_numeric(value, errors="coerce"), _without_size(value)
        place = order.index(known) if known in STYLES else len(order)
        return (number, 0, "") if numpy.isfinite(number) else (math.inf, place, value)

    return sorted(records[key].unique(), key=rank)


def cells(records: Records, keys: Iterable[str]) -> dict[str, Records]:
    """Records that may share a panel, by its title: those with the same values of ``keys``."""
    there = [key for key in keys if key in records]
    order = {key: values(records, key) for key in there}
    groups = dict(list(records.groupby(there, sort=False)))
    ranked = sorted(groups, key=lambda cell: [order[k].index(v) for k, v in zip(there, cell, strict=True)])
    return {shared(groups[cell], there): groups[cell] for cell in ranked}


def shared(records: Records, keys: Iterable[str]) -> str:
    """The values of ``keys`` in words, for a title."""
    words = {"threads": "{} threads", "torch": "torch {}", "jobs": "{} at a time", "n": "{} tokens a row"}
    words |= {"pooling": "pooling {}"}
    found = {key: values(records, key) for key in keys if key in records}
    return ", ".join(
        words.get(key, "{}").format(" / ".join(map(_readable, each)))
        for key, each in found.items()
        if each != [""]
    )


def _readable(value: str) -> str:
    """Of a budget such as ``1000000tokens``; anything else stays as it is."""
    budget = re.fullmatch(r"([\d.]+)(tokens|updates|minutes)", value)
    if budget is None:
        return value
    unit = budget[2].removesuffix("s") if budget[1] == "1" else budget[2]
    return f"{float(budget[1]):,.12g} {unit}"


def in_lines(title: str, width: int) -> str:
    """A title in lines of at most ``width`` letters, in which the names of options stay whole."""
    return textwrap.fill(title, width, break_on_hyphens=False)


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
        low, high = each.get_view_interval()
        each.set_major_locator(ticker.LogLocator(subs=_steps(math.log10(high / low))))
        each.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
        each.set_minor_formatter(ticker.NullFormatter())
    if ticks := sorted(map(float, ticks)):
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8, rotation=30)
        axis.set_xticks([], minor=True)


def _steps(decades: float) -> tuple[float, ...]:
    """Where numbers stand within a decade of a logarithmic axis, so that none hides its neighbour."""
    fitting = {
        **{0.4: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), 0.7: (1, 2, 3, 4, 6, 8)},
        **{1.3: (1, 2, 3, 5, 7), 2.0: (1, 2, 5), 3.0: (1, 3)},
    }
    return next((steps for most, steps in fitting.items() if decades <= most), (1,))


def legend_below(figure: plt.Figure) -> None:
    """One legend for all panels, which hides nothing."""
    found: dict = {}
    for axis in figure.axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    width = max(2.4, 0.6 + 0.085 * max(map(len, found)))
    columns = min(len(found), max(1, int(figure.get_figwidth() // width)))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def draw_lines(
    axis: plt.Axes,
    records: Records,
    x: str,
    y: str,
    unit: float = 1.0,
    among: Iterable[str] = (),
    **look: object,
) -> None:
    """A line for each system through the means of ``y`` at each ``x``, with a band from lowest to highest.

    Args:
        axis: Where to draw.
        records: Of any systems; those that failed are left out.
        x: A column of numbers.
        y: A column of numbers above 0.
        unit: What ``y`` is divided by.
        among: All systems of the figure, where some are in other panels alone.
        look: Differs from the system's.
    """
    good, names = finished(records, y), values(records, "name")
    good = good.assign(x=numbers(good, x), y=numbers(good, y) / unit)
    for name in names:
        own = good[(good["name"] == name) & (good["y"] > 0)].groupby("x")["y"]
        if not own.ngroups:
            continue
        # One point makes no line: it is seen by its marker alone.
        chosen = look if own.ngroups > 1 else {}
        look_of_it = {"markersize": 6, **style(name, [*names, *among]), **chosen}
        axis.plot(own.mean(), label=name, **look_of_it)
        if own.size().max() > 1:
            low, high = own.min(), own.max()
            axis.fill_between(low.index, low, high, color=look_of_it["color"], alpha=0.2, linewidth=0)
    axis.grid(alpha=0.3)


def losses_by(records: Records, *keys: str) -> dict[str, list[float]]:
    """The losses of records that have the same words in ``keys``, by these words."""
    words = [": ".join(filter(None, told)) for told in records[list(keys)].itertuples(index=False)]
    return {
        word: group.tolist()
        for word, group in numbers(records, "valid_loss").groupby(numpy.array(words), sort=False)
    }


def draw_bars(axis: plt.Axes, losses: dict[str, list[float]], base: str, colours: dict[str, str]) -> None:
    """Bars of mean losses less that of ``base``, from below; the means and numbers of seeds beside them."""
    for place, (name, found) in enumerate(losses.items()):
        height = numpy.mean(found) - numpy.mean(losses[base])
        reach = whiskers([found]) if len(found) > 1 else None
        axis.barh(place, height, xerr=reach, color=colours[name], capsize=3, height=0.7)
        text = f"{numpy.mean(found):.3f} ({len(found)})"
        axis.text(1.01, place, text, va="center", transform=axis.get_yaxis_transform())
    axis.set(yticks=range(len(losses)), yticklabels=losses)
    axis.set_xlabel(f"loss less that of {base}, nats a token (beside: the loss, of how many seeds)")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(alpha=0.3, axis="x")


def whiskers(groups: list[Iterable[float]]) -> list[list[float]]:
    """How far each group reaches below and above its mean, as matplotlib takes it."""
    return [[abs(pick(group) - numpy.mean(group)) for group in groups] for pick in (min, max)]
