"""The answer of a comparison in one sentence: better by how much, than whom, and what that is worth."""

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple, Optional

__all__ = ["LOSS", "RIVALS", "Measure", "answer", "best_rate", "by_length", "interval"]

#: Whom the answer is about, and with whom it is compared if they are there; all others if none is.
OURS = ("flash_lm", "flash_masked_lm", "flash_seq2seq_tiny")
RIVALS = (
    *("transformer_lm", "transformer_pp_lm"),
    *("roberta", "roberta_prenorm", "transformer", "transformer pre-norm"),
)
#: The 97.5 % quantiles of Student's distribution by degrees of freedom, from 1 on; beyond, the last.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Measure(NamedTuple):
    """What systems are compared by.

    Attributes:
        column: Of the records.
        title: What it is called.
        unit: Of a difference.
        digits: Behind the point.
        higher: Whether more is better.
    """

    column: str
    title: str
    unit: str
    digits: int = 3
    higher: bool = False

    def gain(self, own: float, other: float) -> float:
        """How much better the first is."""
        return own - other if self.higher else other - own


LOSS = Measure("valid_loss", "loss", "nats a token")


def answer(records: list[dict], rates: list[dict], part: str, measure: Measure = LOSS) -> str:
    """One sentence.

    Args:
        records: Of the final runs that succeeded; those of one length each if they tell it as ``n``.
        rates: Of the runs that tried a learning rate.
        part: What was evaluated, in words.
        measure: What the systems are compared by.
    """
    names = list(dict.fromkeys(record["name"] for record in records))
    if not names:
        return "No run succeeded, so nothing can be said."
    ours = next((name for name in OURS if name in names), names[0])
    rivals = [name for name in RIVALS if name in names and name != ours]
    rivals = rivals or [name for name in names if name != ours]
    told = []
    for n, own in by_length(records).items():
        where = f"in rows of {n} tokens {ours}" if n else ours
        found = by_seed(own, measure)
        clauses = [
            clause(found[ours], found[rival], rival, measure)
            for rival in rivals
            if found.get(ours, {}).keys() & found.get(rival, {}).keys()
        ]
        if clauses:
            told.append(f"{where} is {' and '.join(clauses)}")
        elif ours in found:
            mean = f"{statistics.mean(found[ours].values()):.{measure.digits}f}"
            told.append(f"{where} has a {measure.title} of {mean} and nobody to compare it with")
        else:
            told.append(f"{where} has no finished run")
    sentence = "; ".join([*told, f"all this on {part}", *edges(records, rates, [ours, *rivals])])
    return f"{sentence[0].upper() if sentence.startswith('in ') else sentence[0]}{sentence[1:]}."


def by_length(records: list[dict]) -> dict[Optional[int], list[dict]]:
    """Records of each length, the shortest first; of None if they tell none."""
    found: dict[Optional[int], list[dict]] = {}
    for record in sorted(records, key=lambda record: int(record.get("n", 0))):
        found.setdefault(int(record["n"]) if "n" in record else None, []).append(record)
    return found


def by_seed(records: list[dict], measure: Measure) -> dict[str, dict[str, float]]:
    """What was measured of each system and seed."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        found.setdefault(record["name"], {})[record["seed"]] = float(record[measure.column])
    return found


def clause(own: dict[str, float], other: dict[str, float], rival: str, measure: Measure) -> str:
    """How a system compares with a rival; each by its seed."""
    differences = [measure.gain(own[seed], other[seed]) for seed in own if seed in other]
    mean, digits = statistics.mean(differences), measure.digits
    share = ""
    if not measure.higher:
        # What the rival's perplexity would be multiplied with.
        change = 100 * abs(math.expm1(-mean)) if mean > -700 else math.inf
        share = f"perplexity {change:.3g} % {'lower' if mean > 0 else 'higher'}; "
    if len(differences) == 1:
        worth = "one seed, which proves nothing"
    else:
        low, high = interval(differences)
        proven = "proven" if low > 0 or high < 0 else "not proven"
        worth = f"{proven} by {len(differences)} seeds, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}"
    word = "better" if mean > 0 else "worse"
    return f"{word} than {rival} by {abs(mean):.{digits}f} {measure.unit} ({share}{worth})"


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of at least two, by Student's distribution."""
    degrees, mean = len(differences) - 1, statistics.mean(differences)
    reach = STUDENT[min(degrees, len(STUDENT)) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - reach, mean + reach


def edges(records: list[dict], rates: list[dict], names: list[str]) -> Iterator[str]:
    """What is to be said of systems whose final rate is at the edge of those that were tried."""
    for name in names:
        finals = {record["lr"] for record in records if record["name"] == name}
        tried = [record for record in rates if record["name"] == name]
        best = next((r["lr"] for r in tried if r["lr"] in finals and r["status"] == "ok"), "")
        if at_edge(best, tried):
            yield f"the best rate of {name}, {best}, is at the edge of what was tried: another may be better"


def at_edge(rate: str, tried: list[dict]) -> bool:
    """Whether a rate is the lowest or the highest of several."""
    rates = sorted({record["lr"] for record in tried}, key=float)
    return len(rates) > 1 and rate in (rates[0], rates[-1])


def best_rate(records: list[dict]) -> tuple[str, bool]:
    """The rate of a system's lowest loss, "" if there is none, and whether it is at an edge of its rates."""
    good = {
        record["lr"]: float(record["valid_loss"])
        for record in records
        if record["status"] == "ok" and math.isfinite(float(record["valid_loss"] or "nan"))
    }
    best = min(good, key=good.get, default="")
    return best, at_edge(best, records)
