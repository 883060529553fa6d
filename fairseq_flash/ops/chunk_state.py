"""What a causal layer remembers between calls, and one step of decoding on it."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from fairseq_flash.ops.backend import check_backend, without_autocast
from fairseq_flash.ops.linear import linear_denominator

__all__ = ["ChunkState", "mixed_chunk_step"]


class ChunkState(NamedTuple):
    """What a causal layer remembers of each row: constant in size, whatever the position.

    The last ``c`` tokens lie in a ring: the token at position ``p`` in slot ``p % c``. Slots before
    ``position % c`` hold the open chunk; those from there on still hold the chunk before it, which
    ``kv_sum`` takes up slot by slot as they are overwritten. So a step does the same work at every position,
    with no branch and no flush.

    Attributes:
        kv_sum: Sum of ``k_lin^T v`` over the tokens that left the ring, ``(b, s, e)``, float32 or wider; None
            without a linear branch.
        k_quad: Quadratic keys in the ring, ``(b, c, s)``; None without a quadratic branch.
        k_lin: Linear keys in the ring, ``(b, c, s)``; None without a linear branch.
        v: Values in the ring, ``(b, c, e)``.
        position: Valid tokens so far, ``(b,)``.
    """

    kv_sum: Optional[torch.Tensor]
    k_quad: Optional[torch.Tensor]
    k_lin: Optional[torch.Tensor]
    v: torch.Tensor
    position: torch.Tensor

    @classmethod
    def empty(
        cls,
        like: torch.Tensor,
        chunk_size: int,
        attention_dim: int,
        expanded_dim: int,
        *,
        quadratic: bool = True,
        linear: bool = True,
    ) -> ChunkState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device."""
        b = like.shape[0]
        keys = (b, chunk_size, attention_dim)
        wide = torch.promote_types(like.dtype, torch.float32)
        return cls(
            like.new_zeros(b, attention_dim, expanded_dim, dtype=wide) if linear else None,
            like.new_zeros(keys) if quadratic else None,
            like.new_zeros(keys) if linear else None,
            like.new_zeros(b, chunk_size, expanded_dim),
            torch.zeros(b, dtype=torch.long, device=like.device),
        )


@without_autocast
def mixed_chunk_step(
    q_quad: Optional[torch.Tensor],
    k_quad: Optional[torch.Tensor],
    q_lin: Optional[torch.Tensor],
    k_lin: Optional[torch.Tensor],
    v: torch.Tensor,
    bias: Optional[torch.Tensor],
    *,
    linear_norm: str,
    state: ChunkState,
    softmax: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, ChunkState]:
    """One token of causal :func:`~fairseq_flash.ops.mixed_chunk_attention`: the same work at every position.

    Outside of autograd the tensors of ``state`` are overwritten: the state that came in must not be used
    again.

    Args:
        q_quad: ``(b, 1, s)``, like all queries and keys; None without a quadratic branch.
        k_quad: Quadratic keys.
        q_lin: Linear queries; None without a linear branch.
        k_lin: Linear keys.
        v: Values, ``(b, 1, e)``.
        bias: Bias of this token's slot towards every slot, ``(b, 1, c)``; unused by softmax attention.
        linear_norm: ``"chunk"`` or ``"mean"``.
        state: What came before.
        softmax: Whether the quadratic branch is softmax attention.
        backend: ``"auto"`` or ``"reference"``.

    Returns:
        ``(b, 1, e)`` and the state after the token.

    Raises:
        ValueError: ``linear_norm`` is unknown, or the backend cannot run.

    Source: Hua et al. 2022, section 3.2; the ring is ours.
    """
    check_backend(backend)
    if torch.is_grad_enabled():
        state = ChunkState(*(None if x is None else x.clone() for x in state))
    c = state.v.shape[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    slot = (state.position % c).view(-1, 1, 1)
    if k_lin is not None:
        # k^T v of the token that leaves the ring, added in one pass over the sum.
        leaving = _swap(state.k_lin, slot, k_lin).to(wide).transpose(1, 2)
        state.kv_sum.addcmul_(leaving, _swap(state.v, slot, v).to(wide))
    else:
        _swap(state.v, slot, v)
    # All products are batched, of one query with a ring or a sum; einsum would take as long as they do.
    open_chunk = torch.arange(c, device=v.device) <= slot
    weights, out = torch.zeros((), dtype=wide, device=v.device), None
    if q_lin is not None:
        count = state.position.view(-1, 1, 1) - slot
        query = q_lin.to(wide) / linear_denominator(linear_norm, c, count, wide)
        weights = torch.bmm(query, state.k_lin.to(wide).transpose(1, 2)).masked_fill(open_chunk, 0)
        out = torch.bmm(query, state.kv_sum)
    if q_quad is not None:
        _swap(state.k_quad, slot, k_quad)
        keys = state.k_quad.to(wide).transpose(1, 2)
        if softmax:
            scores = torch.bmm(q_quad.to(wide), keys) * q_quad.shape[2] ** -0.5
            near = scores.masked_fill(~open_chunk, -torch.inf).softmax(dim=-1)
        else:
            near = torch.baddbmm(bias.to(wide), q_quad.to(wide), keys, alpha=1 / c).relu().square()
        weights = torch.where(open_chunk, near, weights)
    ring = state.v.to(wide)
    out = torch.bmm(weights, ring) if out is None else torch.baddbmm(out, weights, ring)
    return out.to(v.dtype), state._replace(position=state.position + 1)


def _swap(ring: torch.Tensor, slot: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Puts ``new`` (b, 1, .) into ``slot`` (b, 1, 1) of each row of a ring; returns what lay there."""
    index = slot.expand(-1, 1, ring.shape[2])
    # For the backward pass, gather would keep the ring itself, which is overwritten here.
    old = (ring.clone() if torch.is_grad_enabled() else ring).gather(1, index)
    ring.scatter_(1, index, new.to(ring.dtype))
    return old
