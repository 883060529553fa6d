"""Every figure: which CSV it reads, which columns it needs, and how it is drawn."""

import io
import textwrap
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy
from PIL import Image

from report.distance import YARDSTICKS, draw_positions, draw_yardstick
from report.style import (
    Rows,
    cells,
    draw_bars,
    draw_lines,
    finished,
    frame,
    legend_below,
    losses_by,
    numbers,
    panels,
    plain_log,
    read,
    shared,
    style,
    values,
    whiskers,
)

__all__ = ["FIGURES", "draw", "frame", "png", "stem_of", "svg"]

BASE = "flash_lm"  # what the bars are measured from
#: What rows of a comparison must share in a panel.
RUNS = ("size", "budget", "data", "device", "dtype", "options")


def draw_generation(rows: Rows) -> plt.Figure:
    """A line of panels for each batch and beam; what ran out of memory is missing from the lines.

    Raises:
        ValueError: the rows are of several devices or types, which cannot share a panel.
    """
    rows = rows[rows["pass"] == "step"]
    common = ("device", "threads", "dtype")
    if (settings := len(cells(rows, common))) != 1:
        raise ValueError(f"there are rows of {settings} settings (device, dtype, threads); allowed: one")
    quantities = {
        "median_ms": ("one step, milliseconds", 1.0),
        "state_bytes": ("state, MiB", 2**20),
        "peak_memory": ("peak memory, MiB", 2**20),
    }
    batches = list(cells(rows, ("b", "beam")).values())
    figure, axes = panels(len(batches), len(quantities))
    for (index, own), (column, quantity) in product(enumerate(batches), enumerate(quantities)):
        axis, (label, unit) = axes[index][column], quantities[quantity]
        draw_lines(axis, own, "n", quantity, unit)
        axis.set(ylabel=label, title=f"batch {own['b'].iloc[0]}, beam {own['beam'].iloc[0]}")
        plain_log(axis, "position" if own is batches[-1] else "", values(own, "n"))
    legend_below(figure)
    figure.suptitle(shared(rows, (*common, "torch")))
    return figure


def draw_training(rows: Rows) -> plt.Figure:
    """Speed and memory by length, a line of panels for each size, device and type."""
    settings = cells(rows, ("size", "device", "dtype", "threads"))
    figure, axes = panels(len(settings), 2)
    figure.set_size_inches(10, 3.6 * len(settings))
    for (speed, memory), (title, own) in zip(axes, settings.items(), strict=True):
        draw_lines(speed, own, "n", "tokens_per_s")
        draw_lines(memory, own, "n", "peak_memory", 2**30)
        for axis, label in ((speed, "training, tokens a second"), (memory, "peak memory, GiB")):
            axis.set(ylabel=label, title=title)
            plain_log(axis, "tokens a row", values(own, "n"))
        mark_failures(memory, own)
    legend_below(figure)
    return figure


def mark_failures(axis: plt.Axes, rows: Rows) -> None:
    """Crosses along the top where a system ran out of memory."""
    names, failed = values(rows, "name"), rows[rows["status"] == "out of memory"]
    for name, n in zip(failed["name"], failed["n"], strict=True):
        place = float(n), 0.97 - 0.05 * names.index(name)
        colour = style(name, names)["color"]
        axis.plot(*place, "x", color=colour, markersize=8, transform=axis.get_xaxis_transform())
    if len(failed):
        axis.set_title(f"{axis.get_title()}\ncrosses: out of memory")


def draw_curves(rows: Rows, x: str) -> plt.Figure:
    """Loss against the column ``x``, in training and in validation; lines of panels for each length."""
    settings = cells(alone(rows) if x == "seconds" else rows, ("n", *RUNS))
    splits = [split for split in ("train", "valid") if (rows["split"] == split).any()]
    figure, axes = panels(len(settings), len(splits))
    figure.set_size_inches(1 + 4.5 * len(splits), 3.4 * len(settings))
    for (index, title), (column, split) in product(enumerate(settings), enumerate(splits)):
        axis, own = axes[index][column], settings[title][settings[title]["split"] == split]
        look = {"marker": "", "linewidth": 1.2} if split == "train" else {}
        # one place for each update: seeds reach it at times that differ a little
        place = numbers(own, x).groupby([own["name"], own["updates"]]).transform("mean")
        draw_lines(axis, own.assign(**{x: place}), x, "loss", **look)
        axis.set(xlabel=x, ylabel=f"{split} loss, nats a token")
        axis.set_title(textwrap.fill(title, 55), fontsize=9)
        zoom(axis)
    legend_below(figure)
    return figure


def alone(rows: Rows) -> Rows:
    """The rows whose speed can be compared.

    Raises:
        ValueError: there are none.
    """
    found = rows[rows["jobs"] == "1"] if "jobs" in rows else rows
    if not len(found):
        raise ValueError("no run had the machine to itself (--jobs 1), so there is no speed to draw")
    return found


