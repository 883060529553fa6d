"""The cache of quadratic attention: every key and value of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional, Union

import torch

from fairseq_flash.ops.positions import trailing_padding
from fairseq_flash.ops.shown import shown

__all__ = ["NEVER", "KeyValueCache"]

#: Position of a column that holds padding: later than any token, so that nobody sees it.
NEVER = 2**62


class KeyValueCache(NamedTuple):
    """A cache: every key and value of a row, so it grows with the position.

    Outside of autograd new columns are written in place into spare room, which grows by an eighth at a time:
    a step reads the cache and copies it only now and then.

    Attributes:
        k: Keys, ``(b, room, s)``.
        v: Values, ``(b, room, e)``; zero where the column was padding.
        key_positions: Position of each column in its row, ``(b, room)``; beyond any token's for padding.
        position: Valid tokens so far, ``(b,)``.
        columns: How many columns are in use.
    """

    k: torch.Tensor
    v: torch.Tensor
    key_positions: torch.Tensor
    position: torch.Tensor
    columns: int = 0

    def __repr__(self) -> str:
        return shown(self)

    @classmethod
    def empty(cls, like: torch.Tensor, attention_dim: int, expanded_dim: int) -> KeyValueCache:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device."""
        b = like.shape[0]
        integers = torch.zeros(b, 0, dtype=torch.long, device=like.device)
        return cls(
            like.new_zeros(b, 0, attention_dim), like.new_zeros(b, 0, expanded_dim), integers, integers.sum(1)
        )

    def after(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, lengths: Optional[torch.Tensor]
    ) -> KeyValueCache:
        """Appends tokens; outside of autograd this state must not be used again.

        Args:
            k: Keys, ``(b, n, s)``.
            v: Values, ``(b, n, e)``.
            positions: Of the tokens in their rows, ``(b, n)``.
            lengths: Valid tokens of each row, ``(b,)``, all padding trails; None for ``n``.

        Returns:
            The state after the tokens.
        """
        valid: Union[int, torch.Tensor] = k.shape[1]
        if lengths is not None:
            valid = lengths
            padding_mask = trailing_padding(lengths, k.shape[1])
            v = v.masked_fill(padding_mask.unsqueeze(-1), 0)
            positions = positions.masked_fill(padding_mask, NEVER)
        columns = self.columns + k.shape[1]
        room = 0 if torch.is_grad_enabled() else columns // 8 + 64
        parts = zip(self[:3], (k, v, positions), strict=True)
        appended = (_append(old, new, self.columns, room) for old, new in parts)
        return KeyValueCache._make((*appended, self.position + valid, columns))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> KeyValueCache:
        """Applies ``function`` to every tensor."""
        return KeyValueCache._make(function(x) if isinstance(x, torch.Tensor) else x for x in self)

    def reorder(self, order: torch.Tensor) -> KeyValueCache:
        """Picks rows ``order`` ``(b',)``; shares no memory with this state."""
        return self.map(lambda x: x.index_select(0, order))

    def start_anew(self, rows: torch.Tensor) -> KeyValueCache:
        """Sets the rows that are True in ``rows`` ``(b,)`` back to before their first token."""
        new = self.map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), 0))
        return new._replace(key_positions=self.key_positions.masked_fill(rows.unsqueeze(1), NEVER))

    def used(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys ``(b, m, s)``, values ``(b, m, e)`` and positions ``(b, m)`` of the columns in use: views."""
        return self.k[:, : self.columns], self.v[:, : self.columns], self.key_positions[:, : self.columns]

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """Which columns tokens at ``positions`` ``(b, n)`` may see, themselves among them: ``(b, n, m)``."""
        return self.used()[2].unsqueeze(1) <= positions.unsqueeze(2)


def _append(old: torch.Tensor, new: torch.Tensor, columns: int, room: int) -> torch.Tensor:
    """Writes ``new`` (b, n, ...) behind the columns in use, in place if it fits and autograd is off."""
    end = columns + new.shape[1]
    if torch.is_grad_enabled() or end > old.shape[1]:
        spare = new.new_zeros(new.shape[0], room, *new.shape[2:])
        return torch.cat((old[:, :columns], new.to(old.dtype), spare.to(old.dtype)), dim=1)
    old[:, columns:end] = new
    return old
