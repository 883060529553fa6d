"""What a causal stack remembers between calls."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch

from fairseq_flash.modules.attention import LayerState
from fairseq_flash.modules.checks import check_instance, check_tensor, require
from fairseq_flash.ops import NEVER
from fairseq_flash.ops.shown import shown

__all__ = ["DecodingState", "check_layer_state", "check_state"]

FORMAT, OLD_FORMAT = "fairseq_flash decoding state 2", "fairseq_flash decoding state 1"
#: Positions that have angles of their own.
POSITIONS = 2**33


class DecodingState(NamedTuple):
    """State of a causal stack after some tokens: of constant size, but for quadratic attention.

    Attributes:
        layers: One state a layer; every tensor is batch first.
    """

    layers: tuple[LayerState, ...]

    def __repr__(self) -> str:
        return shown(self)

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
        # A copy, as torch would save all of a tensor of which this one is a view.
        copies = (layer.map(lambda x: x.detach().cpu().contiguous().clone()) for layer in self.layers)
        layers = [dict(_fields(layer)) for layer in copies]
        torch.save({"format": FORMAT, "layers": layers, "beside": beside}, new)
        os.replace(new, path)

    @classmethod
    def load(cls, path: Union[str, Path], like: DecodingState) -> tuple[DecodingState, dict[str, Any]]:
        """Reads a state that was saved; runs no code from the file.

        Args:
            path: The file.
            like: An empty state of the stack that goes on, which tells rows, kinds, sizes, dtypes and device.

        Returns:
            The state, and what was saved beside it.

        Raises:
            ValueError: the file is missing, something else, or does not fit the stack, or holds numbers that
                no stack leaves behind.
        """
        path = Path(path)
        stored, beside = _content(path, like.position.device)
        if len(stored) != len(like.layers):
            raise ValueError(f"{path} holds {len(stored)} layers; allowed: {len(like.layers)}, as the stack")
        pairs = enumerate(zip(like.layers, stored, strict=True))
        state = cls(tuple(_filled(f"{path}, layer {index}", *pair) for index, pair in pairs))
        try:
            _check_stored(state, path.stat().st_size)
            check_state(state, like, like.position)
            _check_counts(state)
        except ValueError as error:
            raise ValueError(f"{path} does not fit this stack: {error}") from None
        # What is written in place must not share memory, which the file may ask for.
        return cls(tuple(layer.map(torch.Tensor.clone) for layer in state.layers)), beside


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
    if like.is_cpu:
        _check_positions([layer.position for layer in state.layers])


def check_layer_state(state: LayerState, expected: LayerState, like: torch.Tensor) -> None:
    """As :func:`check_state`, of one layer.

    Raises:
        ValueError: the state does not fit.
    """
    _check_layer("state", state, expected, like)
    if like.is_cpu:
        _check_positions([state.position])


def _fields(layer: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and integers by name, also of a state within a state."""
    for name, x in layer._asdict().items():
        if isinstance(x, tuple):
            yield from _fields(x, f"{prefix}{name}.")
        elif x is not None:
            yield prefix + name, x


