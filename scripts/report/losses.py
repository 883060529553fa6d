"""Figures of losses: as they fall, against speed, and what a choice changes."""

from itertools import product

import matplotlib.pyplot as plt
import numpy
from matplotlib import ticker

from report.labels import place_labels
from report.style import (
    Records,
    cells,
    draw_bars,
    draw_lines,
    finished,
    in_lines,
    legend_below,
    losses_by,
    numbers,
    panels,
    plain_log,
    style,
    values,
    whiskers,
)

__all__ = [
    *("BASES", "RUNS", "alone", "draw_ablation", "draw_curves", "draw_factors", "draw_quality", "with_loss"),
]

BASE = "flash_lm"  # what the bars are measured from
#: What records must share in a panel: those of a comparison, those of an ablation.
RUNS = ("size", "budget", "data", "device", "dtype", "options")
BASES = ("base", "n", "budget", "device")


def draw_curves(records: Records, x: str) -> plt.Figure:
    """Loss against the column ``x``, in training and in validation; lines of panels for each length."""
    settings = cells(records, ("n", *RUNS))
    splits = [split for split in ("train", "valid") if (records["split"] == split).any()]
    figure, axes = panels(len(settings), len(splits))
    figure.set_size_inches(1 + 4.5 * len(splits), 3.4 * len(settings))
    for (index, title), (column, split) in product(enumerate(settings), enumerate(splits)):
        axis, own = axes[index][column], settings[title][settings[title]["split"] == split]
        look = {"marker": "", "linewidth": 1.2} if split == "train" else {}
        # one place for each update: seeds reach it at times that differ a little
        place = numbers(own, x).groupby([own["name"], own["updates"]]).transform("mean")
        draw_lines(axis, own.assign(**{x: place}), x, "loss", **look)
        axis.set(xlabel=x, ylabel=f"{split} loss, nats a token")
        axis.set_title(in_lines(title, 55), fontsize=9)
        if x == "tokens":
            axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
        zoom(axis)
    legend_below(figure)
    return figure


def alone(records: Records) -> Records:
    """The records whose speed can be compared.

    Raises:
        ValueError: there are none.
    """
    found = records[records["jobs"] == "1"] if "jobs" in records else records
    if not len(found):
        raise ValueError("no run had the machine to itself (--jobs 1), so there is no speed to draw")
    return found


def with_loss(records: Records) -> Records:
    """The records that succeeded and have a loss."""
    return finished(records, "valid_loss")


def zoom(axis: plt.Axes) -> None:
    """Leaves out the steep start, beside which nothing could be told apart."""
    found = [drawn.get_ydata() for drawn in axis.get_lines()]
    if found and all(len(each) >= 8 for each in found):
        low, high = min(map(min, found)), max(each[len(each) // 6] for each in found)
        axis.set_ylim(low - 0.1 * (high - low), high)


def draw_quality(records: Records) -> plt.Figure:
    """Loss against speed, the paper's main figure: a point for each system and length."""
    settings = cells(records, RUNS)
    figure, axes = panels(len(settings), 1)
    figure.set_size_inches(8, 5.2 * len(settings))
    labels: dict[plt.Axes, list[tuple[str, float, float]]] = {}
    for (axis,), (title, own) in zip(axes, settings.items(), strict=True):
        names = values(own, "name")
        for name in names:
            points = cells(own[own["name"] == name], ("n",)).values()
            x = [numbers(point, "tokens_per_second").mean() for point in points]
            y = [numbers(point, "valid_loss") for point in points]
            means = list(map(numpy.mean, y))
            look = {"markersize": 8, "linewidth": 1, "capsize": 3, **style(name, names)}
            axis.errorbar(x, means, yerr=whiskers(y), label=name, **look)
            lengths = [point["n"].iloc[0] for point in points]
            labels.setdefault(axis, []).extend(zip(lengths, x, means, strict=True))
        plain_log(axis, "training, tokens a second", y=False)
        axis.set_ylabel("loss, nats a token")
        axis.set_title(f"{in_lines(title, 90)}\nnumbers: tokens a row; better is down and right", fontsize=10)
        axis.grid(alpha=0.3)
    legend_below(figure)
    for axis, own in labels.items():
        place_labels(axis, own)
    return figure


def draw_ablation(records: Records) -> plt.Figure:
    """Bars of each system's loss against that of flash_lm, or of the best where that is missing."""
    settings = cells(records, ("n", *RUNS))
    losses = {title: losses_by(own, "name") for title, own in settings.items()}
    figure, axes = panels(len(losses), 1, [4 + len(found) for found in losses.values()])
    for (axis,), (title, found) in zip(axes, losses.items(), strict=True):
        base = BASE if BASE in found else min(found, key=lambda name: numpy.mean(found[name]))
        order = sorted(found, key=lambda name: numpy.mean(found[name]), reverse=True)
        colours = {name: style(name, order)["color"] for name in order}
        draw_bars(axis, {name: found[name] for name in order}, base, colours)
        axis.set_title(in_lines(title, 110), loc="left", fontsize=9)
    return figure


def draw_factors(records: Records) -> plt.Figure:
    """Bars of one choice changed at a time, against the base that it was changed in."""
    bases = cells(records, BASES)
    changes = {title: losses_by(own, "factor", "value") for title, own in bases.items()}
    figure, axes = panels(len(bases), 1, [4 + len(found) for found in changes.values()])
    for (axis,), (title, found) in zip(axes, changes.items(), strict=True):
        found = {key or "unchanged": losses for key, losses in sorted(found.items(), reverse=True)}
        draw_bars(axis, found, "unchanged", dict.fromkeys(found, "#0072B2"))
        axis.set_title(title, loc="left", fontsize=9)
    return figure
