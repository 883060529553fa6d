"""The ablation's results as Markdown."""

from collections.abc import Iterator
from statistics import mean

from report import markdown

__all__ = ["tables"]


def tables(records: list[dict]) -> Iterator[str]:
    """The results as Markdown: losses by rate, and by choice with the difference from the base."""
    tried = [record for record in records if record["stage"] == "learning rate"]
    rates = sorted({float(record["lr"]) for record in tried})
    found = {(record["name"], float(record["lr"])): f"{record['loss']:.3f}" for record in tried}
    names = dict.fromkeys(record["name"] for record in tried)
    lines = [[name, *(found.get((name, rate), "") for rate in rates)] for name in names]
    yield markdown.table(["system", *(f"{rate:g}" for rate in rates)], lines)
    losses: dict[tuple, dict] = {}
    for record in records:
        if record["stage"] == "factor":
            losses.setdefault((record["base"], record["factor"], record["value"]), {})[record["seed"]] = (
                record["loss"]
            )
    for base in dict.fromkeys(base for base, _, _ in losses):
        own = losses[base, "", ""]
        lines = [["", "", _numbers(own), ""]]
        for (other, factor, value), by_seed in sorted(losses.items()):
            if other == base and factor:
                difference = mean(by_seed[seed] - own[seed] for seed in by_seed if seed in own)
                lines.append([factor, value, _numbers(by_seed), f"{difference:+.3f}"])
        yield markdown.table([base, "value", "loss by seed", "against the base, same seeds"], lines)
    longer = sorted(
        (record for record in records if record["stage"] == "winner"), key=lambda record: record["loss"]
    )
    lines = [[record["name"], record["lr"], f"{record['loss']:.3f}"] for record in longer]
    yield markdown.table(["system, more tokens", "rate", "loss"], lines)


def _numbers(by_seed: dict) -> str:
    return ", ".join(f"{by_seed[seed]:.3f}" for seed in sorted(by_seed))