def _content(path: Path, device: torch.device) -> tuple[list, dict[str, Any]]:
    """Layers as they were stored, and what was saved beside them."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed: a file that a decoding state was saved to")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds, and advises to turn the check off
        why = (
            "code, or a class" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        )
        raise ValueError(f"{path} cannot be read as a decoding state: it holds {why}") from None
    content = content if isinstance(content, dict) else {}
    kind, stored, beside = (content.get(name) for name in ("format", "layers", "beside"))
    if kind == OLD_FORMAT:
        beside = {name: content.get(name) for name in ("model", "pending")}
    if kind not in (FORMAT, OLD_FORMAT) or not isinstance(stored, list) or not isinstance(beside, dict):
        raise ValueError(f"{path} holds something else; allowed: {FORMAT!r} or {OLD_FORMAT!r}")
    return stored, beside


def _filled(where: str, layer: Any, stored: Any) -> Any:
    """A state like ``layer`` with the fields that were ``stored``."""
    wanted = dict(_fields(layer))
    if not isinstance(stored, dict) or stored.keys() != wanted.keys():
        found = ", ".join(map(str, stored)) if isinstance(stored, dict) else f"a {type(stored).__name__}"
        raise ValueError(f"{where} has {found}; allowed: {', '.join(wanted)}")

    def with_stored(layer: Any, prefix: str) -> Any:
        """``layer``, and what is nested in it, with tensors whose names in the file begin with ``prefix``."""
        held = {name: x for name, x in layer._asdict().items() if x is not None}
        for name, x in held.items():
            nested = isinstance(x, tuple)
            held[name] = with_stored(x, f"{prefix}{name}.") if nested else stored[prefix + name]
        return layer._replace(**held)

    return with_stored(layer, "")


def _check_layer(where: str, found: Any, wanted: Any, like: torch.Tensor) -> None:
    check_instance(where, found, type(wanted))
    for name, part in wanted._asdict().items():
        if isinstance(part, tuple):
            check_instance(f"{where}: {name}", getattr(found, name), type(part))
    _check_fields(where, dict(_fields(found)), dict(_fields(wanted)), like)


def _check_fields(where: str, found: dict, wanted: dict, like: torch.Tensor) -> None:
    if found.keys() != wanted.keys():
        raise ValueError(f"{where} has {', '.join(found)}; allowed: {', '.join(wanted)}")
    rooms: dict[str, int] = {}
    for name, expected in wanted.items():
        x, holder = found[name], name.rpartition(".")[0]
        if isinstance(expected, torch.Tensor):
            shape = [like.shape[0], *(size or None for size in expected.shape[1:])]
            check_tensor(f"{where}: {name}", x, shape, [expected.dtype], like.device)
            if 0 in expected.shape[1:]:
                rooms[holder] = min(rooms.get(holder, x.shape[1]), x.shape[1])
        elif type(x) is not int:
            raise ValueError(f"{where}: {name} is a {type(x).__name__}; allowed: int")
        elif not 0 <= x <= rooms[holder]:
            raise ValueError(f"{where}: {name} {x}; allowed: 0 to {rooms[holder]}, as many as it holds")
    for name, expected in wanted.items():
        if isinstance(expected, torch.Tensor) and 0 in expected.shape[1:]:
            length, room = found[name].shape[1], rooms[name.rpartition(".")[0]]
            if length != room:
                raise ValueError(f"{where}: {name} has length {length}; allowed: {room}, as the others")


def _check_positions(positions: list[torch.Tensor]) -> None:
    """Refuses positions ``(b,)`` on a CPU, without a look at each while they are right."""
    stacked = torch.stack(positions)
    require((stacked >= 0).all(), "state has a negative position; allowed: 0 or more")
    try:
        require(((stacked < POSITIONS) & (stacked == stacked[0])).all(), "state has impossible positions")
    except ValueError:
        first, *_ = found = stacked.tolist()
        index = next(i for i, row in enumerate(found) if row != first or max(row) >= POSITIONS)
        where, allowed = f"state, layer {index}: position {found[index]}", f"0 to {POSITIONS - 1}"
        if max(found[index]) < POSITIONS:
            allowed = f"{first}, as in layer 0"
        raise ValueError(f"{where}; allowed: {allowed}") from None


def _check_stored(state: DecodingState, available: int) -> None:
    """Refuses tensors that a file of ``available`` bytes does not hold, and numbers that are none."""
    for index, layer in enumerate(state.layers):
        for name, x in _fields(layer):
            where = f"layer {index}: {name}"
            if not isinstance(x, torch.Tensor):
                continue
            if x.layout != torch.strided or x.nbytes > available:
                raise ValueError(f"{where} is not stored number by number; allowed: a dense tensor")
            if x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"{where} holds NaN or infinity; allowed: finite numbers")


def _check_counts(state: DecodingState) -> None:
    """Refuses integers that no stack leaves behind."""
    _check_positions([layer.position.cpu() for layer in state.layers])
    for index, layer in enumerate(state.layers):
        _check_columns(f"layer {index}", dict(_fields(layer)), layer.position)


def _check_columns(where: str, fields: dict[str, Any], position: torch.Tensor) -> None:
    """Refuses a cache with tokens that are still to come, and a source with more tokens than it holds."""
    prefix = next((name.removesuffix("columns") for name in fields if name.endswith("columns")), None)
    if prefix is not None:
        columns = fields[f"{prefix}columns"]
        used = fields[f"{prefix}key_positions"][:, :columns]
        seen = (used >= 0) & (used < position.unsqueeze(1))
        if not torch.equal(seen.sum(1), position) or not (seen | (used == NEVER)).all():
            raise ValueError(f"{where}: key_positions are not those of {position.tolist()} tokens")
    if "source.valid" in fields:
        valid, room = fields["source.valid"], fields["source.k"].shape[1]
        if ((valid < 0) | (valid > room)).any():
            raise ValueError(f"{where}: source.valid {valid.tolist()}; allowed: 0 to {room}")
