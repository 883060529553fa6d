"""What a model costs, in lines that describe.py prints."""

import math
from collections.abc import Iterator

from bench.sketch import LONGEST, Sketch, crossover, transformers
from runs.provenance import ROOT
from runs.systems import SIZES
from runs.table import read

__all__ = ["crossovers", "measured_crossovers", "report"]

#: Training steps, as benchmark_training.py measured them.
MEASURED = ROOT / "scripts" / "results" / "training.csv"


def report(sketch: Sketch, n: int) -> Iterator[str]:
    """The lines about a model at ``n`` tokens a row."""
    embedding, rest = sketch.parameters()
    whole = amount(embedding + rest)
    yield f"parameters          {whole} (embedding {amount(embedding)}, rest {amount(rest)})"
    computed = sketch.multiply_adds(n, skip_future=False)
    decoder = sketch.model.decoder
    recomputes = any(hasattr(module, "precheckpoint_forward") for module in decoder.modules())
    adds = "three times as many (twice, and the forward pass again)" if recomputes else "twice as many"
    yield f"multiply-adds       {amount(computed)} per token forward; backward adds {adds}"
    if sketch.is_quadratic:
        skipping = sketch.multiply_adds(n, skip_future=True)
        yield f"                    {amount(skipping)} skipping the future"
    layers, output = sketch.activations(n)
    kept = f"{in_bytes(layers)} per token in the layers, {in_bytes(output)} in the output and loss"
    yield f"activations         {kept}"
    first, second, last = (sketch.state_bytes(length) for length in (1, 2, n))
    growth = (
        "whatever the length" if first == second == last else f"after {n} tokens, {in_bytes(first)} after one"
    )
    yield f"state               {in_bytes(last)} per row {growth}"
    if not sketch.is_transformer:
        yield from crossovers(sketch)


def crossovers(sketch: Sketch) -> Iterator[str]:
    """The lines about the Transformers that a model is compared with."""
    vocabulary, dtype = sketch.embedding.num_embeddings, sketch.embedding.weight.dtype
    for name, words in transformers(sketch).items():
        other = Sketch(words, vocabulary, dtype, sketch.batch)
        whole = amount(sum(other.parameters()))
        yield f"crossover           in multiply-adds, against {name} of {whole} parameters"
        for skip_future, how in ((True, "both skipping the future"), (False, "both as computed")):
            try:
                n = crossover(sketch, other, skip_future=skip_future)
                found = f"none up to {LONGEST} tokens" if n is None else f"from {n} tokens on"
            except ValueError:
                found = "none: rows of this model end at its table"
            yield f"                    {found}, {how}"
        for line in measured_crossovers(sketch.name, name):
            yield f"                    {line}"


def measured_crossovers(ours: str, theirs: str) -> Iterator[str]:
    """The lines about training steps of both that were measured: from which length on ours take less time.

    Args:
        ours: An architecture.
        theirs: A system, which is compared at the size of ``ours``.
    """
    size, ending = max(SIZES.items(), key=lambda each: (ours.endswith(each[1]), len(each[1])))
    names = {ours.removesuffix(ending): 0, theirs: 1}
    steps: dict[str, tuple[dict, dict]] = {}
    for record in read(MEASURED):
        if record["status"] == "ok" and record["size"] == size and record["name"] in names:
            setting = f"{record['device']}, {record['dtype']}, {record['threads']} threads"
            times = steps.setdefault(setting, ({}, {}))[names[record["name"]]]
            times[int(record["n"])] = float(record["median_ms"])
    for setting, times in steps.items():
        both = sorted(set(times[0]) & set(times[1]))
        slower = max((n for n in both if times[0][n] > times[1][n]), default=0)
        found = next((f"from {n} tokens on" for n in both if n > slower), f"none up to {slower} tokens")
        yield f"{found}, in the time of a training step on {setting}"
    if not steps:
        yield "in time: not measured at this size; scripts/benchmark_training.py does"


def amount(number: float) -> str:
    """A number in millions or thousands."""
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.2f} k"


def in_bytes(number: float) -> str:
    """Bytes, in steps of 1024."""
    unit = min(3, max(0, int(math.log2(max(number, 1)) // 10)))
    return f"{number / 1024**unit:.{1 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
