"""Measures generation at any position: time per token, size of the state, peak memory, and the prompt pass.

    python scripts/benchmark_generation.py                   everything; a second run goes on where one ended
    python scripts/benchmark_generation.py --quick           a minute, small models, to see that it works
    python scripts/benchmark_generation.py --positions 256 4096 --batches 4 --beams 1

A step is what fairseq's SequenceGenerator does for each token: the decoder with its incremental state, the
log-probabilities, and the reordering of the state, which it asks for with and without beams. With beams, each
step continues other hypotheses than the step before. All systems take turns in one process, with random
weights of their default sizes. Nobody steps to position 65536: a flash_lm reads random tokens in its prompt
pass, and a Transformer, whose cost depends only on their number, gets random keys and values. Before anything
is timed, each system must give the same token by token as in parallel.

``peak_memory`` is what building the state and two steps add to the memory of the process, in bytes. What
does not fit is a record with status "out of memory"; on a CPU that is decided beforehand, as the kernel would
end the process. Records of one position, batch and beam are written together, and not measured again; a
system that is new in a file takes turns with the new ones alone, so measure ratios into a new file
(--output).
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.clock import Memory, clock, summary
from bench.contender import Contender, columns_of
from runs.command_line import command_line
from runs.provenance import ROOT, provenance
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "generation.csv"
SYSTEMS = ["flash_lm", "transformer_lm", "transformer_pp_lm"]
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "parameters", "backend", "pass", "dtype", "threads", "b"),
    *("beam", "n", "d", "e", "s", "c", "median_ms", "spread_ms", "tokens_per_s", "state_bytes"),
    *("peak_memory", "repeats", "status"),
)
KEY = ("device", "torch", "pass", "dtype", "threads", "b", "beam", "n")
SHOWN = ("name", "pass", "b", "beam", "n", "median_ms", "spread_ms", "state_bytes", "peak_memory", "status")


def rated(times: list[float], tokens: int) -> dict:
    """The summary of ``times`` in ms for ``tokens`` each, with their rate."""
    found = summary(times)
    return {**found, "tokens_per_s": f"{1000 * tokens / float(found['median_ms']):.4g}"}


def orders(rows: int, beam: int, steps: int, device: str) -> list[torch.Tensor]:
    """Which hypothesis each row continues, step by step: itself without beams, any of its sentence's with."""
    first = torch.arange(rows, device=device) // beam * beam
    return [first + torch.randint(beam, (rows,), device=device) for _ in range(steps)]


