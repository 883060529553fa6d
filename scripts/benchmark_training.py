"""Measures a training step at any length: time, tokens a second and peak memory at equal tokens a batch.

    python scripts/benchmark_training.py                     tiny models, 512 to 16384; resumes where it ended
    python scripts/benchmark_training.py --size base --lengths 1024 65536 --tokens 65536
    python scripts/benchmark_training.py --quick             a minute, to see that it works

A step is the forward and the backward pass of the loss over ``--tokens`` tokens, in rows of n (one row where
n is more), without optimizer and dropout. All systems have random weights and take turns in one process,
round by round; ``ratio`` is a system's median time over transformer_lm's in the same rounds. Before anything
is timed, each system must give a finite loss and finite gradients at that length.

``peak_memory`` is what a step adds to the memory of the process, in bytes. What does not fit is a record with
status "out of memory". The records of one length are written together, and not measured again.

FLASH-pytorch (``pip install FLASH-pytorch``; never a dependency) is a peer's model, which takes part where
it is installed: of the same width, depth, chunk and vocabulary, its output tied to its embedding as in the
others, and otherwise with its own defaults.
"""

import argparse
import functools
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.clock import Memory, add_ratios, clock, summary
from bench.models import build
from runs.command_line import command_line, require
from runs.provenance import ROOT, provenance
from runs.systems import BASELINE, SIZES, architecture
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "training.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "size", "parameters", "backend", "pass", "dtype"),
    *("threads", "b", "n", "d", "e", "s", "c", "median_ms", "spread_ms", "tokens_per_s", "ratio"),
    *("peak_memory", "repeats", "status"),
)
KEY = ("size", "device", "torch", "pass", "dtype", "threads", "b", "n")
SHOWN = ("name", "b", "n", "median_ms", "spread_ms", "tokens_per_s", "ratio", "peak_memory", "status")
PEER = "FLASH-pytorch"
SYSTEMS = (BASELINE, "flash_lm", "flash_quad_lm", "transformer_pp_lm", "mc_transformer_pp_lm")
STEP = "forward and backward"
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]


