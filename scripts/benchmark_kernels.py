"""Times each Triton kernel of mixed chunk attention in a forward and a backward pass, in other tilings too.

    python scripts/benchmark_kernels.py                               as they are
    python scripts/benchmark_kernels.py --tilings output pairs        these in other tilings as well
    python scripts/benchmark_kernels.py --tilings all --lengths 1024 8192

For a GPU. The settings, as the kernels are and with another tiling of one kernel, take turns round by round
on the same numbers. Each launch lies between two marks of the device's own clock, so that the host does not
count. ``median_us`` is of one kernel, all its launches in both passes together; "both passes" is all between
the first mark and the last, with PyTorch's own products. A setting is timed only after its output and
gradients were those of the first, up to rounding.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton

from fairseq_flash import ops
from fairseq_flash.ops.mixed_chunk import kernel
from runs.command_line import command_line, require
from runs.provenance import ROOT, provenance
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "kernels.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "triton", "name", "setting", "dtype", "b", "n", "e", "s", "c"),
    *("median_us", "launches", "repeats", "status"),
)
KEY = ("setting", "device", "torch", "triton", "dtype", "b", "n", "e", "s", "c")
SHOWN = ("name", "setting", "n", "median_us", "status")
ALL = "both passes"
#: Rows, columns, depth, warps, stages and registers that --tilings tries.
_WIDE = (
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (64, 64, 64, 4, 2),
)
_SUMS = (
    (128, 64, 64, 8, 2),
    (128, 128, 64, 8, 2),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 8, 3),
    (128, 32, 64, 4, 4),
)
TILINGS = {
    "serial": _SUMS,
    "states": _SUMS,
    "output": _WIDE,
    "output_backward": _WIDE,
    "values": _WIDE,
    "pairs": ((128, 128, 64, 8, 3), (128, 128, 128, 8, 2), (64, 64, 128, 4, 3)),
    "scores": ((64, 64, 128, 4, 1), (128, 128, 64, 8, 2)),
    # Rows at a time, times, warps.
    "base": ((16, 4, 8), (16, 2, 8), (8, 8, 8), (8, 8, 4), (16, 2, 4)),
}
#: Largest difference over the largest value, of results that were rounded at other places.
TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 1e-4}


class Setting(NamedTuple):
    """What runs otherwise than by itself: a kernel's tiling."""

    kernel: str = ""
    tiling: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"chunks, {self.kernel} {'x'.join(map(str, self.tiling))}" if self.kernel else "chunks"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The kernels run so while this lasts."""
        before = dict(kernel.TILINGS), kernel.BASE
        if self.kernel == "base":
            kernel.BASE = self.tiling
        elif self.kernel:
            kernel.TILINGS[self.kernel] = kernel.Tiling(*self.tiling)
        try:
            yield
        finally:
            kernel.TILINGS, kernel.BASE = before


def settings(names: list[str]) -> list[Setting]:
    """As the kernels are, and each tiling of those named."""
    named = [*TILINGS] if "all" in names else names
    return [Setting(), *(Setting(name, tiling) for name in named for tiling in TILINGS[name])]


class Marks:
    """Marks on the device's clock before and behind every launch, while it is entered."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            self.busy = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device)

    def __enter__(self) -> "Marks":
        self.start, self.found = kernel._start, []
        kernel._start = self._launch
        if self.cuda:
            # While the device does these, the host gets ahead: no mark waits for it.
            for _ in range(6):
                torch.mm(self.busy, self.busy)
        return self

    def __exit__(self, *error: Any) -> None:
        kernel._start = self.start

    def _launch(self, launched: Any, *args: Any, **constants: Any) -> None:
        begin = self._mark()
        self.start(launched, *args, **constants)
        name = launched.fn.__name__.removesuffix("_kernel")
        self.found.append((f"{name}, backward" if constants.get("BACKWARD") else name, begin, self._mark()))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def times(self) -> dict[str, list[float]]:
        """By kernel, what each launch took, in microseconds; and all between the first mark and the last."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {ALL: [self._between(self.found[0][1], self.found[-1][2])]}
        for name, begin, end in self.found:
            found.setdefault(name, []).append(self._between(begin, end))
        return found

    def _between(self, begin: Any, end: Any) -> float:
        return 1e3 * begin.elapsed_time(end) if self.cuda else 1e6 * (end - begin)


class Passes:
    """Random rows, and both passes over them.

    Args:
        options: The command line.
        n: Tokens of a row.
    """

    def __init__(self, options: argparse.Namespace, n: int) -> None:
        e, s, self.b = options.expanded_dim, options.attention_dim, max(1, options.tokens // n)
        like = dict(device=options.device, dtype=getattr(torch, options.dtype))
        torch.manual_seed(0)
        m = min(n, options.chunk_size)
        uvz, gamma, beta, bias = (
            (scale * torch.randn(*size, **like)).requires_grad_()
            for scale, size in ((1, (self.b, n, 2 * e + s)), (0.1, (4, s)), (0.1, (4, s)), (0.1, (m, m)))
        )
        cos, sin = ops.rotary_angles(torch.arange(n, device=options.device), s, torch.float32)
        self.inputs = ops.Projected(uvz, gamma, beta, cos, sin, bias)
        self.options = ops.Options(options.chunk_size, causal=True)
        self.grad = torch.randn(self.b, n, e, **like)

    def run(self) -> list[torch.Tensor]:
        """The output and all gradients."""
        out = kernel.run(self.inputs, self.options)
        leaves = [x for x in self.inputs if x is not None and x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad)]


def measure(options: argparse.Namespace, n: int, todo: list[Setting]) -> list[dict]:
    """Records of all kernels in all settings for rows of ``n`` tokens."""
    passes, records, fitting = Passes(options, n), [], []
    want = passes.run()
    for one in todo:
        record = {"setting": str(one), "b": passes.b, "n": n}
        try:
            with one.applied():
                check(passes.run(), want, options.dtype)
        except Exception as error:  # of the compiler's own kinds: what does not fit this card is a record
            records.append({"name": ALL, **record, "status": f"{type(error).__name__}: {str(error)[:100]}"})
            continue
        fitting.append((one, record, defaultdict(list), defaultdict(int)))
    marks = Marks(options.device)
    for _, (one, _, times, launches) in product(range(options.rounds), fitting):
        with one.applied(), marks:
            passes.run()
            for name, found in marks.times().items():
                times[name].append(sum(found))
                launches[name] = len(found)
    for _, record, times, launches in fitting:
        records += [
            {"name": name, **record, "median_us": f"{median(found):.4g}", "launches": launches[name]}
            | {"repeats": len(found), "status": "ok"}
            for name, found in times.items()
        ]
    return records


def check(found: list[torch.Tensor], want: list[torch.Tensor], dtype: str) -> None:
    """Refuses results that are others.

    Raises:
        RuntimeError: they are.
    """
    for x, y in zip(found, want, strict=True):
        error = float((x - y).abs().max() / y.abs().max())
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"a result is wrong by {error:.2g}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_kernels.py")
    add = parser.add_argument
    add("--tilings", nargs="+", choices=["all", *TILINGS], default=[], help="of these kernels others too")
    add("--lengths", nargs="+", type=int, default=[1024, 8192], metavar="N", help="(1024 8192)")
    add("--tokens", type=int, default=32768, help="of a batch (32768)")
    add("--expanded-dim", type=int, default=1536, metavar="E", help="(1536)")
    add("--attention-dim", type=int, choices=kernel.WIDTHS, default=128, help="(128)")
    add("--chunk-size", type=int, choices=kernel.CHUNK_SIZES, default=256, help="(256)")
    add("--dtype", choices=TOLERANCE, default="bfloat16")
    add("--rounds", type=int, default=20, help="passes of each setting that are timed (20)")
    add("--output", type=Path, default=RESULTS, help="(scripts/results/kernels.csv)")
    options = parser.parse_args(arguments)
    require(parser, options, 1, "lengths", "tokens", "expanded_dim", "rounds")
    options.device = "cpu" if kernel.INTERPRETED else "cuda"
    if not (kernel.INTERPRETED or torch.cuda.is_available()):
        parser.error("there is no GPU; allowed: one, or TRITON_INTERPRET=1 to see that it works")
    return options


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    common = {**provenance(options.device, options.dtype), "triton": triton.__version__}
    common |= {"e": options.expanded_dim, "s": options.attention_dim, "c": options.chunk_size}
    try:
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    except ValueError as error:
        sys.exit(f"benchmark_kernels.py: {error}")
    for n in options.lengths:
        cell = {"b": max(1, options.tokens // n), "n": n}
        todo = [one for one in settings(options.tilings) if not table.has([ALL], setting=str(one), **cell)]
        if todo:
            table.add(measure(options, n, todo))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
