"""Measures generation at any position: time per token, size of the state, peak memory, and the prompt pass.

    python scripts/benchmark_generation.py                   everything; a second run goes on where one ended
    python scripts/benchmark_generation.py --quick           a minute, small models, to see that it works
    python scripts/benchmark_generation.py --positions 256 4096 --batches 4 --beams 1

A step is what fairseq's SequenceGenerator does for each token: the decoder with its incremental state, the
log-probabilities, and the reordering of the state, which it asks for with and without beams. With beams, each
step continues other hypotheses than the step before. All systems take turns in one process, with random
weights of their default sizes. Nobody steps to position 65536: a flash_lm reads random tokens in its prompt
pass, and a transformer_lm, whose cost depends only on their number, gets random keys and values. Before
anything is timed, each system must give the same token by token as in parallel.

``peak_memory`` is what building the state and two steps add to the memory of the process, in bytes. What
does not fit is a row with status "out of memory"; on a CPU that is decided beforehand, as the kernel would
end the process. Rows of one position, batch and beam are written together, and not measured again.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
)
from fairseq.sequence_generator import EnsembleModel
from measuring import ROOT, Memory, Table, clock, commit, device_name, summary

import fairseq_flash  # noqa: F401

RESULTS = ROOT / "scripts" / "results" / "generation.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "parameters", "backend", "pass", "dtype", "threads", "b"),
    *("beam", "n", "d", "e", "s", "c", "median_ms", "spread_ms", "tokens_per_s", "state_bytes"),
    *("peak_memory", "repeats", "status"),
)
KEY = ("device", "torch", "pass", "dtype", "threads", "b", "beam", "n")
SHOWN = ("name", "pass", "b", "beam", "n", "median_ms", "spread_ms", "state_bytes", "peak_memory", "status")
PIECE = 4096  # tokens of a prompt that are read at a time
TOLERANCE = 1e-3  # of the largest logit, in float32; measured: 2e-6


class Contender:
    """A model of random weights, with an incremental state that can start at any position.

    Args:
        name: A registered architecture.
        vocabulary: Number of words.
        device: Where it runs.
        dtype: Of its weights.
        overrides: Options that differ from the architecture's, as far as the model has them.

    Raises:
        ValueError: there is no such language model.
    """

    def __init__(self, name: str, vocabulary: int, device: str, dtype: torch.dtype, overrides: dict) -> None:
        known = sorted(
            n for n in ARCH_MODEL_REGISTRY if n.startswith(("flash_lm", "transformer_")) and "_lm" in n
        )
        if name not in known:
            raise ValueError(f"--systems {name} is unknown; allowed: {', '.join(known)}")
        words = Dictionary()
        for word in range(vocabulary - len(words)):
            words.add_symbol(str(word))
        task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
        torch.manual_seed(1)
        self.name, self.cfg = name, _config(name, overrides)
        self.model = ARCH_MODEL_REGISTRY[name].build_model(self.cfg, task).to(device, dtype).eval()
        self.ensemble = EnsembleModel([self.model])
        self.vocabulary, self.device, self.dtype = len(words), device, dtype
        self._read: tuple[int, Any] = (0, None)

    @property
    def has_state(self) -> bool:
        """Whether a prompt can be read at once."""
        return hasattr(self.model.decoder, "continue_from")

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Random words."""
        return torch.randint(4, self.vocabulary, (rows, length), device=self.device)

    def start(self, position: int, rows: int) -> tuple[dict, torch.Tensor]:
        """An incremental state before the token at ``position``, and the tokens that fairseq would pass."""
        incremental: dict = {}
        if self.has_state:
            if self._read[0] != position:
                self._read = position, self.read(self.tokens(1, position))
            order = torch.zeros(rows, dtype=torch.long, device=self.device)
            self.model.decoder.continue_from(incremental, self._read[1].reorder(order))
            return incremental, self.tokens(rows, 1)
        for layer in self.model.decoder.layers:
            attention = layer.self_attn
            shape = (rows, attention.num_heads, position, attention.head_dim)
            pair = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            saved = dict(zip(("prev_key", "prev_value"), pair, strict=True))
            attention._set_input_buffer(incremental, {**saved, "prev_key_padding_mask": None})
        return incremental, self.tokens(rows, position + 1)

    def read(self, tokens: torch.Tensor) -> Any:
        """The state that a prompt pass leaves behind."""
        stack = self.model.decoder.stack
        state = stack.empty_state(tokens)
        for piece in tokens.split(PIECE, dim=1):
            _, state = stack(piece, None, state)
        return state

    def step(self, incremental: dict, tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """One token for every row, as fairseq's generator makes it; returns the tokens with it."""
        if incremental:
            self.ensemble.reorder_incremental_state([incremental], order)
        log_probs, _ = self.ensemble.forward_decoder(tokens, None, [incremental])
        return torch.cat((tokens, log_probs.argmax(dim=-1, keepdim=True)), dim=1)

    def state_bytes(self, position: int, rows: int) -> int:
        """What the state takes, reckoned from a state of one row (and for growing ones, of one token)."""
        incremental, _ = self.start(position if self.has_state else 1, 1)
        tokens = 1 if self.has_state else position
        return rows * tokens * sum(x.nbytes for x in _tensors(incremental))

    def check(self) -> None:
        """Refuses a model whose tokens depend on how they are computed.

        Raises:
            RuntimeError: they do.
        """
        tokens = self.tokens(2, 24 if not self.has_state else 300)
        expected = self.model(tokens)[0].float()
        incremental: dict = {}
        begin = 0
        if self.has_state:
            begin = 280
            self.model.decoder.continue_from(incremental, self.read(tokens[:, :begin]))
        found = [
            self.model.decoder(tokens[:, begin : end + 1], incremental_state=incremental)[0][:, -1].float()
            for end in range(begin, tokens.shape[1])
        ]
        error = (torch.stack(found, dim=1) - expected[:, begin:]).abs().max() / expected.abs().max()
        allowed = TOLERANCE if self.dtype == torch.float32 else 5e-2
        if not error <= allowed:
            raise RuntimeError(f"{self.name}: token by token differs from parallel by {float(error):.1e}")


def _config(name: str, overrides: dict) -> Any:
    """The architecture's options, as far as the model has them."""
    preset = argparse.Namespace()
    if name in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[name](preset)
    cfg = MODEL_DATACLASS_REGISTRY[ARCH_MODEL_NAME_REGISTRY.get(name, name)]()
    for option, value in {**vars(preset), **overrides}.items():
        if hasattr(cfg, option):
            setattr(cfg, option, value)
    return cfg


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def describe(contender: Contender) -> dict:
    """What a row says about the model."""
    cfg = contender.cfg
    d = getattr(cfg, "embed_dim", None) or getattr(cfg, "decoder_embed_dim", "")
    own = hasattr(cfg, "expansion_factor")
    return {
        "name": contender.name,
        "parameters": sum(p.numel() for p in contender.model.parameters()),
        "backend": getattr(cfg, "backend", ""),
        "d": d,
        "e": cfg.expansion_factor * d if own else "",
        "s": getattr(cfg, "attention_dim", ""),
        "c": getattr(cfg, "chunk_size", ""),
    }


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
    """Rows for generation at position ``n``."""
    rows, found, fitting = b * beam, [], []
    for contender in contenders:
        row = {**describe(contender), "pass": "step", "b": b, "beam": beam, "n": n}
        row["state_bytes"] = contender.state_bytes(n, rows)
        found.append(row)

        def work(contender: Contender = contender) -> None:
            incremental, tokens = contender.start(n, rows)
            for order in orders(rows, beam, 2, contender.device):
                tokens = contender.step(incremental, tokens, order)

        try:
            # The state and, while it is extended or reordered, the copy of one layer or of all of it.
            if memory.available() < 2.5 * row["state_bytes"]:
                raise MemoryError
            row["peak_memory"] = memory.peak_of(work)
            fitting.append((contender, row, []))
        except (MemoryError, torch.OutOfMemoryError):
            row["status"] = "out of memory"
    for _, (contender, _, times) in product(range(options.rounds), fitting):
        times += time_steps(contender, rows, beam, n, options.steps)
    for _, row, times in fitting:
        row.update(rated(times, rows // beam))
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


def measure_prompts(contenders: list[Contender], n: int, options: Any) -> list[dict]:
    """Rows for a prompt of ``n`` tokens: at once, as a forward pass without a state, and token by token."""
    runs = []
    for contender in contenders:
        tokens = contender.tokens(1, n)
        ways = {}
        if contender.has_state:
            ways["prompt at once"] = lambda c=contender, t=tokens: c.read(t)
            ways["forward pass"] = lambda c=contender, t=tokens: c.model(t, features_only=True)
        if n <= options.longest_stepped:
            ways["prompt token by token"] = lambda c=contender, t=tokens: step_through(c, t)
        for name, work in ways.items():
            rounds = 1 if name == "prompt token by token" else options.rounds
            runs.append(({**describe(contender), "pass": name, "b": 1, "beam": 1, "n": n}, work, rounds, []))
    for turn in range(options.rounds):
        for row, work, rounds, times in runs:
            if turn < rounds:
                begin = clock(options.device)
                work()
                times.append(clock(options.device) - begin)
            row.update(rated(times, n))
    return [row for row, *_ in runs]


def step_through(contender: Contender, tokens: torch.Tensor) -> None:
    """Feeds a prompt as fairseq's generator does."""
    incremental: dict = {}
    order = torch.zeros(1, dtype=torch.long, device=contender.device)
    for end in range(1, tokens.shape[1] + 1):
        contender.step(incremental, tokens[:, :end], order)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    about, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--systems", nargs="+", default=["flash_lm", "transformer_lm"], metavar="ARCH")
    add("--positions", nargs="*", type=int, default=[256, 1024, 4096, 16384, 65536], metavar="N")
    add("--batches", nargs="+", type=int, default=[1, 16], metavar="B")
    add("--beams", nargs="+", type=int, default=[1, 4], metavar="K")
    add("--prompts", nargs="*", type=int, default=[1024, 4096, 16384], metavar="N", help="lengths")
    add("--longest-stepped", type=int, default=4096, metavar="N", help="longest prompt fed token by token")
    add("--rounds", type=int, default=5, help="turns that each system takes (5)")
    add("--steps", type=int, default=8, help="steps in a turn (8)")
    add("--vocabulary", type=int, default=8000, help="words (8000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
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
    return options


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    dtype = getattr(torch, options.dtype)
    try:
        contenders = [
            Contender(name, options.vocabulary, options.device, dtype, options.overrides)
            for name in options.systems
        ]
    except ValueError as error:
        sys.exit(f"benchmark_generation.py: {error}")
    for contender in contenders:
        contender.check()
    common = {
        "commit": commit(),
        "date": date.today().isoformat(),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }
    try:
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    except ValueError as error:
        sys.exit(f"benchmark_generation.py: {error}")
    memory = Memory(options.device)
    for n, b, beam in product(options.positions, options.batches, options.beams):
        if not table.has(options.systems, **{"pass": "step", "b": b, "beam": beam, "n": n}):
            table.add(measure_steps(contenders, memory, b, beam, n, options))
    for n in options.prompts:
        able = [contender.name for contender in contenders if contender.has_state]
        if not table.has(able, **{"pass": "prompt at once", "b": 1, "beam": 1, "n": n}):
            table.add(measure_prompts(contenders, n, options))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
