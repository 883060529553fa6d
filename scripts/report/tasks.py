"""Figures of masked language models, which are fine-tuned, and of translation."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy
import pandas

from report.style import (
    Records,
    cells,
    draw_lines,
    finished,
    legend_below,
    numbers,
    panels,
    plain_log,
    style,
    values,
    whiskers,
)

__all__ = ["draw_masked", "draw_translation"]


def draw_masked(records: Records) -> plt.Figure:
    """For each amount of pretraining: perplexity of masked words by rate, and accuracy once fine-tuned.

    Beside it stands the accuracy of counts of tokens.
    """
    counted = records[records["stage"] == "counts"]
    records = records[records["stage"] != "counts"]
    amounts = values(records, "pretraining")
    figure, axes = panels(2, len(amounts))
    figure.set_size_inches(1 + 4.2 * len(amounts), 8)
    for column, amount in enumerate(amounts):
        own = records[records["pretraining"] == amount]
        above, below = axes[0][column], axes[1][column]
        masked = _apart(own[own["stage"] == "pretraining"])
        _draw_rates(above, masked, "valid_perplexity", "perplexity of masked words")
        above.set_title(f"after {int(amount):,} tokens")
        tuned = finished(_apart(own[own["stage"] == "fine-tuning"]), "test_accuracy")
        groups = cells(tuned, ("n", "pooling"))
        accuracies = {title: dict(_chosen(group)) for title, group in groups.items()}
        _draw_groups(below, accuracies, values(tuned, "name"))
        for place, group in enumerate(groups.values()):
            alone = counted[counted["n"].isin(group["n"]) & counted["data"].isin(group["data"])]
            ends = (place - 0.45, place + 0.45)
            for right in numbers(alone, "test_accuracy"):
                below.hlines(right, *ends, "black", "dashed", label="counts of tokens alone")
        below.set(ylabel="right authors of test passages, %", ylim=(0, 100))
    legend_below(figure)
    return figure


def draw_translation(records: Records) -> plt.Figure:
    """For each data: loss on valid by rate after the short trainings, and BLEU of the final ones."""
    sets = values(records, "data")
    figure, axes = panels(len(sets), 2)
    figure.set_size_inches(9.4, 3.8 * len(sets))
    for (left, right), data in zip(axes, sets, strict=True):
        own = records[records["data"] == data]
        tried = own[own["stage"] == "learning rate"]
        # A short try on another machine is no search.
        _, tried = max(tried.groupby(["epochs", "updates_per_epoch"]), key=lambda each: len(each[1]))
        _draw_rates(left, tried, "valid_loss", f"loss on valid after {tried['epochs'].iloc[0]} epochs, nats")
        left.set(title=data, yscale="linear")
        final = finished(own[own["stage"] == "final"], "bleu")
        scores = {name: numbers(final[final["name"] == name], "bleu") for name in values(final, "name")}
        _draw_groups(right, {f"after {' / '.join(values(final, 'epochs'))} epochs": scores}, list(scores))
        right.set(title=data, ylabel="BLEU on test")
    legend_below(figure)
    return figure


def _apart(records: Records) -> Records:
    """Systems by their data where there are several: what two corpora gave are no seeds of one."""
    if records["data"].nunique() < 2:
        return records
    return records.assign(name=records["name"] + ", " + records["data"])


def _draw_rates(axis: plt.Axes, records: Records, y: str, label: str) -> None:
    draw_lines(axis, records, "lr", y)
    axis.set_ylabel(label)
    plain_log(axis, "learning rate", values(records, "lr"))


def _chosen(tuned: Records) -> Iterator[tuple[str, pandas.Series]]:
    """The accuracies of each system at the rate that all seeds were trained with."""
    for name in values(tuned, "name"):
        by_rate = tuned[tuned["name"] == name].groupby("lr")
        yield name, numbers(max((each for _, each in by_rate), key=len), "test_accuracy")


def _draw_groups(axis: plt.Axes, groups: dict[str, dict], names: list[str]) -> None:
    """Bars of means in groups, with whiskers over seeds; each bar has its number above."""
    width = 0.8 / max(1, len(names))
    for place, found in enumerate(groups.values()):
        for name, seeds in found.items():
            x = place + width * (names.index(name) - (len(names) - 1) / 2)
            look = style(name, names)
            bare = {"alpha": 0.5, "hatch": "//"} if look.get("linestyle") == ":" else {}
            reach = whiskers([seeds]) if len(seeds) > 1 else None
            height = numpy.mean(seeds)
            axis.bar(x, height, width * 0.94, yerr=reach, capsize=3, color=look["color"], label=name, **bare)
            axis.annotate(
                f"{height:.1f}",
                (x, max(seeds)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axis.set_xticks(range(len(groups)), [title.replace(", ", "\n") for title in groups])
    axis.margins(y=0.12)
    axis.grid(alpha=0.3, axis="y")
