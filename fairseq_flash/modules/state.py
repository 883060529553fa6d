"""What a causal stack remembers between calls."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch

from fairseq_flash.modules.attention import LayerState
from fairseq_flash.modules.checks import require
from fairseq_flash.ops import NEVER

__all__ = ["DecodingState", "check_state"]

FORMAT, OLD_FORMAT = "fairseq_flash decoding state 2", "fairseq_flash decoding state 1"
#: Positions that have angles of their own.
POSITIONS = 2**33


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
            check_state(state, like, like.position)
            _check_numbers(state, path.stat().st_size)
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
            negative.
    """
    if len(state.layers) != len(expected.layers):
        raise ValueError(
            f"state has {len(state.layers)} layers; allowed: {len(expected.layers)}, as the stack"
        )
    for index, (found, wanted) in enumerate(zip(state.layers, expected.layers, strict=True)):
        where = f"state, layer {index}"
        if type(found) is not type(wanted):
            raise ValueError(f"{where} is a {type(found).__name__}; allowed: {type(wanted).__name__}")
        _check_fields(where, dict(_fields(found)), dict(_fields(wanted)), like)
    if like.is_cpu:
        positions = torch.stack([layer.position for layer in state.layers])
        require((positions >= 0).all(), "state has a negative position; allowed: 0 or more")


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

    def filled(layer: Any, prefix: str) -> Any:
        held = {name: x for name, x in layer._asdict().items() if x is not None}
        for name, x in held.items():
            nested = isinstance(x, tuple)
            held[name] = filled(x, f"{prefix}{name}.") if nested else stored[prefix + name]
        return layer._replace(**held)

    return filled(layer, "")


def _check_fields(where: str, found: dict, wanted: dict, like: torch.Tensor) -> None:
    if found.keys() != wanted.keys():
        raise ValueError(f"{where} has {', '.join(found)}; allowed: {', '.join(wanted)}")
    for name, expected in wanted.items():
        x, kind = found[name], torch.Tensor if isinstance(expected, torch.Tensor) else int
        if not isinstance(x, kind) or isinstance(x, bool):
            raise ValueError(f"{where}: {name} is a {type(x).__name__}; allowed: {kind.__name__}")
        if not isinstance(expected, torch.Tensor) or not isinstance(x, torch.Tensor):  # the second tells mypy
            continue
        sizes = (like.shape[0], *expected.shape[1:])
        if x.dim() != len(sizes) or any(a not in (0, b) for a, b in zip(sizes, x.shape, strict=True)):
            shown = ", ".join(str(size or "any") for size in sizes)
            raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}; allowed: ({shown})")
        for kind, a, b in (("dtype", x.dtype, expected.dtype), ("device", x.device, like.device)):
            if a != b:
                raise ValueError(f"{where}: {name} has {kind} {a}; allowed: {b}")


def _check_numbers(state: DecodingState, available: int) -> None:
    """Refuses numbers that no stack leaves behind; ``available`` bytes were read."""
    for index, layer in enumerate(state.layers):
        fields, where = dict(_fields(layer)), f"layer {index}"
        for name, x in fields.items():
            if not isinstance(x, torch.Tensor):
                continue
            if x.layout != torch.strided or x.nbytes > available:
                raise ValueError(f"{where}: {name} is not stored number by number; allowed: a dense tensor")
            if x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"{where}: {name} holds NaN or infinity; allowed: finite numbers")
        position = layer.position
        if ((position < 0) | (position >= POSITIONS)).any():
            raise ValueError(f"{where}: position {position.tolist()}; allowed: 0 to {POSITIONS - 1}")
        if not torch.equal(position, state.position):
            found, wanted = position.tolist(), state.position.tolist()
            raise ValueError(f"{where}: position {found}; allowed: {wanted}, as in layer 0")
        _check_columns(where, fields, position)


def _check_columns(where: str, fields: dict[str, Any], position: torch.Tensor) -> None:
    """Refuses a cache with more columns in use than it has, or with tokens that are still to come."""
    prefix = next((name.removesuffix("columns") for name in fields if name.endswith("columns")), None)
    if prefix is not None:
        columns = fields[f"{prefix}columns"]
        rooms = {fields[prefix + name].shape[1] for name in ("k", "v", "key_positions")}
        if len(rooms) > 1 or not 0 <= columns <= min(rooms):
            raise ValueError(f"{where}: columns {columns}; allowed: 0 to {min(rooms)}, as many as it holds")
        used = fields[f"{prefix}key_positions"][:, :columns]
        seen = (used >= 0) & (used < position.unsqueeze(1))
        if not torch.equal(seen.sum(1), position) or not (seen | (used == NEVER)).all():
            raise ValueError(f"{where}: key_positions are not those of {position.tolist()} tokens")
    if "source.valid" in fields:
        valid, room = fields["source.valid"], fields["source.k"].shape[1]
        if fields["source.v"].shape[1] != room or ((valid < 0) | (valid > room)).any():
            raise ValueError(f"{where}: source.valid {valid.tolist()}; allowed: 0 to {room}")
