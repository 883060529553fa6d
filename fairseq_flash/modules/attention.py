"""Kinds of attention: frozen, without parameters, chosen once when a layer is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import nn

from fairseq_flash.modules.alignment import Rows
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.ops import (
    ChunkState,
    Inputs,
    KeyValueCache,
    Options,
    Pair,
    Projected,
    gated_mixed_chunk,
    gated_mixed_chunk_piece,
    gated_mixed_chunk_step,
    mixed_chunk_attention,
    mixed_chunk_step,
    quadratic_attention,
    softmax_attention,
)

__all__ = ["ATTENTIONS", "LayerState", "MixedChunk", "Quadratic", "Softmax", "is_step"]

#: Attention kinds, each with the branches it computes.
ATTENTIONS = {"mixed_chunk": ("quad", "lin"), "quadratic": ("quad",), "local": ("quad",), "global": ("lin",)}

LayerState = Union[ChunkState, KeyValueCache]
Attended = tuple[torch.Tensor, Optional[LayerState]]


@dataclass(frozen=True)
class MixedChunk:
    """Attention inside chunks and across them; of several heads, each is a row of its own.

    Attributes:
        options: Of the op.
        backend: Of :func:`~fairseq_flash.ops.gated_mixed_chunk`.
        gated: Whether whole rows go through that op, from pre-activations to the gated output.
    """

    options: Options
    backend: str = "auto"
    gated: bool = False

    def empty_state(self, like: torch.Tensor, attention_dim: int, expanded_dim: int) -> ChunkState:
        """A state before the first token, for rows ``like`` ``(b, ...)``."""
        options = self.options
        return ChunkState.empty(like, options.chunk_size, attention_dim, expanded_dim, options.branches)

    def denominator(self, rows: Rows) -> float:
        """What the scores of the quadratic branch are divided by."""
        return float(self.options.chunk_size)

    def whole(
        self,
        uvz: torch.Tensor,
        offset_scale: OffsetScale,
        bias: Optional[nn.Module],
        rows: Rows,
        state: Optional[ChunkState] = None,
        keys: Optional[torch.Tensor] = None,
    ) -> Attended:
        """Gated attention of rows that begin a chunk, from pre-activations ``(b, n, 2e + s)``: ``(b, n, e)``.

        ``state`` is None where the rows start here; if not, nothing is padded. ``keys`` are the base of the
        keys, ``(b, n, s)``, if another than that of the queries.
        """
        matrix = None if bias is None else bias.matrix(self.options.chunk_of(uvz.shape[1]))
        copies = offset_scale.gamma, offset_scale.beta
        projected = Projected(uvz, *copies, rows.cos, rows.sin, matrix, rows.lengths, keys)
        if state is not None:
            return gated_mixed_chunk_piece(projected, self.options, state, backend=self.backend)
        return gated_mixed_chunk(projected, self.options, group=rows.group, backend=self.backend), None

    def step(
        self,
        uvz: torch.Tensor,
        offset_scale: OffsetScale,
        bias: Optional[nn.Module],
        rows: Rows,
        state: ChunkState,
        keys: Optional[torch.Tensor] = None,
    ) -> Attended:
        """As :meth:`whole`, of one token a row that continues ``state``, which is overwritten."""
        by_distance = None if bias is None else bias.by_distance(self.options.chunk_size)
        copies = offset_scale.gamma, offset_scale.beta
        projected = Projected(uvz, *copies, rows.cos, rows.sin, by_distance, keys=keys)
        return gated_mixed_chunk_step(projected, self.options, state, backend=self.backend)

    def __call__(
        self,
        pairs: tuple[Optional[Pair], Optional[Pair]],
        v: torch.Tensor,
        bias: Optional[nn.Module],
        rows: Rows,
        state: Optional[ChunkState],
        training: bool,
    ) -> Attended:
        """Attends.

        Args:
            pairs: Queries and keys of the quadratic and the linear branch, ``(b, n, s)``, or of several heads
                ``(b, heads, n, r)``; None for a branch that there is not.
            v: Values, ``(b, n, e)`` or ``(b, heads, n, r)``.
            bias: The relative bias of the quadratic branch; None without.
            rows: The geometry.
            state: What came before; None at the start of rows.
            training: Whether dropout applies, and the state must survive a second pass.

        Returns:
            As ``v``, and the state after it.
        """
        heads = v.shape[1] if v.dim() == 4 else None
        quad, lin = pairs
        inputs = Inputs(quad, lin, v, None, rows.lengths)
        if heads is not None:
            inputs, state = _folded(inputs, heads), state and state.fold()
        if is_step(inputs.v, rows, state, training):
            out, state = mixed_chunk_step(inputs, self.options, state)
        else:
            c, n = self.options.chunk_size, inputs.v.shape[1]
            if bias is not None:
                c = self.options.chunk_of(n) if state is None else c
                inputs = inputs._replace(bias=bias.matrix(c))
            options = self.options if training else self.options._replace(dropout=0.0)
            out, state = mixed_chunk_attention(inputs, options, state=state, group=rows.group)
        if heads is not None:
            out, state = out.unflatten(0, (-1, heads)), state and state.unfold(heads)
        return out, state


def is_step(x: torch.Tensor, rows: Rows, state: Optional[LayerState], training: bool) -> bool:
    """Whether one token a row, ``(b, 1, .)``, goes on, in place.

    Activation checkpointing needs the state again for the backward pass.
    """
    return state is not None and x.shape[1] == 1 and rows.lengths is None and not training


def _folded(inputs: Inputs, heads: int) -> Inputs:
    """From (b, heads, n, r) to (b heads, n, r)."""
    quad, lin = (pair and Pair(*(x.flatten(0, 1) for x in pair)) for pair in inputs[:2])
    lengths = inputs.lengths
    if lengths is not None:
        lengths = lengths.repeat_interleave(heads)
    return Inputs(quad, lin, inputs.v.flatten(0, 1), None, lengths)


@dataclass(frozen=True)
class Quadratic:
    """Squared-ReLU attention over the whole row (FLASH-Quad).

    Attributes:
        causal: Whether a token sees only tokens before it.
        n_ref: Length that causal scores are divided by; bidirectional ones by the valid tokens of the row.
    """

    causal: bool
    n_ref: int

    gated = False

    def empty_state(self, like: torch.Tensor, attention_dim: int, expanded_dim: int) -> KeyValueCache:
        """A state before the first token, for rows ``like`` ``(b, ...)``."""
        return KeyValueCache.empty(like, attention_dim, expanded_dim)

    def denominator(self, rows: Rows) -> Union[float, torch.Tensor]:
        """What scores are divided by: a number, or one for each row ``(b,)``."""
        if self.causal:
            return float(self.n_ref)
        if rows.lengths is None:
            # As a tensor, so that a mask that is empty changes no bit.
            return torch.full((1,), rows.positions.shape[-1], device=rows.positions.device)
        return rows.lengths.clamp(min=1)

    def __call__(
        self,
        pairs: tuple[Pair, None],
        v: torch.Tensor,
        bias: nn.Module,
        rows: Rows,
        state: Optional[KeyValueCache],
        training: bool,
    ) -> Attended:
        """As :meth:`MixedChunk.__call__`, of one head."""
        (q, k), causal = pairs[0], self.causal
        if state is not None and not causal:
            raise ValueError("state is given to a bidirectional layer; allowed: causal=True")
        if state is not None:
            state = state.after(k, v, rows.positions, rows.lengths)
            k, v, key_positions = state.used()
            if bias.limit is not None and k.shape[1] > bias.limit:
                # Columns count padding too; only the rows themselves must fit the table.
                bias.check_lengths(state.position)
            matrix, causal = bias(rows.positions, key_positions), False
            matrix = matrix.masked_fill(~state.visible(rows.positions), -torch.inf).unsqueeze(1)
        else:
            if rows.padding_mask is not None:
                v = v.masked_fill(rows.padding_mask.unsqueeze(-1), 0)
            if torch.compiler.is_compiling() and bias.limit is None:
                # Windows of a vector would be compiled anew for each length.
                matrix = bias(rows.positions, rows.positions)
            else:
                matrix = bias.matrix(v.shape[1], rows.lengths)
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        out = quadratic_attention(q, k, v, matrix, causal=causal, denominator=self.denominator(rows))
        return out.squeeze(1), state


@dataclass(frozen=True)
class Softmax:
    """Causal softmax attention over the whole past, of several heads.

    Attributes:
        dropout: Of the normalised scores.
    """

    dropout: float = 0.0

    def empty_state(self, like: torch.Tensor, attention_dim: int, expanded_dim: int) -> KeyValueCache:
        """A state before the first token, for rows ``like`` ``(b, ...)``; widths are those of all heads."""
        return KeyValueCache.empty(like, attention_dim, expanded_dim)

    def __call__(
        self,
        pairs: tuple[Pair, None],
        v: torch.Tensor,
        bias: None,
        rows: Rows,
        state: Optional[KeyValueCache],
        training: bool,
    ) -> Attended:
        """As :meth:`MixedChunk.__call__`, of several heads."""
        (q, k), heads, visible = pairs[0], v.shape[1], None
        if state is not None:
            begins = state.columns == 0
            positions = rows.positions.expand(v.shape[0], v.shape[2])
            state = state.after(*(x.transpose(1, 2).flatten(2) for x in (k, v)), positions, rows.lengths)
            if not begins:
                k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in state.used()[:2])
                visible = state.visible(positions).unsqueeze(1)
        dropout = self.dropout if training else 0.0
        return softmax_attention(q, k, v, visible, dropout=dropout), state
