"""A decoding step recorded as a CUDA graph: a state of constant size makes every step the same work."""

from __future__ import annotations

import weakref
from typing import Any, Optional

import torch
from torch import nn

from fairseq_flash.modules.attention import LayerState
from fairseq_flash.modules.graphs import Graphs
from fairseq_flash.modules.state import DecodingState
from fairseq_flash.ops import ChunkState

__all__ = ["StepGraphs"]

#: Steps of a number of rows before it is recorded: a recording takes as long as some ten steps.
PATIENCE = 4


class StepGraphs(Graphs):
    """The steps of a stack, recorded once for each number of rows and replayed.

    Rows are rounded up to a power of two, so that a batch that shrinks needs few recordings. A recording
    works on tensors of its own, into which a state is copied when it comes from elsewhere, and serves one
    generation at a time: while a state that it has returned is in use, another one records anew.
    """

    def __init__(self) -> None:
        self._recordings: dict[Any, list[_Recording]] = {}
        self._seen: dict[Any, int] = {}

    @staticmethod
    def objections(stack: nn.Module, tokens: torch.Tensor, state: DecodingState) -> list[str]:
        """Why a step cannot be recorded; nothing if it can."""
        found = Graphs.objections_to(tokens)
        if not all(isinstance(layer, ChunkState) for layer in state.layers):
            found.append("a state grows with the position, or holds a source")
        if stack.training or torch.is_grad_enabled():
            found.append("the stack trains, or gradients are enabled")
        return found

    def __call__(
        self, stack: nn.Module, tokens: torch.Tensor, state: DecodingState
    ) -> tuple[torch.Tensor, DecodingState]:
        """As the stack, of one token a row.

        Args:
            stack: Always the same, whose layers have a :class:`~fairseq_flash.ops.ChunkState`.
            tokens: ``(b, 1)``, without padding.
            state: What came before; must not be used again.

        Returns:
            ``(b, 1, d)``, overwritten by the next step, and the state after the token.
        """
        rows = 1 << (tokens.shape[0] - 1).bit_length()
        key = (rows, tokens.device, state.layers[0].v.dtype)
        recordings = self._recordings.setdefault(key, [])
        for recording in recordings:
            if recording.holds(state):
                return recording.step(tokens, state)
        weights = tuple(weight.data_ptr() for weight in stack.parameters())
        # Weights that have moved would be read where they were.
        recordings[:] = [recording for recording in recordings if recording.weights == weights]
        for recording in recordings:
            if recording.is_free():
                return recording.step(tokens, state)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= PATIENCE:
            return stack(tokens, None, state)
        recordings.append(_Recording(stack, rows, tokens.device, state, weights))
        return recordings[-1].step(tokens, state)


class _Recording:
    """One graph with its tensors."""

    def __init__(
        self, stack: nn.Module, rows: int, device: torch.device, like: DecodingState, weights: tuple
    ) -> None:
        self.weights = weights
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.state = DecodingState(
            tuple(layer.map(lambda x: x.new_zeros(rows, *x.shape[1:])) for layer in like.layers)
        )
        self._views: dict[int, tuple[LayerState, ...]] = {}
        self._owner: Optional[weakref.ref] = None
        # What is made once, such as tables and compiled kernels, is made before the recording.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance(stack)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream is on the device that was first recorded on.
        with torch.cuda.graph(self.graph, stream=side):
            self.features = self._advance(stack)

    def _advance(self, stack: nn.Module) -> torch.Tensor:
        features, after = stack(self.tokens, None, self.state)
        for ours, new in zip(_tensors(self.state), _tensors(after), strict=True):
            if ours is not new:
                ours.copy_(new)
        return features

    def holds(self, state: DecodingState) -> bool:
        """Whether ``state`` is what the last step has returned."""
        return self._owner is not None and self._owner() is state.layers[0].position

    def is_free(self) -> bool:
        """Whether nobody has the state any more that the last step has returned."""
        return self._owner is None or self._owner() is None

    def step(self, tokens: torch.Tensor, state: DecodingState) -> tuple[torch.Tensor, DecodingState]:
        """Replays the graph."""
        b = tokens.shape[0]
        if b not in self._views:
            self._views[b] = tuple(layer.map(lambda x: x[:b]) for layer in self.state.layers)
        first, *others = self._views[b]
        if not self.holds(state):
            torch._foreach_copy_(_tensors(DecodingState(self._views[b])), _tensors(state))
        self.tokens[:b].copy_(tokens)
        self.graph.replay()
        # One tensor that nobody else has tells whether the state is still in use.
        after = DecodingState((first._replace(position=first.position.view_as(first.position)), *others))
        self._owner = weakref.ref(after.layers[0].position)
        return self.features[:b], after


def _tensors(state: DecodingState) -> list[torch.Tensor]:
    return [x for layer in state.layers for x in layer if isinstance(x, torch.Tensor)]
