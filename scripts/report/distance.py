"""Figures of what lies far back: the loss by position, and the yardsticks of distant text."""

import matplotlib.pyplot as plt

from report.style import (
    Records,
    cells,
    draw_lines,
    finished,
    in_lines,
    legend_below,
    numbers,
    panels,
    plain_log,
    style,
    values,
)

__all__ = ["DISTANCES", "YARDSTICKS", "draw_candidates", "draw_positions", "draw_yardstick"]


def draw_positions(records: Records) -> plt.Figure:
    """Perplexity by position in the longest rows that were read."""
    records = records[(records["split"] == "test") & (records["positions"] != "all")]
    records = records[numbers(records, "n") == numbers(records, "n").max()]
    records = records.assign(end=records["positions"].str.partition("-")[2])
    settings = cells(records, ("data", "n"))
    figure, axes = panels(len(settings), 1)
    figure.set_size_inches(7.2, 3.8 * len(settings))
    for (axis,), (title, own) in zip(axes, settings.items(), strict=True):
        draw_lines(axis, own, "end", "perplexity")
        axis.set(ylabel="perplexity", title=title)
        plain_log(axis, "position in the row, up to", values(own, "end"))
    legend_below(figure)
    return figure


#: What each yardstick shows: a quantity by the place.
YARDSTICKS = {
    "recurrence": ("gain", "gain, nats a token", "distance of the token's last occurrence"),
    "copy": ("gain", "gain of a first copy, nats a token", "distance of the copy"),
    "context": ("loss", "loss of the last tokens, nats a token", "tokens a row"),
    "passkey": ("accuracy", "part of the keys found", "distance of the key"),
}


def draw_yardstick(records: Records, yardstick: str) -> plt.Figure:
    """A line for each model by distance or length; of recurrence without --against, the loss.

    Raises:
        ValueError: there is no record of that yardstick.
    """
    quantity, label, x = YARDSTICKS[yardstick]
    good = finished(records[records["yardstick"] == yardstick], "loss")
    if not len(good):
        raise ValueError(f"no record of the yardstick {yardstick} succeeded")
    settings = cells(
        good, ("data", "split", "device", "against", *(["n"] if yardstick == "recurrence" else []))
    )
    figure, axes = panels(len(settings), 1)
    figure.set_size_inches(8, 4 * len(settings))
    for (axis,), (title, own) in zip(axes, settings.items(), strict=True):
        column, words = (quantity, label) if own[quantity].all() else ("loss", "loss, nats a token")
        order = own["x"].unique() if yardstick == "recurrence" else values(own, "x")
        places, names = {value: place for place, value in enumerate(order)}, values(own, "name")
        for name in names:
            mine = own[own["name"] == name]
            axis.plot(mine["x"].map(places), numbers(mine, column), label=name, **style(name, names))
        axis.set(xlabel=x, ylabel=words, xticks=range(len(places)), xticklabels=places)
        axis.set_title(in_lines(title, 90), fontsize=9)
        axis.grid(alpha=0.3)
    legend_below(figure)
    return figure


#: Where the token was last seen in its row, by the column with the loss of such tokens.
DISTANCES = {
    "loss_near": "a chunk",
    "loss_mid": "4 chunks",
    "loss_far": "the row",
    "loss_new": "never",
}
#: Rows that are longer than those of training, by the factor.
LONGER = ("4n", "16n")


def draw_candidates(records: Records) -> plt.Figure:
    """Loss by distance, and what longer rows cost the same tokens: means over seeds, at the best rate."""
    told = records.assign(tokens=records["tokens"] + "tokens")
    settings, names = cells(told, ("data", "tokens")), values(records, "name")
    figure, axes = panels(len(settings), 2)
    figure.set_size_inches(10, 3.8 * len(settings))
    for (distance, longer), (title, own) in zip(axes, settings.items(), strict=True):
        for name in names:
            mine = own[own["name"] == name]
            rates = numbers(mine, "valid_loss").groupby(mine["lr"]).mean()
            if not len(rates):
                continue
            mine, look = mine[mine["lr"] == rates.idxmin()], style(name, names)
            losses = [numbers(mine, column).mean() for column in DISTANCES]
            more = [(numbers(mine, f"loss_{x}") - numbers(mine, f"alone_{x}")).mean() for x in LONGER]
            distance.plot(list(DISTANCES.values()), losses, label=name, **look)
            longer.plot(["1", *(x.removesuffix("n") for x in LONGER)], [0, *more], label=name, **look)
        distance.set(title=title, xlabel="last seen within", ylabel="loss, nats a token")
        longer.set(xlabel="length of the row, of that in training", ylabel="more for the same tokens, nats")
        longer.set_yscale("symlog", linthresh=0.1)
        for axis in (distance, longer):
            axis.grid(alpha=0.3)
    legend_below(figure)
    return figure