class Contender:
    """A language model of random weights that can take a training step.

    Args:
        system: A system of ``systems.py``, or ``PEER``.
        options: The command line.

    Raises:
        ValueError: there is no such system, or the peer is not installed.
    """

    def __init__(self, system: str, options: argparse.Namespace) -> None:
        torch.manual_seed(1)
        self.name, self.device, self.vocabulary = system, options.device, options.vocabulary
        if system == PEER:
            model, self.sizes = build_peer(options)
            self.log_probs: Callable = lambda tokens: model(tokens).log_softmax(-1, dtype=torch.float32)
        else:
            longest = str(max(options.lengths))
            words = ["--dropout", "0", "--tokens-per-sample", longest]
            model = build([*model_words(system, options), *words], options.vocabulary)
            self.sizes = sizes_of(model)
            self.log_probs = lambda tokens: model.get_normalized_probs(model(tokens), log_probs=True)
        self.model = model.to(options.device, getattr(torch, options.dtype)).train()

    def step(self, tokens: torch.Tensor) -> float:
        """One training step over rows ``(b, n + 1)``; returns the loss in nats per token."""
        self.model.zero_grad(set_to_none=True)
        log_probs = self.log_probs(tokens[:, :-1])
        loss = nn.functional.nll_loss(log_probs.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item()

    def check(self, tokens: torch.Tensor) -> None:
        """Refuses a step whose numbers are not finite.

        Raises:
            FloatingPointError: they are not.
        """
        loss = self.step(tokens)
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not math.isfinite(loss) or not all(grad.isfinite().all() for grad in grads):
            raise FloatingPointError(f"loss {loss}, or a gradient, is not finite")


def model_words(system: str, options: argparse.Namespace) -> list[str]:
    """The model's options; with ``--quick`` those of a small one."""
    words = architecture(system, options.size)
    if not options.quick:
        return words
    sizes: dict = {"embed-dim": 64, "layers": 2, "chunk-size": 64}
    if system == BASELINE:
        sizes = {f"decoder-{name}dim": 64 for name in ("embed-", "ffn-embed-", "input-", "output-")}
        sizes["decoder-layers"] = 2
    return [*words, *(str(word) for name, size in sizes.items() for word in (f"--{name}", size))]


def build_peer(options: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The peer's model, at the sizes of flash_lm; and these sizes, as columns.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("flash_pytorch") is None:
        raise ValueError(f"--systems {PEER} is not installed; allowed: pip install {PEER}, or other systems")
    from flash_pytorch import FLASHTransformer

    like = sizes_of(build(model_words("flash_lm", options), options.vocabulary))
    model = FLASHTransformer(
        num_tokens=options.vocabulary,
        dim=like["d"],
        depth=like["layers"],
        group_size=like["c"],
        query_key_dim=like["s"],
        expansion_factor=like["e"] / like["d"],
        causal=True,
    )
    model.to_logits[-1].weight = model.token_emb.weight
    return model, like


def sizes_of(model: nn.Module) -> dict:
    """What a record says about a model of fairseq's or ours."""
    decoder = model.decoder
    if not hasattr(decoder, "stack"):
        return {"d": decoder.embed_dim, "layers": len(decoder.layers)}
    block = decoder.stack.blocks[0]
    return {
        "backend": block.backend,
        "d": block.out.out_features,
        "e": getattr(block, "expanded_dim", ""),
        "s": block.attention_dim,
        "c": "" if block.attention == "quadratic" else block.chunk_size,
        "layers": len(decoder.stack.blocks),
    }


def describe(contender: Contender) -> dict:
    """The columns that do not change with the length."""
    sizes = {name: value for name, value in contender.sizes.items() if name in COLUMNS}
    parameters = sum(parameter.numel() for parameter in contender.model.parameters())
    return {"name": contender.name, "parameters": parameters, **sizes}


def measure(contenders: list[Contender], memory: Memory, n: int, options: argparse.Namespace) -> list[dict]:
    """Records for ``n`` tokens a row."""
    b = batch_size(n, options)
    found, fitting = [], []
    tokens = torch.randint(4, options.vocabulary, (b, n + 1), device=options.device)
    for contender in contenders:
        record = {**describe(contender), "pass": STEP, "b": b, "n": n}
        found.append(record)
        steps = functools.partial(first_steps, contender, memory, tokens, record)
        record["status"] = memory.attempt(steps)
        if record["status"] == "ok":
            fitting.append((contender, record, []))
        free(contender)
    for _ in range(options.rounds):
        for contender, record, times in fitting:
            if record["status"] == "ok":
                step = functools.partial(timed, contender, tokens)
                record["status"] = memory.attempt(lambda step=step, to=times: to.append(step()))
            free(contender)
    for _, record, times in fitting:
        if record["status"] == "ok":
            record.update(summary(times))
            record["tokens_per_s"] = f"{1000 * b * n / float(record['median_ms']):.4g}"
    add_ratios(found, BASELINE)
    return found


def batch_size(n: int, options: argparse.Namespace) -> int:
    """Rows of ``n`` tokens that make a batch, at least one."""
    return max(1, options.tokens // n)


def first_steps(contender: Contender, memory: Memory, tokens: torch.Tensor, record: dict) -> None:
    """Checks a step, then takes its memory; both warm up what is timed later."""
    contender.check(tokens)
    free(contender)
    if hasattr(contender.model, "decoder") and hasattr(contender.model.decoder, "_future_mask"):
        # fairseq's Transformer keeps its square mask from step to step; it is memory all the same.
        contender.model.decoder._future_mask = torch.empty(0)
    record["peak_memory"] = memory.peak_of(lambda: contender.step(tokens))


def timed(contender: Contender, tokens: torch.Tensor) -> float:
    """Milliseconds of one step."""
    begin = clock(contender.device)
    contender.step(tokens)
    return clock(contender.device) - begin


def free(contender: Contender) -> None:
    """Gives back what a step has left."""
    contender.model.zero_grad(set_to_none=True)
    if contender.device.startswith("cuda"):
        torch.cuda.empty_cache()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_training.py")
    add = parser.add_argument
    add("--systems", nargs="+", metavar="NAME", help=f"({' '.join(SYSTEMS)} and, if installed, {PEER})")
    add("--size", choices=SIZES, default="tiny", help="of the models (tiny)")
    add("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N", help="(512 to 16384)")
    add("--tokens", type=int, default=16384, help="of a batch (16384)")
    add("--rounds", type=int, default=5, help="steps of each system that are timed (5)")
    add("--vocabulary", type=int, default=8000, help="words (8000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--output", type=Path, help="(scripts/results/training.csv)")
    add("--quick", action="store_true", help="small models and few lengths, into a temporary file")
    if "--quick" in arguments:
        parser.set_defaults(lengths=[256, 512], tokens=512, rounds=2, vocabulary=500)
    options = parser.parse_args(arguments)
    require(parser, options, 1, "tokens", "rounds", "lengths")
    require(parser, options, 5, "vocabulary")
    installed = importlib.util.find_spec("flash_pytorch") is not None
    options.systems = options.systems or [*SYSTEMS, *([PEER] if installed else [])]
    quick = Path(tempfile.gettempdir()) / "training_quick.csv"
    options.output = options.output or (quick if options.quick else RESULTS)
    return options


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    common = {**provenance(options.device, options.dtype), "size": options.size}
    common["threads"] = torch.get_num_threads()
    try:
        contenders = [Contender(system, options) for system in options.systems]
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    except ValueError as error:
        sys.exit(f"benchmark_training.py: {error}")
    memory = Memory(options.device)
    for n in options.lengths:
        if not table.has(options.systems, **{"pass": STEP, "b": batch_size(n, options), "n": n}):
            table.add(measure(contenders, memory, n, options))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
