"""What a causal stack remembers between calls."""

from __future__ import annotations

from typing import NamedTuple, Union

import torch

from fairseq_flash.ops import ChunkState, QuadraticState

__all__ = ["DecodingState", "LayerState"]

LayerState = Union[ChunkState, QuadraticState]


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
        return DecodingState(
            tuple(
                type(layer)(*(None if x is None else x.index_select(0, order) for x in layer))
                for layer in self.layers
            )
        )
