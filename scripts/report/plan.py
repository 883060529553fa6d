"""What training would take, from one GPU to many: time, memory and money, reckoned from one measured rate."""

from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch

from bench.sketch import Sketch
from runs.provenance import ROOT
from runs.table import read

__all__ = ["GPUS", "LENGTHS", "SIZES", "Cluster", "Plan", "assumptions", "measured_rate", "plan_of", "plans"]

#: Training on one GPU, as fairseq-train was measured.
MEASURED = ROOT / "scripts" / "results" / "fairseq_train.csv"
MEASURED_NAME, MEASURED_WORDS = "flash_lm --compile --optimizer fused_adam", 32_000
MEASURED_DEVICE = "NVIDIA H100 80GB HBM3"
VOCABULARY = 50_000
#: The longest rows have many chunks; a token costs the same in these.
COUNTED_LENGTH = 4096
GPUS = (1, 2, 8, 64, 256, 1024)
LENGTHS = (8192, 131_072, 1_048_576)


class Size(NamedTuple):
    """A model of gated attention units: its width, their number, and the tokens of a batch."""

    embed_dim: int
    units: int
    batch: int


SIZES = {
    "125M": Size(768, 24, 2**19),
    "350M": Size(1024, 48, 2**19),
    "1.3B": Size(2048, 48, 2**20),
    "7B": Size(4096, 64, 2**22),
}


class Cluster(NamedTuple):
    """What is assumed of GPUs: H100s, eight to a machine.

    Attributes:
        memory: Bytes that a training may take.
        price: US dollars for an hour of one GPU.
        node: GPUs of a machine.
        inside: Bytes a second that a GPU exchanges within its machine.
        outside: Bytes a second that it exchanges with other machines.
        latency: Seconds of a message, however short.
        tokens_per_parameter: Tokens to train on.
        sharing: Time that a token of a shared row takes of a GPU, over one of a whole row: 1.59 and 1.62 on
            two H200s (scripts/results/sequence_parallel.csv).
    """

    memory: float = 72e9
    price: float = 2.5
    node: int = 8
    inside: float = 300e9
    outside: float = 40e9
    latency: float = 30e-6
    tokens_per_parameter: float = 20.0
    sharing: float = 1.6

    def bandwidth(self, gpus: int) -> float:
        """Of each of so many that all exchange with each other."""
        return self.inside if gpus <= self.node else self.outside


class Plan(NamedTuple):
    """A way to train: how many GPUs share a row, and what it takes.

    Attributes:
        ranks: GPUs that share each row.
        recomputes: Whether activations are computed again.
        sharded: Whether the optimizer's state is shared.
        memory: Bytes of each GPU.
        batch: Tokens of an update.
        tokens_per_s: Of all GPUs.
        days: For all tokens.
        dollars: Likewise.
    """

    ranks: int
    recomputes: bool
    sharded: bool
    memory: float
    batch: int
    tokens_per_s: float
    days: float
    dollars: float


class Cost:
    """What a model of a size costs a token, from its sketch.

    Args:
        words: Options of the model.
        vocabulary: Words of the dictionary.
    """

    def __init__(self, words: list[str], vocabulary: int) -> None:
        sketch = Sketch([*words, "--share-decoder-input-output-embed"], vocabulary, torch.bfloat16, 1)
        block = sketch.stack.blocks[0]
        self.units, self.embed_dim = len(sketch.stack.blocks), block.embed_dim
        self.parameters = sum(sketch.parameters())
        self.multiply_adds = sketch.multiply_adds(COUNTED_LENGTH, skip_future=False)
        # The kernels keep the pre-activations and the input of each dense layer.
        kept = 2 * block.embed_dim + block.uvz.out_features + block.expanded_dim
        self.activations = 2.0 * self.units * kept
        self.boundaries, self.layer = 2.0 * self.units * block.embed_dim, 2.0 * 4 * kept
        self.state = 4.0 * block.attention_dim * block.expanded_dim

    def memory(self, part: int, gpus: int, *, recomputes: bool, sharded: bool) -> float:
        """Bytes of a GPU that works on ``part`` tokens at a time.

        Weights and gradients in bfloat16, and in float32 the weights and Adam's two moments; the loss over
        the vocabulary is taken in pieces.
        """
        optimizer = 12 * self.parameters / (gpus if sharded else 1)
        kept = self.boundaries + self.layer if recomputes else self.activations + self.layer
        return 4 * self.parameters + optimizer + part * kept


def measured_rate() -> tuple[float, float]:
    """Tokens a second of fairseq-train on one H100, and the floating point operations a second they mean."""
    wanted = {"name": MEASURED_NAME, "n": "1024", "device": MEASURED_DEVICE}
    (record,) = (record for record in read(MEASURED) if wanted.items() <= record.items())
    cost = Cost(["--arch", "flash_lm_gpt"], MEASURED_WORDS)
    tokens = float(record["tokens_per_s"])
    return tokens, 6 * cost.multiply_adds * tokens


