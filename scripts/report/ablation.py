"""The ablation's results as Markdown."""

from collections.abc import Iterator
from statistics import mean

from report import markdown

__all__ = ["tables"]


def tables(rows: list[dict]) -> Iterator[str]:
    """The results as Markdown: losses by rate, and by choice with the difference from the base."""
    tried = [row for row in rows if row["stage"] == "learning rate"]
    rates = sorted({float(row["lr"]) for row in tried})
    found = {(row["name"], float(row["lr"])): f"{row['loss']:.3f}" for row in tried}
    names = dict.fromkeys(row["name"] for row in tried)
    lines = [[name, *(found.get((name, rate), "") for rate in rates)] for name in names]
    yield markdown.table(["system", *(f"{rate:g}" for rate in rates)], lines)
    losses: dict[tuple, dict] = {}
    for row in rows:
        if row["stage"] == "factor":
            losses.setdefault((row["base"], row["factor"], row["value"]), {})[row["seed"]] = row["loss"]
    for base in dict.fromkeys(base for base, _, _ in losses):
        own = losses[base, "", ""]
        lines = [["", "", _numbers(own), ""]]
        for (other, factor, value), by_seed in sorted(losses.items()):
            if other == base and factor:
                difference = mean(by_seed[seed] - own[seed] for seed in by_seed if seed in own)
                lines.append([factor, value, _numbers(by_seed), f"{difference:+.3f}"])
        yield markdown.table([base, "value", "loss by seed", "against the base, same seeds"], lines)
    longer = sorted((row for row in rows if row["stage"] == "winner"), key=lambda row: row["loss"])
    lines = [[row["name"], row["lr"], f"{row['loss']:.3f}"] for row in longer]
    yield markdown.table(["system, more tokens", "rate", "loss"], lines)


def _numbers(by_seed: dict) -> str:
    return ", ".join(f"{by_seed[seed]:.3f}" for seed in sorted(by_seed))
