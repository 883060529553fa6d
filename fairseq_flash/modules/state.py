"""What a causal stack remembers between calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Optional, Union

import torch

from fairseq_flash.ops import NEVER, ChunkState, QuadraticState

__all__ = ["DecodingState", "LayerState", "RowMemory"]

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
        return self._map(lambda x: x.index_select(0, order))

    def start_anew(self, rows: torch.Tensor) -> DecodingState:
        """Sets some rows back to before their first token.

        Args:
            rows: True for the rows to set back, ``(b,)``.

        Returns:
            A new state that shares no memory with this one.

        Raises:
            ValueError: the layers remember a source as well, which a new row would not share.
        """
        return DecodingState(tuple(_start_anew(layer, rows) for layer in self.layers))

    def detach(self) -> DecodingState:
        """The same numbers outside of any graph."""
        return self._map(torch.Tensor.detach)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> DecodingState:
        return DecodingState(tuple(_map_layer(function, layer) for layer in self.layers))


class RowMemory:
    """Carries states from batch to batch, for rows that continue rows of the batch before.

    Rows are known by what they continue, so that nothing depends on their place in the batch: a row whose
    name is not among those that the batch before announced starts anew. States are detached: gradients end
    where the batch begins (truncated backpropagation), and only one batch is remembered.
    """

    def __init__(self) -> None:
        self._states: dict = {}
        self._names: Sequence[Hashable] = ()
        self._next_names: Sequence[Hashable] = ()

    def announce(self, names: Sequence[Hashable], next_names: Sequence[Hashable]) -> None:
        """Names the rows of the next batch, and the rows that may continue them in the batch after it."""
        self._names, self._next_names = names, next_names

    def recall(self, stack: torch.nn.Module, like: torch.Tensor) -> DecodingState:
        """The state before the rows of this batch, on the device of ``like`` ``(b, ...)``."""
        known, state = self._states.pop(stack, ((), None))
        places = {name: row for row, name in enumerate(known)}
        found: list[Optional[int]] = [places.get(name) for name in self._names]
        if state is None or not any(place is not None for place in found):
            return stack.empty_state(like)
        order = torch.tensor([place or 0 for place in found], device=like.device)
        state = state.reorder(order)
        if None not in found:
            return state
        return state.start_anew(torch.tensor([place is None for place in found], device=like.device))

    def remember(self, stack: torch.nn.Module, state: DecodingState) -> None:
        """Keeps the state after the rows of this batch."""
        self._states[stack] = self._next_names, state.detach()


def _map_layer(function: Callable[[torch.Tensor], torch.Tensor], layer: LayerState) -> LayerState:
    """Applies ``function`` to every tensor, also inside a state that holds another."""

    def applied(x):
        return function(x) if isinstance(x, torch.Tensor) else _map_layer(function, x)

    return type(layer)(*(applied(x) if isinstance(x, (torch.Tensor, tuple)) else x for x in layer))


def _start_anew(layer: LayerState, rows: torch.Tensor) -> LayerState:
    if not isinstance(layer, (ChunkState, QuadraticState)):
        raise ValueError(
            f"a {type(layer).__name__} cannot start anew: it belongs to a source; allowed: layers without"
        )

    def only_others(x: torch.Tensor, value: int = 0) -> torch.Tensor:
        return x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), value)

    new = _map_layer(only_others, layer)
    if isinstance(layer, QuadraticState):
        new = new._replace(key_positions=only_others(layer.key_positions, NEVER))
    return new
