"""Where the real tokens of a batch lie: every row is aligned on its first real token, once for all layers."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import nn

from fairseq_flash.ops import rotary_angles

__all__ = ["Rows", "align_rows", "restore_rows"]


class Rows(NamedTuple):
    """The geometry of aligned rows.

    Attributes:
        length: Columns before the alignment, of which columns that held padding alone were cut.
        padding_mask: ``(b, n)``, True at padding, all of it trailing; None without padding.
        shift: Leading padding that was cut from each row, ``(b,)``; None if there was none.
        positions: Index of each token in its row, ``(n,)`` or, with a state, ``(b, n)``.
        cos: Rotary cosines, ``(n, s/2)`` or ``(b, n, s/2)``.
        sin: Rotary sines, likewise.
    """

    length: int
    padding_mask: Optional[torch.Tensor]
    shift: Optional[torch.Tensor]
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def align_rows(
    x: torch.Tensor,
    padding_mask: Optional[torch.Tensor],
    start: Optional[torch.Tensor],
    attention_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Rows]:
    """Shifts every row to the left until its first real token leads, blanks and shortens the padding.

    Args:
        x: Vectors ``(b, n, d)`` or tokens ``(b, n)``.
        padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding.
        start: Position of each row's first real token, ``(b,)``; None for 0.
        attention_dim: ``s``.
        dtype: Of the queries and keys; the angles are float32 or wider.

    Returns:
        The aligned ``x``, zero at padding, and its :class:`Rows`.

    Raises:
        ValueError: there is padding between two real tokens of a row, or the mask has another shape.
    """
    length, shift = x.shape[1], None
    if padding_mask is not None and not padding_mask.any():
        padding_mask = None
    if padding_mask is not None:
        shift = _leading_padding(padding_mask, x)
        if shift is not None:
            x, padding_mask = _shift(x, shift), _shift(padding_mask, shift)
        longest = max(1, int((~padding_mask).sum(1).max()))
        x, padding_mask = x[:, :longest], padding_mask[:, :longest]
        x = x.masked_fill(padding_mask if x.dim() == 2 else padding_mask.unsqueeze(-1), 0)
    positions = torch.arange(x.shape[1], device=x.device)
    if start is not None:
        positions = positions + start.unsqueeze(1)
    return x, Rows(length, padding_mask, shift, positions, *rotary_angles(positions, attention_dim, dtype))


def restore_rows(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Undoes :func:`align_rows` on ``(b, n, d)``, with zeros at padding."""
    if rows.padding_mask is None:
        return x
    x = x.masked_fill(rows.padding_mask.unsqueeze(-1), 0)
    x = nn.functional.pad(x, (0, 0, 0, rows.length - x.shape[1]))
    return x if rows.shift is None else _shift(x, -rows.shift)


def _leading_padding(padding_mask: torch.Tensor, x: torch.Tensor) -> Optional[torch.Tensor]:
    if padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"padding_mask has shape {tuple(padding_mask.shape)}; allowed: {tuple(x.shape[:2])}, that of x"
        )
    real = ~padding_mask
    # A row's real tokens are contiguous if they begin at most once.
    begins = real[:, 1:] & padding_mask[:, :-1]
    if (begins.sum(1) + real[:, 0]).gt(1).any():
        raise ValueError("padding_mask has padding between real tokens; allowed: leading and trailing")
    shift = real.int().argmax(dim=1)
    return shift if shift.any() else None


def _shift(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotates each row of (b, n, ...) to the left by its own shift."""
    n = x.shape[1]
    index = (torch.arange(n, device=x.device) + shift.unsqueeze(1)) % n
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), index]