def step_seconds(
    cost: Cost, n: int, rows: int, gpus: int, ranks: int, recomputes: bool, rate: float, cluster: Cluster
) -> float:
    """Of an update in which each group of ``ranks`` GPUs takes ``rows`` rows of ``n`` tokens."""
    tokens = rows * n / ranks
    seconds = tokens * (8 if recomputes else 6) * cost.multiply_adds / rate
    if ranks > 1:
        seconds *= cluster.sharing
    if gpus > 1:
        # A ring sends and receives the gradients twice; none of it is hidden behind the backward pass.
        sent = 2 * 2 * cost.parameters * (gpus - 1) / gpus
        seconds += sent / cluster.bandwidth(gpus)
    if ranks > 1:
        passes = 3 if recomputes else 2
        gather = (ranks - 1) * cost.state / cluster.bandwidth(ranks) + cluster.latency
        seconds += rows * cost.units * passes * gather
    return seconds


def plan_of(cost: Cost, n: int, batch: int, gpus: int, rate: float, cluster: Cluster) -> Optional[Plan]:
    """The fastest plan that fits; None if none does.

    Args:
        cost: Of the model.
        n: Tokens a row.
        batch: Tokens of an update, at least; more where each group's one row is more.
        gpus: Of all machines.
        rate: Floating point operations a second of one.
        cluster: What is assumed.

    Returns:
        The plan.
    """
    found = []
    ranks = 1
    while ranks <= gpus:
        groups = gpus // ranks
        rows = max(1, round(batch / (n * groups)))
        for recomputes in (False, True):
            for sharded in (False, True) if gpus > 1 else (False,):
                memory = cost.memory(n // ranks, gpus, recomputes=recomputes, sharded=sharded)
                if memory > cluster.memory:
                    continue
                seconds = step_seconds(cost, n, rows, gpus, ranks, recomputes, rate, cluster)
                whole = rows * groups * n
                days = cluster.tokens_per_parameter * cost.parameters / (whole / seconds) / 86400
                dollars = 24 * days * gpus * cluster.price
                plan = Plan(ranks, recomputes, sharded, memory, whole, whole / seconds, days, dollars)
                # A batch beyond what was asked for is no gain.
                found.append(((max(1.0, whole / batch), days, ranks, sharded), plan))
        ranks *= 2
    return min(found, key=lambda each: each[0])[1] if found else None


def assumptions(cluster: Cluster) -> Iterator[str]:
    """The lines about what is assumed."""
    tokens, rate = measured_rate()
    speed = f"{tokens:.0f} tokens a second, {rate / 1e12:.0f} TFLOP/s"
    yield f"measured            flash_lm_gpt --compile, one H100: {speed}"
    yield "assumed             the same rate for every size and row; linear attention, so every row length"
    yield f"                    {cluster.memory / 1e9:.0f} GB of a GPU, ${cluster.price} an hour of it"
    yield (
        f"                    {cluster.inside / 1e9:.0f} GB/s within a machine of {cluster.node}, "
        f"{cluster.outside / 1e9:.0f} GB/s between, {1e6 * cluster.latency:.0f} us a message; nothing hidden"
    )
    yield (
        f"                    {cluster.tokens_per_parameter:.0f} tokens a parameter, {VOCABULARY} words, "
        "Adam, bfloat16 with float32 weights in the optimizer"
    )
    yield f"                    a row that GPUs share: {cluster.sharing} times the time a token, as two took"
    yield "                    batch: as the size wants, or one row a group where that is more"


def plans(cluster: Cluster) -> Iterator[str]:
    """The table: a line for each size, row and number of GPUs."""
    _, rate = measured_rate()
    yield "size  row      GPUs  a row  recompute  state   GB/GPU  batch     tokens/s  days     dollars"
    for name, size in SIZES.items():
        words = ["--arch", "flash_lm", "--embed-dim", str(size.embed_dim), "--layers", str(size.units)]
        cost = Cost(words, VOCABULARY)
        for n in LENGTHS:
            for gpus in GPUS:
                plan = plan_of(cost, n, size.batch, gpus, rate, cluster)
                yield f"{name:<5} {n:<8} {gpus:<5} " + ("does not fit" if plan is None else _line(plan))


def _line(plan: Plan) -> str:
    again, state = "yes" if plan.recomputes else "no", "shared" if plan.sharded else "whole"
    return (
        f"{plan.ranks:<6} {again:<10} {state:<7} {plan.memory / 1e9:<7.1f} {plan.batch:<9} "
        f"{plan.tokens_per_s:<9.3g} {plan.days:<8.3g} {plan.dollars:.3g}"
    )
