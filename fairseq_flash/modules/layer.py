"""What all layers do alike: align their rows, attend, restore them."""

from __future__ import annotations

from typing import Any, Optional, TypedDict

import torch
from torch import distributed, nn

from fairseq_flash.modules.alignment import Rows, align_rows, restore_rows
from fairseq_flash.modules.attention import ATTENTIONS
from fairseq_flash.modules.checks import (
    check_choice,
    check_rates,
    check_shared,
    check_sizes,
    check_vectors,
)
from fairseq_flash.modules.normalization import build_norm
from fairseq_flash.modules.state import check_layer_state
from fairseq_flash.ops import LINEAR_NORMS

__all__ = ["INITS", "AttentionLayer", "Layer", "LayerOptions"]

#: Starts of the weights: all branches and gradients of a like size, or the paper's N(0, 0.02).
INITS = ("fan_in", "paper")


class Layer(nn.Module):
    """A layer on rows of any padding, whole or in pieces.

    Attributes:
        embed_dim: ``d``.
        attention_dim: Width that is rotated, ``s``, or the size of a head where there are several.
    """

    embed_dim: int
    attention_dim: int
    #: Whether it reads a source beside its row.
    reads_source = False

    def describe_state(self, like: torch.Tensor) -> Any:
        """A state before the first token without numbers, for ``like`` ``(b, 0)`` on the meta device.

        Axes whose length is free, such as that of a cache or a source, have length 0.
        """
        return self.empty_state(like)

    def aligned(
        self, x: torch.Tensor, rows: Rows, state: Optional[Any]
    ) -> tuple[torch.Tensor, Optional[Any]]:
        """The layer itself, on rows whose padding trails.

        Args:
            x: ``(b, n, d)``, finite.
            rows: Their geometry.
            state: What came before; None for whole rows.

        Returns:
            ``(b, n, d)``, anything finite at padding, and the state after each row's last real token.
        """
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        padding_mask: Optional[torch.Tensor] = None,
        state: Optional[Any] = None,
        *,
        rows: Optional[Rows] = None,
        group: Optional[distributed.ProcessGroup] = None,
        **source: Optional[torch.Tensor],
    ) -> tuple[torch.Tensor, Optional[Any]]:
        """Applies the layer.

        Args:
            x: ``(b, n, d)``; anything, even NaN, at padding.
            padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding.
            state: What came before, from ``empty_state`` or an earlier call; None for whole rows.
                Outside of autograd its tensors may be overwritten: use only the state that comes back.
            rows: Geometry of rows that a stack has aligned already, in place of mask and group.
            group: The processes that each hold a part of the rows, in their order, as
                :func:`~fairseq_flash.modules.part_of_rows` cuts them: whole chunks, equally many, and
                padding trails the whole row. All call at the same time. None for whole rows.
            source: What the layer reads beside its row, of layers that read a source.

        Returns:
            ``(b, n, d)``, zero at padding (anything there if ``rows`` was given), and the state after each
            row's last real token, None if none came in.

        Raises:
            ValueError: vectors or mask have another shape, dtype or device, padding in the middle of a row,
                a state of another layer or other rows, or of a bidirectional layer, a source for a layer that
                reads none, a row beyond the table of a Toeplitz bias, a group for a layer of quadratic
                attention or with a state, or parts that are not cut so.
        """
        if source and not self.reads_source:
            raise ValueError(
                f"{next(iter(source))} is given to a {type(self).__name__}; allowed: DecoderLayer"
            )
        given = rows
        if rows is None:
            self._check(x, state)
            if group is not None:
                check_shared([self], state, x.shape[1], group)
            start = None if state is None else state.position
            x, rows = align_rows(x, padding_mask, start, self.attention_dim, x.dtype, group)
        if x.shape[1]:
            x, state = self.aligned(x, rows, state, **source)
        return (x if given is not None else restore_rows(x, rows)), state

    def _check(self, x: torch.Tensor, state: Optional[Any]) -> None:
        check_vectors("x", x, (None, None, self.embed_dim), next(self.parameters()))
        if state is not None and not torch.compiler.is_compiling():
            empty = self.describe_state(torch.empty(1, 0, dtype=x.dtype, device="meta"))
            check_layer_state(state, empty, x)


class LayerOptions(TypedDict, total=False):
    """Keyword arguments that all layers with attention to their own row take.

    Attributes:
        chunk_size: ``c``, 256 unless given; unused by ``attention="quadratic"``.
        linear_norm: ``"mean"`` unless given, ``"chunk"`` or ``"fading"``: what the linear branch is divided
            by, and whether it forgets, as :class:`~fairseq_flash.ops.Options`.
        norm: ``"layernorm"`` unless given, ``"scalenorm"`` or ``"rmsnorm"``.
        init: ``"fan_in"`` unless given, under which all branches and gradients start at a like size, or
            ``"paper"``.
        dropout: Of each branch's output, 0 unless given, to below 1.
        backend: Implementation of mixed chunk attention over whole rows; ``"auto"`` unless given, for the
            fastest that can run.
    """

    chunk_size: int
    linear_norm: str
    norm: str
    init: str
    dropout: float
    backend: str


class AttentionLayer(Layer):
    """A layer that attends to its own row: what its kinds are built of, and refuse, alike.

    Args:
        embed_dim: ``d``.
        attention: One of ``ATTENTIONS``.
        attention_dim: ``s``, or the size of a head.
        chunk_size: This and the others: as :class:`LayerOptions`.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    #: One of the strategies of :mod:`~fairseq_flash.modules.attention`.
    attend: Any
    causal: bool

    def __init__(
        self,
        embed_dim: int,
        attention: str,
        attention_dim: int,
        *,
        chunk_size: int = 256,
        linear_norm: str = "mean",
        norm: str = "layernorm",
        init: str = "fan_in",
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        check_choice("linear_norm", linear_norm, LINEAR_NORMS)
        check_choice("init", init, INITS)
        check_sizes(embed_dim=embed_dim, attention_dim=attention_dim, chunk_size=chunk_size)
        check_rates(dropout=dropout)
        self.attention, self.branches, self.linear_norm = attention, ATTENTIONS[attention], linear_norm
        self.embed_dim, self.attention_dim, self.chunk_size = embed_dim, attention_dim, chunk_size
        self.norm_name, self.init, self.backend = norm, init, backend
        self.norm, self.dropout = build_norm(norm, embed_dim), nn.Dropout(dropout)

    def extra_repr(self) -> str:
        """What the layer is, as ``print`` shows it."""
        chunk = "" if self.attention == "quadratic" else f", chunk_size={self.chunk_size}"
        return f"{self.embed_dim}, attention={self.attention!r}{chunk}, causal={self.causal}"
