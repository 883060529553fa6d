"""Measures layers alone: FLASH in every implementation, a Transformer++ layer, other linear attentions.

    python scripts/benchmark_ops.py                              what fits the machine; resumes where it ended
    python scripts/benchmark_ops.py --dims 768 --lengths 512 8192 --rounds 20
    python scripts/benchmark_ops.py --quick                      a minute, to see that it works

A contender is what stands for one Transformer layer: two gated attention units, or an attention with its
feed-forward network, norms and residuals included. "training step" is a forward and a backward pass over
``--tokens`` tokens in rows of n. Every contender appears eagerly and compiled, all take turns in one process,
and ``ratio`` is a contender's median time over that of the faster Transformer++ layer in the same rounds. A
contender is timed only after its result passed: against the same weights in float32, and a prefix that does
not depend on what follows. One that is wrong, or fails, is left out, and the end says so; at a length, its
record says why, and the next run tries it again.

``matmul_share`` is the rate of the multiply-adds of products, over the rate of one large square product
measured in the same process; ``copy_share`` likewise the least bytes that a step must move, those of its
dense layers, over the rate of a large copy. ``peak_memory`` is what a step adds, in bytes. FLASH-pytorch and
flash-linear-attention take part where they are installed.
"""

import argparse
import functools
import logging
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from bench.clock import Memory, add_ratios, clock, summary
from bench.layers import CONTENDERS, build, multiply_adds, refuse_unequal
from runs.command_line import command_line, require
from runs.provenance import ROOT, provenance
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "ops.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "compiled", "pass", "dtype", "threads", "b", "n", "d"),
    *("c", "median_ms", "spread_ms", "tokens_per_s", "ratio", "multiply_adds", "bytes", "matmul_share"),
    *("copy_share", "peak_memory", "repeats", "status"),
)
KEY = ("compiled", "device", "torch", "pass", "dtype", "threads", "b", "n", "d", "c")
SHOWN = ("name", "compiled", "pass", "n", "d", "median_ms", "ratio", "matmul_share", "peak_memory", "status")
BASELINE = "transformer_pp"
PASSES = ("forward", "training step")


