"""The answer of a comparison in one sentence: better by how much, than whom, and what that is worth."""

import math
import statistics
from collections.abc import Iterator

__all__ = ["answer", "best_rate", "interval"]

#: Whom the answer is about, and with whom it is compared if they are there; all others if none is.
OURS, RIVALS = "flash_lm", ("transformer_lm", "transformer_pp_lm")
#: The 97.5 % quantiles of Student's distribution by degrees of freedom, from 1 on; beyond, the last.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def answer(records: list[dict], rates: list[dict], part: str) -> str:
    """One sentence.

    Args:
        records: Of the final runs that succeeded.
        rates: Of the runs that tried a learning rate.
        part: What was evaluated, in words.
    """
    names = list(dict.fromkeys(record["name"] for record in records))
    if not names:
        return "No run succeeded, so nothing can be said."
    ours = OURS if OURS in names else names[0]
    rivals = [name for name in RIVALS if name in names and name != ours]
    rivals = rivals or [name for name in names if name != ours]
    told = []
    for n in sorted({int(record["n"]) for record in records}):
        losses = losses_by_seed([record for record in records if int(record["n"]) == n])
        clauses = [
            clause(losses[ours], losses[rival], rival)
            for rival in rivals
            if losses.get(ours, {}).keys() & losses.get(rival, {}).keys()
        ]
        if clauses:
            told.append(f"in rows of {n} tokens {ours} is {' and '.join(clauses)}")
        elif ours in losses:
            mean = statistics.mean(losses[ours].values())
            told.append(
                f"in rows of {n} tokens {ours} has a loss of {mean:.3f} and nobody to compare it with"
            )
        else:
            told.append(f"in rows of {n} tokens {ours} has no finished run")
    sentence = "; ".join([*told, f"all this on {part}", *edges(rates, [ours, *rivals])])
    return f"{sentence[0].upper()}{sentence[1:]}."


def losses_by_seed(records: list[dict]) -> dict[str, dict[str, float]]:
    """The loss of each system and seed."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        found.setdefault(record["name"], {})[record["seed"]] = float(record["valid_loss"])
    return found


def clause(own: dict[str, float], other: dict[str, float], rival: str) -> str:
    """How losses compare with a rival's; each by its seed."""
    differences = [other[seed] - own[seed] for seed in own if seed in other]
    mean = statistics.mean(differences)
    by = f"by {abs(mean):.3f} nats a token"
    # What the rival's perplexity would be multiplied with.
    change = 100 * abs(math.expm1(-mean)) if mean > -700 else math.inf
    share = f"perplexity {change:.3g} % {'lower' if mean > 0 else 'higher'}"
    if len(differences) == 1:
        worth = "one seed, which proves nothing"
    else:
        low, high = interval(differences)
        proven = "proven" if low > 0 or high < 0 else "not proven"
        worth = f"{proven} by {len(differences)} seeds, 95 % interval {low:+.3f} to {high:+.3f}"
    return f"{'better' if mean > 0 else 'worse'} than {rival} {by} ({share}; {worth})"


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of at least two, by Student's distribution."""
    degrees, mean = len(differences) - 1, statistics.mean(differences)
    reach = STUDENT[min(degrees, len(STUDENT)) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - reach, mean + reach


def edges(rates: list[dict], names: list[str]) -> Iterator[str]:
    """What is to be said of systems whose best rate is at the edge of those that were tried."""
    for name in names:
        own = [record for record in rates if record["name"] == name]
        best, edge = best_rate(own, sorted({record["lr"] for record in rates}, key=float))
        if edge:
            yield f"the best rate of {name}, {best}, is at the edge of what was tried: another may be better"


def best_rate(records: list[dict], tried: list[str]) -> tuple[str, bool]:
    """The rate of the lowest loss, "" if there is none, and whether it is at an edge of what was tried."""
    good = {
        record["lr"]: float(record["valid_loss"])
        for record in records
        if record["status"] == "ok" and math.isfinite(float(record["valid_loss"] or "nan"))
    }
    best = min(good, key=good.get, default="")
    return best, len(tried) > 1 and best in (tried[0], tried[-1])
