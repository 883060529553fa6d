"""A row over many processes: each holds a part of whole chunks, and the linear branch reads what all summed.

Between the processes of a group crosses, for each layer, one gather forward and one backward: ``kv_sum``
``(b, s, e)`` in float32 or wider and the tokens in it, 8 bytes a row. So each process sends
``b (4 s e + 8)`` bytes forward and ``4 b s e`` backward in float32, however long the row is. The quadratic
branch needs nothing from others; shifted keys need one token's base of the part before. The gather is not
hidden behind it, as every implementation takes the sum at its start: for 0.8 MB, against the milliseconds
that a part worth sharing takes.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from fairseq_flash.ops.mixed_chunk.inputs import Carry, Options
from fairseq_flash.ops.mixed_chunk.linear import kept_of_chunks
from fairseq_flash.ops.mixed_chunk.state import in_columns

__all__ = ["check_part", "from_previous", "gathered", "kept_of_parts", "seen_elsewhere"]


def check_part(n: int, chunk_size: int, group: distributed.ProcessGroup) -> None:
    """Refuses a part of rows that is not of whole chunks.

    Args:
        n: Tokens of the part, padding among them.
        chunk_size: ``c``.
        group: The processes that share the rows, in their order.

    Raises:
        ValueError: so it is.
    """
    if n < 1 or n % chunk_size:
        raise ValueError(
            f"part {group.rank()} of {group.size()} of the rows has {n} columns; allowed: multiples of "
            f"chunk_size={chunk_size}, filled up with padding that trails"
        )


def seen_elsewhere(
    kv_sum: torch.Tensor,
    count: Union[int, torch.Tensor],
    causal: bool,
    group: distributed.ProcessGroup,
    kept: Optional[torch.Tensor] = None,
) -> Carry:
    """What the linear branch sees in the parts of others: those before this one if causal, else all others.

    Every process of the group calls it at the same time, and again in the backward pass.

    Args:
        kv_sum: Sum of ``k_lin^T v`` over this part, ``(b, s, e)``, float32 or wider.
        count: Tokens that were summed, of all rows or of each ``(b,)``.
        causal: Whether a token sees only tokens before it.
        group: The processes that share the rows, in their order.
        kept: What is left of a sum when a part has passed, for each column, ``(e,)``; None for all of it.

    Returns:
        Their sum and number; gradients flow back to the parts where they come from.
    """
    counts = torch.zeros(kv_sum.shape[0], dtype=torch.long, device=kv_sum.device) + count
    return Carry(*_SeenElsewhere.apply(kv_sum, counts, causal, group, kept))


def from_previous(x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """``x`` of the process before this one, zeros in the first; gradients flow back to it."""
    return _FromPrevious.apply(x, group)


def gathered(x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """``x`` of every process of the group, without gradients: ``(ranks, ...)``."""
    found = x.new_empty(group.size(), *x.shape)
    distributed.all_gather(list(found.unbind()), x, group=group)
    return found


class _SeenElsewhere(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kv_sum: torch.Tensor,
        count: torch.Tensor,
        causal: bool,
        group: distributed.ProcessGroup,
        kept: Optional[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.causal, ctx.group, ctx.kept = causal, group, kept
        # One message: the bits of the integers travel as if they were numbers of the sum.
        bits = count.unsqueeze(1).view(kv_sum.dtype)
        sent = torch.cat((kv_sum.flatten(1), bits), dim=1)
        rank = group.rank()
        found = gathered(sent, group)
        found = found[:rank] if causal else _without(found, rank)
        sums, counts = found.split([kv_sum[0].numel(), bits.shape[1]], dim=2)
        counts = counts.contiguous().view(torch.long).squeeze(2).sum(0)
        ctx.mark_non_differentiable(counts)
        sums = sums.unflatten(2, kv_sum.shape[1:])
        if kept is not None:
            # Of the nearest part nothing has faded.
            sums = sums * _powers(kept, len(sums)).flip(0)
        return sums.sum(0), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: torch.Tensor, _: Any) -> tuple[Optional[torch.Tensor], ...]:
        rank = ctx.group.rank()
        found = gathered(d_sum.contiguous(), ctx.group)
        found = found[rank + 1 :] if ctx.causal else _without(found, rank)
        if ctx.kept is not None:
            found = found * _powers(ctx.kept, len(found))
        return found.sum(0), None, None, None, None


class _FromPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _neighbour(x, group, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _neighbour(d_x, ctx.group, 1), None


def _neighbour(x: torch.Tensor, group: distributed.ProcessGroup, step: int) -> torch.Tensor:
    other, found = group.rank() + step, gathered(x.contiguous(), group)
    return found[other] if 0 <= other < group.size() else torch.zeros_like(x)


def kept_of_parts(options: Options, n: int, kv_sum: torch.Tensor) -> Optional[torch.Tensor]:
    """What is left of ``kv_sum`` (b, s, e) when a part of ``n`` tokens has passed: (e,); None for all."""
    kept = kept_of_chunks(options.linear_norm, kv_sum.shape[-1], kv_sum.device)
    return None if kept is None else in_columns(kept ** (n // options.chunk_size), kv_sum)


def _powers(kept: torch.Tensor, count: int) -> torch.Tensor:
    """``kept`` (e,) to the power of 0, 1, ...: (count, 1, 1, e)."""
    return kept ** torch.arange(count, device=kept.device).view(-1, 1, 1, 1)


def _without(found: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.cat((found[:rank], found[rank + 1 :]))
