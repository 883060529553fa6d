"""Measures the loss over the vocabulary: what time and memory its forward and backward pass take.

    python scripts/benchmark_loss.py                    rows of 4096 to 65 536 tokens, 32 000 words
    python scripts/benchmark_loss.py --quick            seconds, to see that it works

The contenders are the values of --vocabulary-loss. "plain" is what fairseq's ``cross_entropy`` does with any
model: logits, their log-probabilities in float32, and the loss of these. Each begins with the features of a
row of n tokens and ends with the gradients of features and weights. All take turns in one process; ``ratio``
is the median time over that of "plain" in the same rounds, and ``peak_memory`` is what both passes add, in
bytes. Before anything is timed, each loss and its gradients must be those of "plain" on a short row.
"""

import argparse
import functools
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional

from bench.clock import Memory, add_ratios, clock, summary
from fairseq_flash.models._layers import compile_objections
from fairseq_flash.models._loss import LOSSES, LazyLogits, loss_objections
from runs.command_line import command_line, require
from runs.provenance import ROOT, provenance
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "loss.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "dtype", "threads", "n", "d", "vocabulary"),
    *("median_ms", "spread_ms", "repeats", "ratio", "peak_memory", "status"),
)
KEY = ("device", "torch", "dtype", "threads", "n", "d", "vocabulary")
SHOWN = ("name", "n", "median_ms", "ratio", "peak_memory", "status")
CHECKED = 64
#: Of the largest number of each result; measured: 1.2e-5 and 1.4e-2, in pieces.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class Row:
    """Features of a row, the weights of the vocabulary, and what is to be foreseen.

    Args:
        n: Tokens.
        options: The command line's.
    """

    def __init__(self, n: int, options: argparse.Namespace) -> None:
        torch.manual_seed(1)
        kind = dict(device=options.device, dtype=getattr(torch, options.dtype))
        self.features = torch.randn(1, n, options.dim, **kind).requires_grad_()
        self.weight = (
            torch.randn(options.vocabulary, options.dim, **kind) * options.dim**-0.5
        ).requires_grad_()
        self.targets = torch.randint(options.vocabulary, (n,), device=options.device)

    def loss(self, name: str) -> torch.Tensor:
        """The summed loss, as fairseq's ``cross_entropy`` asks for it, after its backward pass."""
        if name == "plain":
            logits = functional.linear(self.features, self.weight)
            log_probs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
        else:
            log_probs = LazyLogits(self.features, self.weight, name).normalized()
        flat = log_probs.view(-1, log_probs.size(-1))
        loss = functional.nll_loss(flat, self.targets, reduction="sum")
        loss.backward()
        return loss.detach()

    def grads(self) -> list[torch.Tensor]:
        """Those of features and weights, which the row has no more."""
        found = [x.grad for x in (self.features, self.weight)]
        self.features.grad = self.weight.grad = None
        return found


def check(name: str, options: argparse.Namespace) -> None:
    """Refuses a loss that is not, with its gradients, the plain one.

    Raises:
        RuntimeError: so it is.
    """
    row, found = Row(CHECKED, options), []
    for each in ("plain", name):
        found.append([row.loss(each), *row.grads()])
    for one, other in zip(*found, strict=True):
        error = float((one - other).abs().max() / one.abs().max())
        if not error <= TOLERANCE[options.dtype]:
            raise RuntimeError(f"{name} differs from plain by {error:.1e} of the largest number")


def measure(names: list[str], n: int, options: argparse.Namespace) -> list[dict]:
    """A record of each contender, of rows of ``n`` tokens."""
    memory, row = Memory(options.device), Row(n, options)
    records: list[dict] = [{"name": name, "n": n} for name in names]
    turns: list[tuple[dict, list[float]]] = [(record, []) for record in records]
    for record in records:
        record["status"] = memory.attempt(functools.partial(first_passes, row, memory, record))
        row.grads()
    for _, (record, times) in product(range(options.rounds), turns):
        if record["status"] == "ok":
            record["status"] = memory.attempt(functools.partial(timed_pass, row, record["name"], times))
            row.grads()
    for record, times in turns:
        if record["status"] == "ok":
            record.update(summary(times))
    add_ratios(records, "plain")
    return records


def first_passes(row: Row, memory: Memory, record: dict) -> None:
    """Compiles what is timed later, then takes its memory."""
    row.loss(record["name"])
    row.grads()
    record["peak_memory"] = memory.peak_of(lambda: row.loss(record["name"]))


def timed_pass(row: Row, name: str, times: list[float]) -> None:
    """Adds the milliseconds of both passes."""
    begin = clock(row.features.device.type)
    row.loss(name)
    times.append(clock(row.features.device.type) - begin)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_loss.py")
    cuda, add = torch.cuda.is_available(), parser.add_argument
    add("--losses", nargs="+", choices=LOSSES, help="(those that can run here)")
    add(
        "--lengths", nargs="+", type=int, default=[4096, 16384, 65536], metavar="N", help="(4096 16384 65536)"
    )
    add("--vocabulary", type=int, default=32000, help="words (32000)")
    add("--dim", type=int, default=512, help="of the features (512)")
    add("--rounds", type=int, default=3, help="turns that each takes (3)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=tuple(TOLERANCE), default="bfloat16" if cuda else "float32")
    add("--output", type=Path, help="(scripts/results/loss.csv)")
    add("--quick", action="store_true", help="short rows of few words, into a temporary file")
    if "--quick" in arguments:
        parser.set_defaults(lengths=[256], vocabulary=500, dim=64, rounds=2)
    options = parser.parse_args(arguments)
    require(parser, options, 1, "lengths", "vocabulary", "dim", "rounds")
    objections = {name: loss_objections(name, compile_objections) for name in LOSSES}
    for name in options.losses or ():
        if objections[name]:
            parser.error(f"--losses {name} cannot run: {'; '.join(objections[name])}; allowed: the others")
    options.losses = options.losses or [name for name in LOSSES if not objections[name]]
    quick = Path(tempfile.gettempdir()) / "loss_quick.csv"
    options.output = options.output or (quick if options.quick else RESULTS)
    return options


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    common = {**provenance(options.device, options.dtype), "threads": torch.get_num_threads()}
    common |= {"d": options.dim, "vocabulary": options.vocabulary}
    try:
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    except ValueError as error:
        sys.exit(f"benchmark_loss.py: {error}")
    for name in options.losses:
        check(name, options)
    for n in options.lengths:
        cell = {"n": n, "d": options.dim, "vocabulary": options.vocabulary}
        if not table.has(options.losses, **cell):
            table.add(measure(options.losses, n, options))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
