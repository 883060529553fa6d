"""What a causal stack remembers between calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch

from fairseq_flash.modules.attention import LayerState
from fairseq_flash.modules.checks import check_instance, check_tensor, require

__all__ = ["DecodingState", "check_layer_state", "check_state"]

#: Beyond, rotary angles would be of no position.
POSITIONS = 2**33
FORMAT, OLD_FORMAT = "fairseq_flash decoding state 2", "fairseq_flash decoding state 1"


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

    def save(self, path: Union[str, Path], **beside: Any) -> None:
        """Writes the state, tensors and no code; a kill leaves the old file.

        Args:
            path: The file.
            beside: Plain numbers and strings that belong to it, such as a digest of the weights.
        """
        path = Path(path)
        new = path.with_name(path.name + ".new")
        layers = [dict(_fields(layer.map(lambda x: x.detach().cpu()))) for layer in self.layers]
        torch.save({"format": FORMAT, "layers": layers, "beside": beside}, new)
        os.replace(new, path)

    @classmethod
    def load(cls, path: Union[str, Path], like: DecodingState) -> tuple[DecodingState, dict[str, Any]]:
        """Reads a state that was saved; runs no code from the file.

        Args:
            path: The file.
            like: An empty state of the stack that goes on, which tells kinds, sizes, dtypes and device.

        Returns:
            The state, and what was saved beside it.

        Raises:
            ValueError: the file is missing, something else, or does not fit the stack.
        """
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist; allowed: a file that a decoding state was saved to")
        try:
            content = torch.load(path, map_location=like.position.device, weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise ValueError(f"{path} cannot be read as a decoding state: {error}") from None
        beside = content.get("beside") if isinstance(content, dict) else None
        if beside is not None and content.get("format") == FORMAT:
            stored = content["layers"]
        elif isinstance(content, dict) and content.get("format") == OLD_FORMAT:
            stored, beside = content["layers"], {name: content[name] for name in ("model", "pending")}
        else:
            raise ValueError(f"{path} holds something else; allowed: {FORMAT!r} or {OLD_FORMAT!r}")
        if len(stored) != len(like.layers):
            raise ValueError(f"{path} holds {len(stored)} layers; allowed: {len(like.layers)}, as the stack")
        pairs = enumerate(zip(like.layers, stored, strict=True))
        state = cls(tuple(_filled(f"{path}, layer {index}", *pair) for index, pair in pairs))
        try:
            check_state(state, like, state.position)
            _check_finite(state)
        except ValueError as error:
            raise ValueError(f"{path} does not fit this stack: {error}") from None
        return state, beside


def check_state(state: DecodingState, expected: DecodingState, like: torch.Tensor) -> None:
    """Refuses a state that another stack made, or that belongs to other rows.

    Args:
        state: What came in.
        expected: An empty state of the stack; an axis of no length may have any.
        like: The tokens that continue it, ``(b, n)``.

    Raises:
        ValueError: number or kind of layers, sizes, dtypes or device differ, or on a CPU a position is
            out of range or not that of the other layers.
    """
    check_instance("state", state, DecodingState)
    check_instance("state.layers", state.layers, tuple)
    if len(state.layers) != len(expected.layers):
        raise ValueError(
            f"state has {len(state.layers)} layers; allowed: {len(expected.layers)}, as the stack"
        )
    for index, (found, wanted) in enumerate(zip(state.layers, expected.layers, strict=True)):
        _check_layer(f"state, layer {index}", found, wanted, like)
    _check_positions([layer.position for layer in state.layers])


def check_layer_state(state: LayerState, expected: LayerState, like: torch.Tensor) -> None:
    """As :func:`check_state`, of one layer.

    Raises:
        ValueError: the state does not fit.
    """
    _check_layer("state", state, expected, like)
    _check_positions([state.position])


def _fields(layer: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and integers by name, also of a state within a state."""
    for name, x in layer._asdict().items():
        if isinstance(x, tuple):
            yield from _fields(x, f"{prefix}{name}.")
        elif x is not None:
            yield prefix + name, x


def _filled(where: str, layer: Any, stored: dict[str, Any]) -> Any:
    """A state like ``layer`` with the fields that were ``stored``."""
    wanted = dict(_fields(layer))
    if stored.keys() != wanted.keys():
        raise ValueError(f"{where} has {', '.join(stored)}; allowed: {', '.join(wanted)}")

    def filled(layer: Any, prefix: str) -> Any:
        held = {name: x for name, x in layer._asdict().items() if x is not None}
        for name, x in held.items():
            nested = isinstance(x, tuple)
            held[name] = filled(x, f"{prefix}{name}.") if nested else stored[prefix + name]
        return layer._replace(**held)

    return filled(layer, "")


def _check_layer(where: str, found: Any, wanted: Any, like: torch.Tensor) -> None:
    """Refuses another kind of state, or one with other fields; lengths that are free agree within it."""
    check_instance(where, found, type(wanted))
    if any((x is None) != (y is None) for x, y in zip(found, wanted, strict=True)):
        shown = (", ".join(name for name, _ in _fields(state)) for state in (found, wanted))
        raise ValueError("{} has {}; allowed: {}".format(where, *shown))
    free = None
    for (name, expected), x in zip(wanted._asdict().items(), found, strict=True):
        if isinstance(expected, tuple):
            _check_layer(f"{where}: {name}", x, expected, like)
        elif isinstance(expected, torch.Tensor):
            shape = [like.shape[0], *(size or free for size in expected.shape[1:])]
            check_tensor(f"{where}: {name}", x, shape, [expected.dtype], like.device)
            if 0 in expected.shape[1:]:
                free = x.shape[1]
        elif expected is not None and (type(x) is not int or not 0 <= x <= free):
            raise ValueError(f"{where}: {name} is {x!r}; allowed: integers from 0 to {free}")


def _check_positions(positions: list[torch.Tensor]) -> None:
    if not positions[0].is_cpu or not positions[0].numel():
        return
    stacked = torch.stack(positions)
    lowest, highest = stacked.aminmax()
    require(lowest >= 0, "state has a negative position; allowed: 0 or more")
    require(highest < POSITIONS, f"state has a position out of range; allowed: below {POSITIONS}")
    if len(positions) > 1:
        same = (stacked == stacked[0]).all()
        require(same, "state has layers at different positions; allowed: all at the same")


def _check_finite(state: DecodingState) -> None:
    for index, layer in enumerate(state.layers):
        for name, x in _fields(layer):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"state, layer {index}: {name} has NaN or infinity; allowed: finite numbers")
