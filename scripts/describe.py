"""Prints what a model costs before anyone pays for it: size, work, memory, and when it beats a Transformer.

    python scripts/describe.py --arch flash_lm --tokens-per-sample 4096 [any option of the model]
    python scripts/describe.py --arch transformer_lm_gpt --tokens-per-sample 4096

Nothing is computed: the real model runs on tensors that have a shape and no numbers, and PyTorch reports the
products it asks for and the tensors it keeps, so that the largest model takes seconds and no memory. Where
PyTorch chooses between implementations (attention, dropout), it is the choice for a CPU.

Multiply-adds are those of matrix products, two floating point operations each; all other work is small
beside them, but takes time: where training steps of both were measured, the crossover in time stands there
too. "Skipping the future" is what a perfect kernel of quadratic attention would do, which computes the scores
on and below the diagonal alone; mixed chunk attention is counted as its reference computes it. The crossover
is the shortest row, in whole chunks, from which on a token costs at most what it costs in a Transformer of
the same width, depth (two gated attention units for a layer) and, but for rounding, number of parameters.
Activations are what the forward pass keeps for the backward pass, each memory block once.
"""

import argparse
import functools
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.models import build, bytes_of, language_models
from fairseq_flash.modules import GatedAttentionUnit
from runs.command_line import command_line, require
from runs.provenance import ROOT
from runs.systems import SIZES
from runs.table import read

#: No crossover is looked for beyond.
LONGEST = 1 << 24
#: Training steps, as benchmark_training.py measured them.
MEASURED = ROOT / "scripts" / "results" / "training.csv"


class NoNumbers(TorchFunctionMode):
    """Answers what models ask about numbers, of tensors that have none: there is no padding."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Stands in for PyTorch's function."""
        if function is torch.Tensor.__bool__:
            return False
        if function is torch._shape_as_tensor:
            return tuple(args[0].shape)
        return function(*args, **(kwargs or {}))


class Activations(NamedTuple):
    """Bytes a token that the forward pass keeps."""

    layers: float
    output: float


