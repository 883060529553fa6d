"""States that go on from batch to batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Optional

import torch

from fairseq_flash.modules.state import DecodingState

__all__ = ["RowMemory"]


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