class Rates:
    """What the device does at best: of a square product in multiply-adds, of a copy in bytes, a second."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        size = 8192 if device.startswith("cuda") else 1024
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        self.products = size**3 / self._seconds(lambda: a @ b, device)
        x = torch.empty(2**29 if device.startswith("cuda") else 2**26, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        self.copies = 2 * x.numel() / self._seconds(lambda: y.copy_(x), device)

    @staticmethod
    def _seconds(work: Callable, device: str) -> float:
        for _ in range(3):
            work()
        begin = clock(device)
        for _ in range(10):
            work()
        return (clock(device) - begin) / 10_000


class Turn:
    """A contender at one dimension, which takes its turns at every length.

    Args:
        name: Of ``CONTENDERS``.
        compiled: Whether torch.compile makes one graph of it.
        d: Model dimension.
        options: The command line.
    """

    def __init__(self, name: str, compiled: bool, d: int, options: argparse.Namespace) -> None:
        self.name, self.compiled, self.d, self.options = name, compiled, d, options
        self.dtype = getattr(torch, options.dtype)
        self.layers = build(name, d, options.chunk_size, options.device, self.dtype)
        self.call = torch.compile(self.layers, dynamic=False) if compiled else self.layers

    def work(self, kind: str, x: torch.Tensor) -> None:
        """One pass over ``x`` (b, n, d)."""
        if kind == "forward":
            with torch.no_grad():
                self.call(x)
            return
        x.grad = None
        self.layers.zero_grad(set_to_none=True)
        self.call(x).backward(x.detach())

    def check(self, x: torch.Tensor) -> None:
        """Refuses compiled layers that give another result than they do eagerly, or no finite gradient.

        Raises:
            RuntimeError: they do.
        """
        found = self.call(x)
        with torch.no_grad():
            refuse_unequal(f"{self.name}, compiled,", found.detach(), self.layers(x))
        found.backward(x.detach())
        if not all(p.grad.isfinite().all() for p in self.layers.parameters() if p.grad is not None):
            raise RuntimeError(f"{self.name} has a gradient that is not finite")

    def begin(self, kind: str, x: torch.Tensor, memory: Memory, record: dict) -> None:
        """What is not timed: the check, a pass that compiles, and one whose memory is recorded."""
        self.check(x)
        self.work(kind, x)
        record["peak_memory"] = memory.peak_of(lambda: self.work(kind, x))

    def record(self, kind: str, b: int, n: int) -> dict:
        """The columns that are known beforehand."""
        times = 1 if kind == "forward" else 3
        mac = times * multiply_adds(self.name, self.d, n, self.options.chunk_size)
        weights = sum(p.numel() for p in self.layers.parameters())
        # Each dense layer reads its input and writes its output, in the forward pass once, backward twice.
        per_token = sum(
            m.in_features + m.out_features for m in self.layers.modules() if isinstance(m, torch.nn.Linear)
        )
        least = times * self.dtype.itemsize * (weights + b * n * per_token)
        shape = {"pass": kind, "b": b, "n": n, "d": self.d, "c": self.options.chunk_size}
        return {"name": self.name, "compiled": "yes" if self.compiled else "no", **shape} | {
            "multiply_adds": mac * b * n or "",
            "bytes": least,
        }


def measure(
    turns: list[Turn], kind: str, n: int, memory: Memory, rates: Rates, options: argparse.Namespace
) -> list[dict]:
    """Records of all contenders for rows of ``n`` tokens."""
    b = max(1, options.tokens // n)
    x = torch.randn(b, n, turns[0].d, device=options.device).to(turns[0].dtype).requires_grad_()
    records, fitting = [], []
    for turn in turns:
        record = turn.record(kind, b, n)
        records.append(record)
        try:
            record["status"] = memory.attempt(functools.partial(turn.begin, kind, x, memory, record))
        except Exception as error:  # compilers and other packages fail in their own ways; the others go on
            record["status"] = reason(error)
        if record["status"] == "ok":
            fitting.append((turn, record, []))
    for _, (turn, _, times) in product(range(options.rounds), fitting):
        begin = clock(options.device)
        turn.work(kind, x)
        times.append(clock(options.device) - begin)
    for _, record, times in fitting:
        finish(record, times, b * n, rates)
    add_ratios(records, BASELINE)
    return records


def finish(record: dict, times: list[float], tokens: int, rates: Rates) -> None:
    """Adds what follows from the times."""
    record.update(summary(times))
    seconds = float(record["median_ms"]) / 1000
    record["tokens_per_s"] = f"{tokens / seconds:.4g}"
    if record["multiply_adds"]:
        record["matmul_share"] = f"{record['multiply_adds'] / seconds / rates.products:.3f}"
    record["copy_share"] = f"{record['bytes'] / seconds / rates.copies:.3f}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_ops.py")
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--systems", nargs="+", default=list(CONTENDERS), metavar="NAME", help=f"({', '.join(CONTENDERS)})")
    add("--dims", nargs="+", type=int, default=[768, 1024, 2048] if cuda else [512], metavar="D")
    lengths = (
        [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072] if cuda else [512, 1024, 2048, 4096, 8192]
    )
    add("--lengths", nargs="+", type=int, default=lengths, metavar="N")
    add(
        "--tokens",
        type=int,
        default=65536 if cuda else 8192,
        help="of a batch (65536 on a GPU, 8192 on a CPU)",
    )
    add("--chunk-size", type=int, default=256, metavar="C", help="(256)")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--compiled", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="(both)")
    add("--rounds", type=int, default=10, help="passes of each contender that are timed (10)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16" if cuda else "float32")
    add("--output", type=Path, help="(scripts/results/ops.csv)")
    add("--quick", action="store_true", help="small layers and few lengths, into a temporary file")
    if "--quick" in arguments:
        parser.set_defaults(dims=[64], lengths=[256, 512], tokens=512, rounds=2, compiled=["no"])
    options = parser.parse_args(arguments)
    unknown = [name for name in options.systems if name not in CONTENDERS]
    if unknown:
        parser.error(f"--systems {unknown[0]} is unknown; allowed: {', '.join(CONTENDERS)}")
    require(parser, options, 1, "dims", "lengths", "tokens", "chunk_size", "rounds")
    quick = Path(tempfile.gettempdir()) / "ops_quick.csv"
    options.output = options.output or (quick if options.quick else RESULTS)
    return options


def contenders(d: int, options: argparse.Namespace) -> tuple[list[Turn], list[str]]:
    """All that can run here, and what failed; says of the others why they are left out."""
    turns, failed = [], []
    for name, compiled in product(options.systems, options.compiled):
        try:
            turns.append(Turn(name, compiled == "yes", d, options))
        except Exception as error:  # as above: what is wrong, is not installed, or does not run here
            why = f"{name}, compiled: {compiled}: {reason(error)}"
            print(f"left out: {why}", flush=True)
            failed += [] if isinstance(error, ValueError) else [why]
    return turns, failed


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    line = str(error).strip().partition("\n")[0]
    if "CUDA error" in line:
        raise error  # behind which nothing runs on this card
    return line if isinstance(error, ValueError) else f"error: {type(error).__name__}: {line}"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    logging.getLogger("filelock").setLevel(logging.INFO)  # the compiler's, which fairseq leaves at DEBUG
    common = {**provenance(options.device, options.dtype), "threads": torch.get_num_threads()}
    try:
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    except ValueError as error:
        sys.exit(f"benchmark_ops.py: {error}")
    table.forget_failed()
    failed: list[str] = []
    # A compiled contender has one graph a length: as many as are asked for.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(options.lengths))
    memory, rates = Memory(options.device), Rates(options.device, getattr(torch, options.dtype))
    print(
        f"square product {2e-12 * rates.products:.4g} TFLOP/s, copy {1e-9 * rates.copies:.4g} GB/s",
        flush=True,
    )
    for d in options.dims:
        turns, wrong = contenders(d, options)
        failed += wrong
        for n, kind in product(options.lengths, options.passes):
            cell = {"pass": kind, "b": max(1, options.tokens // n), "n": n, "d": d, "c": options.chunk_size}
            left = [
                t for t in turns if not table.has([t.name], **cell, compiled="yes" if t.compiled else "no")
            ]
            if left:
                table.add(measure(left, kind, n, memory, rates, options))
    print(f"written to {options.output}")
    if failed:
        sys.exit(f"benchmark_ops.py: {len(failed)} left out, as they failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
