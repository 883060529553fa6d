"""A layer of a decoder: a unit that attends to the row so far, then one that attends to the source."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import nn

from fairseq_flash.modules.gated_attention_unit import GatedAttentionUnit
from fairseq_flash.modules.gated_cross_attention import GatedCrossAttention, SourceMemory
from fairseq_flash.modules.rows import Rows, align_rows, restore_rows
from fairseq_flash.modules.state import LayerState

__all__ = ["DecoderLayer", "DecoderLayerState"]


class DecoderLayerState(NamedTuple):
    """What a layer remembers of each row, and of its source.

    Attributes:
        own: State of the unit that attends to the row.
        source: Keys and values of the source, which no step changes.
    """

    own: LayerState
    source: SourceMemory

    @property
    def position(self) -> torch.Tensor:
        """Valid tokens so far in each row, ``(b,)``."""
        return self.own.position


class DecoderLayer(nn.Module):
    """Self-attention, then cross-attention: called as a unit is, with a source beside the row.

    Args:
        self_attention: Causal, of the row.
        cross_attention: Of the source, with the same ``d``.
    """

    def __init__(self, self_attention: GatedAttentionUnit, cross_attention: GatedCrossAttention) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention

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
        """
        own = self.self_attention.empty_state(like)
        return DecoderLayerState(own, self.cross_attention.read(source, source_padding_mask))

    def forward(
        self,
        x: torch.Tensor,
        padding_mask: Optional[torch.Tensor] = None,
        state: Optional[DecoderLayerState] = None,
        *,
        rows: Optional[Rows] = None,
        source: Optional[torch.Tensor] = None,
        source_padding_mask: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, Optional[DecoderLayerState]]:
        """Applies the layer.

        Args:
            x: ``(b, n, d)``; anything, even NaN, at padding.
            padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding.
            state: What came before, with the source, from :meth:`empty_state` or an earlier call; None for
                whole rows. Outside of autograd its tensors may be overwritten: use only what comes back.
            rows: Geometry of rows that a stack has aligned already, in place of ``padding_mask``.
            source: ``(b, m, d)``, in place of a state; anything, even NaN, at padding.
            source_padding_mask: ``(b, m)``, True at padding; None without padding.

        Returns:
            ``(b, n, d)``, zero at padding (anything there if ``rows`` was given), and the state after each
            row's last real token, None if none came in.

        Raises:
            ValueError: neither or both of ``source`` and ``state`` are given, padding in the middle of a
                row, or a row beyond the table of a Toeplitz bias.
        """
        if (source is None) == (state is None):
            raise ValueError("source and state: allowed is one of them, as a state holds its source")
        aligned = rows is not None
        if not aligned:
            start = None if state is None else state.position
            x, rows = align_rows(x, padding_mask, start, self.self_attention.attention_dim, x.dtype)
        own = None if state is None else state.own
        x, own = self.self_attention(x, state=own, rows=rows)
        memory = self.cross_attention.read(source, source_padding_mask) if state is None else state.source
        x = self.cross_attention(x, memory)
        if not aligned:
            x = restore_rows(x, rows)
        return x, None if state is None else DecoderLayerState(own, memory)