class Sketch:
    """A language model of shapes without numbers.

    Args:
        words: Options as fairseq-train takes them, with ``--arch``.
        vocabulary: Words of the dictionary, with fairseq's four own.
        dtype: Of the weights.
        batch: Rows of what is measured; work that rows share is divided by it.

    Raises:
        ValueError: an option has a value that is not allowed, or the model an adaptive input or softmax.
    """

    def __init__(self, words: list[str], vocabulary: int, dtype: torch.dtype, batch: int) -> None:
        self._fake = FakeTensorMode()
        usual = torch.get_default_dtype()
        try:
            # Not converted afterwards: PyTorch cannot exchange a fake weight that two modules share.
            torch.set_default_dtype(dtype)
            with self._fake:
                self.model = self._counted_model = build(words, vocabulary)
                if hasattr(self.model.decoder, "stack"):
                    # As defined: a fast path works chunk by chunk, and the longest rows have many.
                    self._counted_model = build(["--backend", "reference", *words], vocabulary)
        finally:
            torch.set_default_dtype(usual)
        self.name, self.batch = words[words.index("--arch") + 1], batch
        decoder = self.model.decoder
        self.stack = getattr(decoder, "stack", None)
        self.embedding = decoder.embed_tokens if self.stack is None else self.stack.embed_tokens
        if not isinstance(self.embedding, nn.Embedding) or decoder.adaptive_softmax is not None:
            raise ValueError(
                f"--arch {self.name} with adaptive input or softmax cannot be described: its cost depends on "
                "the words; allowed: one embedding and one softmax"
            )
        block = None if self.stack is None else self.stack.blocks[0]
        self.is_quadratic = block is None or block.attention == "quadratic"
        self.is_transformer = not isinstance(block, GatedAttentionUnit) and self.is_quadratic
        self.chunk_size = 1 if self.is_quadratic else block.chunk_size
        #: Tokens that a table of relative positions ends at; None without one.
        bias = getattr(block, "bias", None) if self.is_quadratic else None
        self.longest = getattr(bias, "limit", None)
        self._counted = functools.cache(self._count)

    def parameters(self) -> tuple[int, int]:
        """Number of parameters in the embeddings (input and output, once if shared) and in the rest."""
        ends = [self.embedding, self.model.decoder.output_projection]
        ends = {parameter for end in ends for parameter in end.parameters()}
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        embedding = sum(parameter.numel() for parameter in ends)
        return embedding, whole - embedding

    def multiply_adds(self, n: int, *, skip_future: bool) -> float:
        """Multiply-adds of a forward pass over rows of ``n``, a token.

        Args:
            n: Tokens a row.
            skip_future: Whether quadratic attention leaves out what lies above the diagonal.

        Raises:
            ValueError: the rows end before, at a table.
        """
        if self.longest is not None and n > self.longest:
            raise ValueError(
                f"n={n} is beyond the table of relative positions; allowed: {self.longest} or less"
            )
        whole = self._counted(n)
        if not (self.is_quadratic and skip_future) or n == 1:
            return whole
        # Exact: beyond what each token costs alone, a row of n costs n * n of the same.
        growth = (whole - self._counted(n // 2)) / (n - n // 2)
        return whole - growth * (n - 1) / 2

    def activations(self, n: int) -> Activations:
        """What is kept in the layers, and in the output with its loss."""
        own = {x.untyped_storage()._cdata for x in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage()._cdata not in own:
                kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        self.model.train()
        with self._fake, NoNumbers(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
            tokens = self._tokens(self.batch, n)
            features, _ = self.model.decoder.extract_features(tokens, None)
            layers = sum(storage.nbytes() for storage in kept.values())
            logits = self.model.decoder.output_layer(features)
            log_probs = self.model.get_normalized_probs((logits, None), log_probs=True)
            nn.functional.nll_loss(log_probs.flatten(0, 1), tokens.flatten())
            whole = sum(storage.nbytes() for storage in kept.values())
        return Activations(layers / (self.batch * n), (whole - layers) / (self.batch * n))

    @torch.no_grad()
    def state_bytes(self, n: int) -> int:
        """What generation keeps of one row after ``n`` tokens."""
        self.model.eval()
        incremental: dict = {}
        with self._fake, NoNumbers():
            tokens = self._tokens(1, n)
            if self.stack is not None:
                self.model.decoder(tokens, incremental_state=incremental)
                return bytes_of(incremental)
            # fairseq's decoder takes a token at a time, and its state grows by the same with each.
            sizes = []
            for end in (1, 2):
                self.model.decoder(tokens[:, :1].expand(1, end), incremental_state=incremental)
                sizes.append(bytes_of(incremental))
        return sizes[0] + (n - 1) * (sizes[1] - sizes[0])

    def _tokens(self, b: int, n: int) -> torch.Tensor:
        return torch.zeros(b, n, dtype=torch.long)

    @torch.no_grad()
    def _count(self, n: int) -> float:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        formulas = {fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
        self._counted_model.eval()
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with self._fake, NoNumbers(), counter:
            self._counted_model(self._tokens(self.batch, n))
        return counter.get_total_flops() / 2 / (self.batch * n)


def transformers(sketch: Sketch) -> dict[str, list[str]]:
    """The Transformers that a model of ours is compared with: their options, by name."""
    block, depth = sketch.stack.blocks[0], len(sketch.stack.blocks)
    d = block.out.out_features
    layers = max(1, depth // 2) if isinstance(block, GatedAttentionUnit) else depth
    heads = next(heads for heads in range(max(1, d // 64), 0, -1) if d % (2 * heads) == 0)
    # A layer has four square matrices, the feed-forward network of two matrices or three, and vectors.
    rest = sketch.parameters()[1] / layers - 4 * d * d - 9 * d
    ffn, gated = (max(1, round(rest / (count * d + count - 1))) for count in (2, 3))
    sizes = ("embed-dim", d), ("input-dim", d), ("output-dim", d), ("ffn-embed-dim", ffn)
    sizes = (*sizes, ("layers", layers), ("attention-heads", heads))
    theirs = [str(word) for name, size in sizes for word in (f"--decoder-{name}", size)]
    sizes = ("embed-dim", d), ("ffn-embed-dim", gated), ("layers", layers), ("attention-dim", d // heads)
    ours = [str(word) for name, size in sizes for word in (f"--{name}", size)]
    tied = sketch.model.decoder.output_projection.weight is sketch.embedding.weight
    shared = ["--share-decoder-input-output-embed"] if tied else []
    return {
        "transformer_pp_lm": ["--arch", "transformer_pp_lm", *ours, *shared],
        "transformer_lm": ["--arch", "transformer_lm", *theirs, *shared],
    }


def crossover(sketch: Sketch, other: Sketch, *, skip_future: bool) -> Optional[int]:
    """The shortest row, in whole chunks, from which on ``sketch`` costs at most what ``other`` costs.

    Args:
        sketch: A model.
        other: One of quadratic attention.
        skip_future: As for :meth:`Sketch.multiply_adds`.

    Returns:
        Tokens; None if there is none up to ``LONGEST``.

    Raises:
        ValueError: the rows of ``sketch`` end before, at a table.
    """
    step = max(2, sketch.chunk_size)

    def wins(chunks: int) -> bool:
        costs = [each.multiply_adds(chunks * step, skip_future=skip_future) for each in (sketch, other)]
        return costs[0] <= costs[1]

    low, high = 0, LONGEST // step
    if not wins(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high * step


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
    for row in read(MEASURED):
        if row["status"] == "ok" and row["size"] == size and row["name"] in names:
            setting = f"{row['device']}, {row['dtype']}, {row['threads']} threads"
            times = steps.setdefault(setting, ({}, {}))[names[row["name"]]]
            times[int(row["n"])] = float(row["median_ms"])
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


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line: our options, and fairseq's."""
    parser = command_line(__doc__, "describe.py", allow_abbrev=False)
    parser.add_argument("--arch", required=True, help="a language model")
    parser.add_argument("--tokens-per-sample", type=int, required=True, metavar="N", help="tokens a row")
    parser.add_argument("--vocabulary", type=int, default=8000, help="words of the dictionary (8000)")
    parser.add_argument("--batch", type=int, default=8, help="rows; what they share is divided by it (8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    own, words = parser.parse_known_args(arguments)
    if own.arch not in language_models():
        parser.error(f"--arch {own.arch} is unknown; allowed: {', '.join(language_models())}")
    require(parser, own, 1, "tokens_per_sample", "batch")
    require(parser, own, 5, "vocabulary")
    return own, ["--arch", own.arch, "--tokens-per-sample", str(own.tokens_per_sample), *words]


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    own, words = parse(arguments)
    logging.getLogger("hydra").setLevel(logging.INFO)
    print(
        f"{own.arch}, {own.tokens_per_sample} tokens per sample, {own.batch} rows, {own.vocabulary} words, "
        f"{own.dtype}"
    )
    try:
        sketch = Sketch(words, own.vocabulary, getattr(torch, own.dtype), own.batch)
        for line in report(sketch, own.tokens_per_sample):
            print(line, flush=True)
    except (ValueError, AssertionError) as error:  # the second is how fairseq refuses an option
        sys.exit(f"describe.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
