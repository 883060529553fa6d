"""Figures of speed and memory: of training by length, of generation by position."""

from itertools import product

import matplotlib.pyplot as plt

from report.style import Records, cells, draw_lines, legend_below, panels, plain_log, shared, style, values

__all__ = ["GENERATIONS", "STEPS", "draw_generation", "draw_training"]

#: What records of trainings must share in a panel.
STEPS = ("size", "device", "dtype", "threads")
#: Likewise of steps of generation.
GENERATIONS = ("device", "dtype", "threads", "b", "beam")


def draw_generation(records: Records) -> plt.Figure:
    """A line of panels for each setting, batch and beam; what ran out of memory is missing from the lines."""
    quantities = {
        "median_ms": ("one step, milliseconds", 1.0),
        "state_bytes": ("state, MiB", 2**20),
        "peak_memory": ("peak memory, MiB", 2**20),
    }
    batches = list(cells(records, GENERATIONS).values())
    figure, axes = panels(len(batches), len(quantities))
    for (index, own), (column, quantity) in product(enumerate(batches), enumerate(quantities)):
        axis, (label, unit) = axes[index][column], quantities[quantity]
        draw_lines(axis, own, "n", quantity, unit)
        where = f"{own['device'].iloc[0]}, batch {own['b'].iloc[0]}, beam {own['beam'].iloc[0]}"
        axis.set(ylabel=label, title=where)
        plain_log(axis, "position" if own is batches[-1] else "", values(own, "n"))
    legend_below(figure)
    figure.suptitle(shared(records, ("device", "threads", "dtype", "torch")))
    return figure


def draw_training(records: Records) -> plt.Figure:
    """Speed and memory by length, a line of panels for each size, device and type."""
    settings, names = cells(records, STEPS), values(records, "name")
    figure, axes = panels(len(settings), 2)
    figure.set_size_inches(10, 3.6 * len(settings))
    for (speed, memory), (title, own) in zip(axes, settings.items(), strict=True):
        draw_lines(speed, own, "n", "tokens_per_s", among=names)
        draw_lines(memory, own, "n", "peak_memory", 2**30, among=names)
        for axis, label in ((speed, "training, tokens a second"), (memory, "peak memory, GiB")):
            axis.set(ylabel=label, title=title)
            plain_log(axis, "tokens a row", values(own, "n"))
        mark_failures(memory, own)
    legend_below(figure)
    return figure


def mark_failures(axis: plt.Axes, records: Records) -> None:
    """Crosses along the top where a system ran out of memory."""
    names, failed = values(records, "name"), records[records["status"] == "out of memory"]
    for name, n in zip(failed["name"], failed["n"], strict=True):
        place = float(n), 0.97 - 0.05 * names.index(name)
        colour = style(name, names)["color"]
        axis.plot(*place, "x", color=colour, markersize=8, transform=axis.get_xaxis_transform())
    if len(failed):
        axis.set_title(f"{axis.get_title()}\ncrosses: out of memory")