def measure_steps(
    contenders: list[Contender], memory: Memory, b: int, beam: int, n: int, options: Any
) -> list:
    """Records for generation at position ``n``."""
    rows, found, fitting = b * beam, [], []
    for contender in contenders:
        record = {**columns_of(contender), "pass": "step", "b": b, "beam": beam, "n": n}
        record["state_bytes"] = contender.state_bytes(n, rows)
        found.append(record)

        def work(contender: Contender = contender) -> None:
            incremental, tokens = contender.start(n, rows)
            for order in orders(rows, beam, 2, contender.device):
                tokens = contender.step(incremental, tokens, order)

        try:
            # The state and, while it is extended or reordered, the copy of one layer or of all of it.
            if memory.available() < 2.5 * record["state_bytes"]:
                raise MemoryError
            record["peak_memory"] = memory.peak_of(work)
            fitting.append((contender, record, []))
        except (MemoryError, torch.OutOfMemoryError):
            record["status"] = "out of memory"
    for _, (contender, _, times) in product(range(options.rounds), fitting):
        times += time_steps(contender, rows, beam, n, options.steps)
    for _, record, times in fitting:
        record.update(rated(times, rows // beam))
    return found


def time_steps(contender: Contender, rows: int, beam: int, n: int, steps: int) -> list[float]:
    """Milliseconds of each of ``steps`` steps, after one that warms up."""
    incremental, tokens = contender.start(n, rows)
    times = []
    for order in orders(rows, beam, steps + 1, contender.device):
        begin = clock(contender.device)
        tokens = contender.step(incremental, tokens, order)
        times.append(clock(contender.device) - begin)
    return times[1:]


def prompt_ways(contender: Contender, n: int, longest_stepped: int) -> dict[str, Callable]:
    """How a prompt of ``n`` tokens is read: at once, as a forward pass without a state, token by token."""
    tokens = contender.tokens(1, n)
    ways: dict[str, Callable] = {}
    if contender.has_state:
        ways["prompt at once"] = lambda: contender.read(tokens)
        ways["forward pass"] = lambda: contender.model(tokens, features_only=True)
    if n <= longest_stepped:
        ways["prompt token by token"] = lambda: step_through(contender, tokens)
    return ways


def measure_prompts(contenders: list[Contender], table: Table, n: int, options: Any) -> list[dict]:
    """Records for a prompt of ``n`` tokens, but for those that ``table`` has."""
    runs = []
    for contender in contenders:
        for name, work in prompt_ways(contender, n, options.longest_stepped).items():
            cell = {"pass": name, "b": 1, "beam": 1, "n": n}
            if not table.has([contender.name], **cell):
                rounds = 1 if name == "prompt token by token" else options.rounds
                runs.append(({**columns_of(contender), **cell}, work, rounds, []))
    for _, work, rounds, _ in runs:
        if rounds > 1:
            work()  # compiles, and fills the memory that is kept
    for turn in range(options.rounds):
        for _, work, rounds, times in runs:
            if turn < rounds:
                begin = clock(options.device)
                work()
                times.append(clock(options.device) - begin)
    for record, _, _, times in runs:
        record.update(rated(times, n))
    return [record for record, *_ in runs]


def step_through(contender: Contender, tokens: torch.Tensor) -> None:
    """Feeds a prompt as fairseq's generator does."""
    incremental: dict = {}
    order = torch.zeros(1, dtype=torch.long, device=contender.device)
    for end in range(1, tokens.shape[1] + 1):
        contender.step(incremental, tokens[:, :end], order)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_generation.py")
    add = parser.add_argument
    add("--systems", nargs="+", default=SYSTEMS, metavar="ARCH")
    add("--positions", nargs="*", type=int, default=[256, 1024, 4096, 16384, 65536], metavar="N")
    add("--batches", nargs="+", type=int, default=[1, 16], metavar="B")
    add("--beams", nargs="+", type=int, default=[1, 4], metavar="K")
    add("--prompts", nargs="*", type=int, default=[1024, 4096, 16384], metavar="N", help="lengths")
    add("--longest-stepped", type=int, default=4096, metavar="N", help="longest prompt fed token by token")
    add("--rounds", type=int, default=5, help="turns that each system takes (5)")
    add("--steps", type=int, default=8, help="steps in a turn (8)")
    add("--vocabulary", type=int, default=8000, help="words (8000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("float32", "bfloat16", "float16", "int8")
    add("--dtype", choices=dtypes, default="float32", help="int8: dense layers' weights alone, by torchao")
    add("--output", type=Path, help="(scripts/results/generation.csv)")
    add("--quick", action="store_true", help="small models and few positions, into a temporary file")
    if "--quick" in arguments:
        fewer = dict(positions=[256, 1024], batches=[1], prompts=[256], rounds=2, steps=3, vocabulary=500)
        parser.set_defaults(**fewer)
    options = parser.parse_args(arguments)
    options.overrides = {"share_decoder_input_output_embed": True}
    if options.quick:
        options.overrides |= {"embed_dim": 64, "layers": 4, "decoder_embed_dim": 64, "decoder_input_dim": 64}
        options.overrides |= {"decoder_output_dim": 64, "decoder_ffn_embed_dim": 256, "decoder_layers": 2}
    # fairseq's Transformer has a maximum, and a table of that many positions.
    longest = max([*options.positions, *options.prompts, 300])
    options.overrides["max_target_positions"] = longest + options.steps + 2
    quick = Path(tempfile.gettempdir()) / "generation_quick.csv"
    options.output = options.output or (quick if options.quick else RESULTS)
    if options.dtype == "int8" and importlib.util.find_spec("torchao") is None:
        parser.error(
            "--dtype int8 needs the package torchao; allowed: pip install torchao, or another --dtype"
        )
    return options


def with_int8_weights(model: nn.Module) -> None:
    """Narrows the weights of dense layers, but for the vocabulary's, in place; they are widened in use."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # only here: it is nobody's dependency

    def narrowed(module: nn.Module, name: str) -> bool:
        # The output's weight is the embedding's.
        return isinstance(module, nn.Linear) and not name.endswith("output_projection")

    quantize_(model, Int8WeightOnlyConfig(), narrowed)


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    wide = "bfloat16" if options.device.startswith("cuda") else "float32"
    dtype = getattr(torch, wide if options.dtype == "int8" else options.dtype)
    common = {**provenance(options.device, options.dtype), "threads": torch.get_num_threads()}
    try:
        contenders = [
            Contender(name, options.vocabulary, options.device, dtype, options.overrides)
            for name in options.systems
        ]
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    except ValueError as error:
        sys.exit(f"benchmark_generation.py: {error}")
    for contender in contenders:
        if options.dtype == "int8":
            with_int8_weights(contender.model)
        contender.check()
    memory = Memory(options.device)
    for n, b, beam in product(options.positions, options.batches, options.beams):
        cell = {"pass": "step", "b": b, "beam": beam, "n": n}
        left = [contender for contender in contenders if not table.has([contender.name], **cell)]
        table.add(measure_steps(left, memory, b, beam, n, options))
    for n in options.prompts:
        table.add(measure_prompts(contenders, table, n, options))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
