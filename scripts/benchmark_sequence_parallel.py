"""Measures a training step of rows that several processes share, against one process at as long a part.

    torchrun --standalone --nproc-per-node 2 scripts/benchmark_sequence_parallel.py --lengths 131072 1048576
    torchrun --standalone --nproc-per-node 2 scripts/benchmark_sequence_parallel.py --quick

Each process has a GPU, or with --device cpu works on the CPU. A step is the forward and the backward pass of
the loss over one row of n tokens, without optimizer and dropout, by a model of random weights. Layers are
computed again in the backward pass (--keep-activations keeps them), and so are the logits, in pieces. The row
is timed over all R processes, and n / R tokens in the first process alone: ``ratio`` is the time a token of a
process of the former over the latter, 1 if sharing cost nothing.

Before anything is timed, a row of a small model over all processes must give the loss and the gradients of
one process; ``error`` is the largest difference, relative to the largest number of each. ``peak_memory`` is
what a step adds to the memory of the process with the most, in bytes.
"""

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Optional

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from bench.clock import Memory, clock, summary
from bench.models import build, language_models
from fairseq_flash.modules import part_of_rows
from runs.command_line import command_line, require
from runs.provenance import ROOT, provenance
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "sequence_parallel.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "parameters", "backend", "ranks", "pass", "dtype"),
    *("threads", "activations", "b", "n", "d", "e", "s", "c", "median_ms", "spread_ms", "tokens_per_s"),
    *("ratio", "peak_memory", "error", "repeats", "status"),
)
KEY = ("device", "torch", "ranks", "pass", "dtype", "threads", "activations", "b", "n")
SHOWN = ("name", "ranks", "n", "median_ms", "tokens_per_s", "ratio", "peak_memory", "error", "status")
STEP = "forward and backward"
#: Of the small model that is checked first: sizes that the kernels take.
SMALL = ("--embed-dim", "128", "--layers", "3", "--attention-dim", "64", "--chunk-size", "64")
#: Relative, in float32; measured: 7e-7 on a CPU.
TOLERANCE = 1e-3
#: Tokens whose logits there are at a time.
PIECE = 8192

Group = Optional[distributed.ProcessGroup]


class Shared:
    """A language model of random weights, the same in all processes, that takes steps over shared rows.

    Args:
        words: The model's options.
        options: The command line.
        dtype: Of the weights.
    """

    def __init__(self, words: list[str], options: argparse.Namespace, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        words = [*words, "--dropout", "0", "--share-decoder-input-output-embed"]
        self.model = build(words, options.vocabulary).to(options.device, dtype).train()
        self.block, self.vocabulary = self.model.decoder.stack.blocks[0], options.vocabulary
        self.device = options.device

    def tokens(self, n: int) -> torch.Tensor:
        """A row and the token behind it, the same in all processes: ``(1, n + 1)``."""
        torch.manual_seed(2)
        return torch.randint(4, self.vocabulary, (1, n + 1)).to(self.device)

    def step(self, tokens: torch.Tensor, group: Group) -> torch.Tensor:
        """A pass forward and backward; returns the sum of this process's losses in nats."""
        self.model.zero_grad(set_to_none=True)
        inputs, targets, padding_mask = tokens[:, :-1], tokens[:, 1:], None
        if group is not None:
            targets, padding_mask = part_of_rows(targets, None, self.block.chunk_size, group)
            inputs, _ = part_of_rows(inputs, None, self.block.chunk_size, group)
            pad = self.model.decoder.padding_idx
            inputs, targets = (x.masked_fill(padding_mask, pad) for x in (inputs, targets))
        features, _ = self.model.decoder(inputs, features_only=True, group=group)
        pieces = zip(features.split(PIECE, dim=1), targets.split(PIECE, dim=1), strict=True)
        loss = sum(checkpoint(self._loss, *piece, use_reentrant=False) for piece in pieces)
        loss.backward()
        return loss.detach()

    def _loss(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.decoder.output_layer(features).flatten(0, 1).float()
        pad = self.model.decoder.padding_idx
        return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=pad, reduction="sum")


def check(options: argparse.Namespace, group: distributed.ProcessGroup) -> float:
    """The largest relative difference of a small model's loss and gradients over all processes and in one.

    Raises:
        RuntimeError: it is beyond rounding.
    """
    small = Shared(["--arch", options.arch, *SMALL], options, torch.float32)
    tokens = small.tokens(64 * 2 * group.size() + 7)
    found = []
    for shares in (None, group):
        loss = small.step(tokens, shares)
        sums = [loss, *(parameter.grad for parameter in small.model.parameters())]
        for x in sums if shares else ():
            distributed.all_reduce(x, group=shares)
        found.append([x.clone() for x in sums])
    pairs = zip(*found, strict=True)
    error = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)
    if not error <= TOLERANCE:
        raise RuntimeError(f"shared rows give other losses or gradients, by {error:.1e} of the largest")
    return error


