"""What a causal stack remembers between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fairseq_flash.modules.attention import LayerState

__all__ = ["DecodingState"]


class DecodingState(NamedTuple):
    """State of a causal stack after some tokens: of constant size, but for quadratic attention.

    Attributes:
        layers: One state a layer; every tensor is batch first.
    """

    layers: tuple[LayerState, ...]

    @property
    def position(self) -> torch.Tensor:
        """Valid tokens so far in each row, ``(b,)``."""
        return self.layers[0].position

    def reorder(self, order: torch.Tensor) -> DecodingState:
        """Picks rows, for beam search and shrinking batches.

        Args:
            order: Indices of the rows to keep, in their new order, ``(b',)``; may repeat and leave out.

        Returns:
            A new state that shares no memory with this one.
        """
        return DecodingState(tuple(layer.reorder(order) for layer in self.layers))

    def start_anew(self, rows: torch.Tensor) -> DecodingState:
        """Sets some rows back to before their first token.

        Args:
            rows: True for the rows to set back, ``(b,)``.

        Returns:
            A new state that shares no memory with this one.

        Raises:
            ValueError: the layers remember a source as well, which a new row would not share.
        """
        return DecodingState(tuple(layer.start_anew(rows) for layer in self.layers))

    def detach(self) -> DecodingState:
        """The same numbers outside of any graph."""
        return DecodingState(tuple(layer.map(torch.Tensor.detach) for layer in self.layers))
