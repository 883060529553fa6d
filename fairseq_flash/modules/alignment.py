"""Where the real tokens of a batch lie: every row is aligned on its first real token, once for all layers."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import distributed, nn

from fairseq_flash.modules.checks import check_tensor, require
from fairseq_flash.ops import gathered, rotary_angles, trailing_padding

__all__ = ["Rows", "align_rows", "part_of_rows", "restore_rows"]


class Rows(NamedTuple):
    """The geometry of aligned rows, which keep their length: no shape depends on where padding lies.

    Attributes:
        positions: Index of each token in its row, ``(n,)`` or, with a state, ``(b, n)``.
        cos: Rotary cosines, ``(n, s/2)`` or ``(b, n, s/2)``.
        sin: Rotary sines, likewise.
        lengths: Valid tokens of each row, ``(b,)``, behind which all padding trails; None without a mask.
        padding_mask: The same as ``(b, n)``, True at padding; None without a mask.
        given_mask: The mask before the alignment, ``(b, n)``; None without one.
        shift: Leading padding of each row before the alignment, ``(b,)``; None without a mask.
        group: The processes that hold the parts of the rows, all equally long; None for whole rows.
        begins: Tokens before these, of every row, where the host knows it and nothing is padded; else None.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    lengths: Optional[torch.Tensor] = None
    padding_mask: Optional[torch.Tensor] = None
    given_mask: Optional[torch.Tensor] = None
    shift: Optional[torch.Tensor] = None
    group: Optional[distributed.ProcessGroup] = None
    begins: Optional[int] = None


def align_rows(
    x: torch.Tensor,
    padding_mask: Optional[torch.Tensor],
    start: Optional[torch.Tensor],
    attention_dim: int,
    dtype: torch.dtype,
    group: Optional[distributed.ProcessGroup] = None,
) -> tuple[torch.Tensor, Rows]:
    """Shifts every row to the left until its first real token leads, and blanks the padding behind.

    Args:
        x: Vectors ``(b, n, d)`` or tokens ``(b, n)``.
        padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding. A mask costs the
            same whatever it holds.
        start: Position of each row's first real token, ``(b,)``; None for 0.
        attention_dim: ``s``.
        dtype: Of the queries and keys; the angles are float32 or wider.
        group: The processes that hold the parts of the rows, in place of ``start``.

    Returns:
        The aligned ``x``, zero at padding, and its :class:`Rows`.

    Raises:
        ValueError: the mask has another shape, dtype or device, or there is padding between two real tokens
            of a row, or the parts of a group are not of whole rows; the latter two stop a GPU with an error
            of its own, as the numbers are not waited for.
    """
    n = x.shape[1]
    positions = torch.arange(n, device=x.device)
    if start is not None:
        positions = positions + start.unsqueeze(1)
    if group is not None:
        positions = positions + group.rank() * n
    rows = Rows(positions, *rotary_angles(positions, attention_dim, dtype), group=group)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, x.shape[:2], [torch.bool], x.device)
    if group is not None:
        _check_parts(x, None if padding_mask is None else ~padding_mask, group)
    if padding_mask is None:
        return x, rows
    if n == 0:
        return x, rows
    real = ~padding_mask
    # Real tokens are contiguous if they begin at most once.
    begins = torch.cat((real[:, :1], real[:, 1:] & padding_mask[:, :-1]), dim=1)
    message = "padding_mask has padding between real tokens; allowed: leading and trailing"
    require((begins.sum(1) <= 1).all(), message)
    shift, lengths = begins.int().argmax(dim=1), real.sum(1)
    trailing = trailing_padding(lengths, n)
    columns = torch.arange(n, device=x.device) + shift.unsqueeze(1)
    x = _blanked(_columns(x, columns.clamp(max=n - 1)), trailing)
    return x, rows._replace(lengths=lengths, padding_mask=trailing, given_mask=padding_mask, shift=shift)


def part_of_rows(
    x: torch.Tensor, padding_mask: Optional[torch.Tensor], chunk_size: int, group: distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's part of rows that each process of a group holds whole.

    Leading padding is moved behind the row, which is then cut in parts of as many whole chunks.

    Args:
        x: Tokens ``(b, n)`` or vectors ``(b, n, d)``; anything at padding.
        padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding.
        chunk_size: ``c``.
        group: The processes that share the rows, in their order.

    Returns:
        The part ``(b, m)`` or ``(b, m, d)``, zero at padding, and its mask ``(b, m)``.

    Raises:
        ValueError: as :func:`align_rows`.
    """
    n, ranks, rank = x.shape[1], group.size(), group.rank()
    m = chunk_size * max(1, -(-n // (chunk_size * ranks)))
    if padding_mask is None:
        padding_mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    x, rows = align_rows(x, padding_mask, None, 2, torch.float32)
    mask = padding_mask if rows.padding_mask is None else rows.padding_mask
    begin, end = min(rank * m, n), min((rank + 1) * m, n)
    missing = m - (end - begin)
    x, mask = x[:, begin:end], nn.functional.pad(mask[:, begin:end], (0, missing), value=True)
    return nn.functional.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing)), mask


def _check_parts(x: torch.Tensor, real: Optional[torch.Tensor], group: distributed.ProcessGroup) -> None:
    """All processes see what all have, so that none waits for one that has stopped."""
    b, n = x.shape[:2]
    own = torch.full((b, 3), n, device=x.device)
    if real is not None:
        own[:, 1], own[:, 2] = real.sum(1), torch.where(real.any(1), real[:, 0] * n, n)
    columns, tokens, led = gathered(own, group).unbind(2)
    whole = (columns == n) & (led == n)
    whole[:-1] &= (tokens[:-1] == n) | (tokens[1:] == 0)
    message = (
        "the parts in the group, of {least} to {most} columns, do not make whole rows; allowed: parts of "
        "equally many columns, with padding behind the whole row alone"
    )
    require(whole.all(), message, least=columns.min(), most=columns.max())


def restore_rows(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Undoes :func:`align_rows` on ``(b, n, d)``, with zeros at padding."""
    if rows.shift is None:
        return x
    columns = torch.arange(x.shape[1], device=x.device) - rows.shift.unsqueeze(1)
    return _blanked(_columns(x, columns.clamp(min=0)), rows.given_mask)


def _blanked(x: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(padding_mask if x.dim() == 2 else padding_mask.unsqueeze(-1), 0)


def _columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Picks ``columns`` (b, n) of each row of (b, n, ...)."""
    b, n = columns.shape
    places = columns + n * torch.arange(b, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, (b, n))