def zoom(axis: plt.Axes) -> None:
    """Leaves out the steep start, beside which nothing could be told apart."""
    found = [drawn.get_ydata() for drawn in axis.get_lines()]
    if found and all(len(each) >= 8 for each in found):
        low, high = min(map(min, found)), max(each[len(each) // 6] for each in found)
        axis.set_ylim(low - 0.1 * (high - low), high)


def draw_quality(rows: Rows) -> plt.Figure:
    """Loss against speed, the paper's main figure: a point for each system and length."""
    settings = cells(alone(finished(rows, "valid_loss")), RUNS)
    figure, axes = panels(len(settings), 1)
    figure.set_size_inches(8, 5.2 * len(settings))
    for (axis,), (title, own) in zip(axes, settings.items(), strict=True):
        names = values(own, "name")
        for name in names:
            points = cells(own[own["name"] == name], ("n",)).values()
            x = [numbers(point, "tokens_per_second").mean() for point in points]
            y = [numbers(point, "valid_loss") for point in points]
            means = list(map(numpy.mean, y))
            look = {"markersize": 8, "linewidth": 1, "capsize": 3, **style(name, names)}
            axis.errorbar(x, means, yerr=whiskers(y), label=name, **look)
            for point, at in zip(points, zip(x, means, strict=True), strict=True):
                axis.annotate(point["n"].iloc[0], at, xytext=(7, 5), textcoords="offset points", fontsize=9)
        plain_log(axis, "training, tokens a second", y=False)
        axis.set_ylabel("loss, nats a token")
        axis.set_title(f"{title}\nnumbers: tokens a row; better is down and right", fontsize=10)
        axis.grid(alpha=0.3)
    legend_below(figure)
    return figure


def draw_ablation(rows: Rows) -> plt.Figure:
    """Bars of each system's loss against that of flash_lm, or of the best where that is missing."""
    settings = cells(finished(rows, "valid_loss"), ("n", *RUNS))
    losses = {title: losses_by(own, "name") for title, own in settings.items()}
    figure, axes = panels(len(losses), 1, [4 + len(found) for found in losses.values()])
    for (axis,), (title, found) in zip(axes, losses.items(), strict=True):
        base = BASE if BASE in found else min(found, key=lambda name: numpy.mean(found[name]))
        order = sorted(found, key=lambda name: numpy.mean(found[name]), reverse=True)
        colours = {name: style(name, order)["color"] for name in order}
        draw_bars(axis, {name: found[name] for name in order}, base, colours)
        axis.set_title(title, loc="left", fontsize=9)
    return figure


def draw_factors(rows: Rows) -> plt.Figure:
    """Bars of one choice changed at a time, against the base that it was changed in."""
    good = finished(rows, "valid_loss")
    bases = cells(good[good["stage"] == "factor"], ("base", "n", "budget", "device"))
    changes = {title: losses_by(own, "factor", "value") for title, own in bases.items()}
    figure, axes = panels(len(bases), 1, [4 + len(found) for found in changes.values()])
    for (axis,), (title, found) in zip(axes, changes.items(), strict=True):
        found = {key or "unchanged": losses for key, losses in sorted(found.items(), reverse=True)}
        draw_bars(axis, found, "unchanged", dict.fromkeys(found, "#0072B2"))
        axis.set_title(title, loc="left", fontsize=9)
    return figure


class Source(NamedTuple):
    """Where a figure comes from: the CSV's name, columns that it must have, and how it is drawn."""

    csv: str
    columns: tuple[str, ...]
    draw: Callable[[Rows], plt.Figure]


_CURVE = ("name", "n", "split", "updates", "loss")
FIGURES = {
    "generation": Source("generation.csv", ("name", "pass", "b", "beam", "n", "median_ms"), draw_generation),
    "training": Source("training.csv", ("name", "n", "tokens_per_s", "peak_memory"), draw_training),
    "gpu": Source("fairseq_train.csv", ("name", "n", "tokens_per_s", "peak_memory"), draw_training),
    "positions": Source(
        "extrapolation.csv", ("name", "n", "split", "positions", "perplexity"), draw_positions
    ),
    "tokens": Source("comparison_curves.csv", (*_CURVE, "tokens"), lambda rows: draw_curves(rows, "tokens")),
    "seconds": Source(
        "comparison_curves.csv", (*_CURVE, "seconds"), lambda rows: draw_curves(rows, "seconds")
    ),
    "quality": Source("comparison.csv", ("name", "n", "valid_loss", "tokens_per_second"), draw_quality),
    "ablation": Source("comparison.csv", ("name", "n", "valid_loss"), draw_ablation),
    **{
        name: Source(
            "yardsticks.csv",
            ("name", "yardstick", "x", "loss", "gain", "accuracy"),
            partial(draw_yardstick, yardstick=name),
        )
        for name in YARDSTICKS
    },
    "factors": Source("ablation.csv", ("base", "factor", "value", "valid_loss"), draw_factors),
}


def draw(name: str, path: Path) -> plt.Figure:
    """One of ``FIGURES`` from a CSV file.

    Raises:
        ValueError: the file is missing, or lacks what the figure shows.
    """
    source = FIGURES[name]
    rows = read(path, source.columns)
    if name in ("quality", "ablation") and not len(finished(rows, "valid_loss")):
        raise ValueError(f"{path} has no finished run to draw {name} from")
    return source.draw(rows)


def stem_of(name: str, path: Path) -> str:
    """The name of a figure's file: that of its CSV, and its own behind it where several share one."""
    single = sum(source.csv == FIGURES[name].csv for source in FIGURES.values()) == 1
    stem = path.stem.removesuffix("_curves")
    return stem if single else f"{stem}_{name}"


def png(figure: plt.Figure) -> bytes:
    """A PNG of few colours, which in lines and letters no eye tells from more; closes the figure."""
    small = io.BytesIO()
    drawn = io.BytesIO(_saved(figure, format="png", dpi=150))
    Image.open(drawn).convert("RGB").quantize(32).save(small, format="png", optimize=True)
    return small.getvalue()


def svg(figure: plt.Figure) -> bytes:
    """An SVG that is the same for the same rows; closes the figure."""
    return _saved(figure, format="svg", metadata={"Date": None})


def _saved(figure: plt.Figure, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, **options)
    plt.close(figure)
    return stream.getvalue()
