"""A layer of a decoder: a unit that attends to the row so far, then one that attends to the source."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch

from fairseq_flash.modules.alignment import Rows
from fairseq_flash.modules.attention import LayerState
from fairseq_flash.modules.checks import check_instance
from fairseq_flash.modules.gated_attention_unit import GatedAttentionUnit
from fairseq_flash.modules.gated_cross_attention import GatedCrossAttention, SourceMemory
from fairseq_flash.modules.layer import Layer
from fairseq_flash.ops.shown import shown

__all__ = ["DecoderLayer", "DecoderLayerState"]


class DecoderLayerState(NamedTuple):
    """What a layer remembers of each row, and of its source.

    Attributes:
        own: State of the unit that attends to the row.
        source: Keys and values of the source, which no step changes.
    """

    own: LayerState
    source: SourceMemory

    def __repr__(self) -> str:
        return shown(self)

    @property
    def position(self) -> torch.Tensor:
        """Valid tokens so far in each row, ``(b,)``."""
        return self.own.position

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> DecoderLayerState:
        """Applies ``function`` to every tensor."""
        return DecoderLayerState(self.own.map(function), SourceMemory(*map(function, self.source)))

    def reorder(self, order: torch.Tensor) -> DecoderLayerState:
        """Picks rows ``order`` ``(b',)``; shares no memory with this state."""
        return self.map(lambda x: x.index_select(0, order))

    def start_anew(self, rows: torch.Tensor) -> DecoderLayerState:
        """Refused: a new row would have another source.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a DecoderLayerState cannot start anew: it belongs to a source; allowed: layers without"
        )


class DecoderLayer(Layer):
    """Self-attention, then cross-attention: called as a unit is, with a source beside the row.

    Args:
        self_attention: Causal, of the row.
        cross_attention: Of the source, with the same ``d``.

    Raises:
        ValueError: one is something else.
    """

    reads_source = True

    def __init__(self, self_attention: GatedAttentionUnit, cross_attention: GatedCrossAttention) -> None:
        super().__init__()
        check_instance("self_attention", self_attention, GatedAttentionUnit)
        check_instance("cross_attention", cross_attention, GatedCrossAttention)
        if not self_attention.causal:
            raise ValueError("self_attention is bidirectional; allowed: causal=True")
        if cross_attention.embed_dim != self_attention.embed_dim:
            raise ValueError(
                f"cross_attention has embed_dim={cross_attention.embed_dim}; allowed: "
                f"{self_attention.embed_dim}, as self_attention"
            )
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.embed_dim, self.attention_dim = self_attention.embed_dim, self_attention.attention_dim

    def empty_state(
        self, like: torch.Tensor, source: torch.Tensor, source_padding_mask: Optional[torch.Tensor] = None
    ) -> DecoderLayerState:
        """A state before the first token, for rows ``like`` ``(b, ...)``; reads the source, once and for all.

        Args:
            like: Tells dtype and device.
            source: ``(b, m, d)``; anything, even NaN, at padding.
            source_padding_mask: ``(b, m)``, True at padding; None without padding.

        Returns:
            The state.

        Raises:
            ValueError: the source does not fit the layer, or has another number of rows.
        """
        memory = self.cross_attention.read(source, source_padding_mask)
        if source.shape[0] != like.shape[0]:
            raise ValueError(f"source has {source.shape[0]} rows; allowed: {like.shape[0]}, as like")
        return DecoderLayerState(self.self_attention.empty_state(like), memory)

    def describe_state(self, like: torch.Tensor) -> DecoderLayerState:
        """As :meth:`Layer.describe_state`, with a source of no tokens."""
        b, cross = like.shape[0], self.cross_attention
        k, v = (like.new_empty(b, 0, width) for width in (cross.attention_dim, cross.expanded_dim))
        valid = like.new_empty(b, dtype=torch.long)
        return DecoderLayerState(self.self_attention.empty_state(like), SourceMemory(k, v, valid))

    def aligned(
        self,
        x: torch.Tensor,
        rows: Rows,
        state: Optional[DecoderLayerState],
        *,
        source: Optional[torch.Tensor] = None,
        source_padding_mask: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, Optional[DecoderLayerState]]:
        """The layer itself, on rows whose padding trails.

        Args:
            x: ``(b, n, d)``, finite.
            rows: Their geometry.
            state: What came before, with the source; None for whole rows.
            source: ``(b, m, d)``, in place of a state; anything, even NaN, at padding.
            source_padding_mask: ``(b, m)``, True at padding; None without padding.

        Returns:
            As :meth:`Layer.aligned`.

        Raises:
            ValueError: neither or both of ``source`` and ``state`` are given.
        """
        if (source is None) == (state is None):
            raise ValueError("source and state: allowed is one of them, as a state holds its source")
        if state is None:
            x, _ = self.self_attention(x, rows=rows)
            return self.cross_attention(x, self.cross_attention.read(source, source_padding_mask)), None
        x, own = self.self_attention(x, state=state.own, rows=rows)
        return self.cross_attention(x, state.source), DecoderLayerState(own, state.source)
