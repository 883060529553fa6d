"""What mixed chunk attention is given."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

__all__ = ["Carry", "Inputs", "Options", "Pair", "check_options"]


class Pair(NamedTuple):
    """Queries and keys of a branch, each ``(b, n, s)``, rotated, not scaled."""

    q: torch.Tensor
    k: torch.Tensor


class Inputs(NamedTuple):
    """Tensors of one call.

    Attributes:
        quad: Of the quadratic branch; None for GlobalOnly.
        lin: Of the linear branch; None for LocalOnly.
        v: Values, ``(b, n, e)``; anything finite at padding.
        bias: Relative position bias, ``(c, c)``, or its leading corner ``(n, n)`` for a shorter row that
            starts here; None without a quadratic branch, and for softmax attention.
        lengths: Valid tokens of each row, ``(b,)``, all padding trails; None for ``n``.
    """

    quad: Optional[Pair]
    lin: Optional[Pair]
    v: torch.Tensor
    bias: Optional[torch.Tensor] = None
    lengths: Optional[torch.Tensor] = None


class Options(NamedTuple):
    """What is fixed when a layer is built.

    Attributes:
        chunk_size: ``c``, at least 1; what scores are divided by, however short the row.
        causal: Whether a token sees only tokens before it.
        linear_norm: ``"chunk"`` divides the linear branch by ``c``, ``"mean"`` by the tokens summed;
            ``"fading"``, causal alone, is a mean in which earlier chunks weigh less and less, in each group
            of values at another pace: :func:`~fairseq_flash.ops.kept_of_chunks`.
        softmax: Whether the quadratic branch is causal softmax attention (MC-TFM++).
        dropout: Of the normalised scores of softmax attention, 0 to below 1.
        branches: ``"quad"``, ``"lin"`` or both, in this order.
    """

    chunk_size: int
    causal: bool
    linear_norm: str = "mean"
    softmax: bool = False
    dropout: float = 0.0
    branches: tuple[str, ...] = ("quad", "lin")

    def chunk_of(self, n: int) -> int:
        """Tokens of a chunk of rows of ``n``: the last one is no longer than they are.

        A trace is for rows of any length, whatever that of its example, and so takes whole chunks. Compared,
        not ``min``: a compiler then has a graph for either, whose chunks are numbers to it.
        """
        return self.chunk_size if torch.jit.is_tracing() or n >= self.chunk_size else max(1, n)


def check_options(options: Options) -> None:
    """Refuses a fading mean of all chunks, which has no direction to fade in.

    Raises:
        ValueError: so it is.
    """
    if options.linear_norm == "fading" and not options.causal:
        raise ValueError("linear_norm='fading' with causal=False is not allowed; allowed: causal=True")


class Carry(NamedTuple):
    """What lies outside of the tensors of a call, for their linear branch.

    Attributes:
        kv_sum: Sum of ``k_lin^T v``, ``(b, s, e)``, float32 or wider; fading, with the last chunk whole.
        count: Tokens that were summed, ``(b,)``; fading, those of whole chunks.
    """

    kv_sum: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # a tuple has a method of that name
