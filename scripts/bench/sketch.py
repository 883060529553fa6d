"""A model of shapes without numbers: what it costs, and from which length on it costs less than another."""

import functools
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.models import build, bytes_of
from fairseq_flash.modules import GatedAttentionUnit

__all__ = ["LONGEST", "Activations", "NoNumbers", "Sketch", "crossover", "transformers"]

#: No crossover is looked for beyond.
LONGEST = 1 << 24


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