def measure(shared: Shared, n: int, group: Group, options: argparse.Namespace) -> dict:
    """What a row says of a step over ``n`` tokens, by this process alone or by all of a group."""
    memory, tokens, times = Memory(options.device), shared.tokens(n), []
    try:
        with memory.limited():
            loss = shared.step(tokens, group)
            if not loss.isfinite():
                return {"status": f"the loss is {float(loss)}"}
            peak = memory.peak_of(lambda: shared.step(tokens, group)) or 0
            for _ in range(options.rounds):
                if group is not None:
                    distributed.barrier(group)
                begin = clock(options.device)
                shared.step(tokens, group)
                times.append(clock(options.device) - begin)
    except MemoryError:
        return {"status": "out of memory"}
    if group is not None:
        slowest = torch.tensor([*times, peak], dtype=torch.float64, device=options.device)
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX, group)
        *times, peak = slowest.tolist()
    found = summary(times)
    return {**found, "tokens_per_s": f"{1000 * n / float(found['median_ms']):.4g}", "peak_memory": int(peak)}


def compare(
    shared: Shared, n: int, group: distributed.ProcessGroup, options: argparse.Namespace
) -> list[dict]:
    """Rows of ``n`` tokens over all processes, and of as many as each has in the first one alone."""
    ranks = group.size()
    alone = measure(shared, n // ranks, None, options) if group.rank() == 0 else {}
    shared.model.zero_grad(set_to_none=True)
    distributed.barrier(group)
    together = measure(shared, n, group, options)
    if "median_ms" in alone and "median_ms" in together:
        together["ratio"] = f"{float(together['median_ms']) / float(alone['median_ms']):.3f}"
    return [{"ranks": 1, "n": n // ranks, **alone}, {"ranks": ranks, "n": n, **together}]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_sequence_parallel.py")
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--arch", default="flash_lm_gpt", help="a language model of this package (flash_lm_gpt)")
    add("--lengths", nargs="+", type=int, default=[2**17, 2**20], metavar="N", help="(131072 1048576)")
    add("--keep-activations", action="store_true", help="do not compute the layers again")
    add("--vocabulary", type=int, default=32768, help="(32768)")
    add("--rounds", type=int, default=5, help="steps that are timed (5)")
    add("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32")
    add("--output", type=Path, help="(scripts/results/sequence_parallel.csv)")
    add("--quick", action="store_true", help="a small model and row, into a temporary file")
    if "--quick" in arguments:
        parser.set_defaults(lengths=[1024], rounds=2, vocabulary=500)
    options = parser.parse_args(arguments)
    allowed = [name for name in language_models() if name.startswith("flash") and "quad" not in name]
    if options.arch not in allowed:
        parser.error(f"--arch {options.arch} cannot share rows, or is unknown; allowed: {', '.join(allowed)}")
    require(parser, options, 1, "lengths", "rounds")
    if "RANK" not in os.environ:
        parser.error("there is one process; allowed: torchrun --standalone --nproc-per-node N " + sys.argv[0])
    ranks = int(os.environ["WORLD_SIZE"])
    for n in options.lengths:
        if n % ranks:
            parser.error(
                f"--lengths {n} is not allowed with {ranks} processes; allowed: multiples of {ranks}"
            )
    quick = Path(tempfile.gettempdir()) / "sequence_parallel_quick.csv"
    options.output = options.output or (quick if options.quick else RESULTS)
    return options


def measure_all(options: argparse.Namespace, group: distributed.ProcessGroup) -> None:
    """Checks, then adds a row for each length that the table has not."""
    words = ["--arch", options.arch, *(SMALL if options.quick else ())]
    shared_words = words if options.keep_activations else [*words, "--checkpoint-activations"]
    shared = Shared(shared_words, options, getattr(torch, options.dtype))
    block, error = shared.block, check(options, group)
    common = {
        **provenance(options.device, options.dtype),
        **{"threads": torch.get_num_threads(), "pass": STEP, "b": 1, "error": f"{error:.1e}"},
        "activations": "kept" if options.keep_activations else "computed again",
        "parameters": sum(parameter.numel() for parameter in shared.model.parameters()),
        **{"backend": block.backend, "d": block.embed_dim, "e": getattr(block, "expanded_dim", "")},
        **{"s": block.attention_dim, "c": block.chunk_size},
    }
    # The first process writes; the others measure what it says.
    first = group.rank() == 0
    try:
        table = Table(options.output, COLUMNS, KEY, SHOWN, common) if first else None
    except ValueError as problem:
        sys.exit(f"benchmark_sequence_parallel.py: {problem}")
    for n in options.lengths:
        cell = {"ranks": group.size(), "n": n}
        done = [table is not None and table.has([options.arch], **cell)]
        distributed.broadcast_object_list(done, group=group)
        if not done[0]:
            rows = compare(shared, n, group, options)
            if table is not None:
                table.add([{"name": options.arch, **row} for row in rows])


def main(arguments: list[str]) -> None:
    """Runs the command line, as one of torchrun's processes."""
    options = parse(arguments)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    measure_all(options, distributed.group.WORLD)
    if distributed.get_rank() == 0:
        print(f"written to {options.output}")
    distributed.destroy_process_group()
    # gloo's threads end with the last mention of the group. One that lets go of a tensor while Python ends
    # takes the process with it, by SIGABRT.
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
