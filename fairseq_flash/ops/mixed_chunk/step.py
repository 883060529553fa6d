"""One step of decoding: the same work at every position."""

from __future__ import annotations

import torch

from fairseq_flash.ops.dispatch import STEPS, choose
from fairseq_flash.ops.mixed_chunk.gated import Projected
from fairseq_flash.ops.mixed_chunk.inputs import Inputs, Options, Pair
from fairseq_flash.ops.mixed_chunk.linear import kept_of_chunks, linear_denominator
from fairseq_flash.ops.mixed_chunk.state import ChunkState, in_columns, swap
from fairseq_flash.ops.precision import widened
from fairseq_flash.ops.projections import rotated_copies, split_silu

__all__ = ["gated_mixed_chunk_step", "mixed_chunk_step", "objections", "run"]


def gated_mixed_chunk_step(
    projected: Projected, options: Options, state: ChunkState, *, backend: str = "auto"
) -> tuple[torch.Tensor, ChunkState]:
    """One token of causal :func:`~fairseq_flash.ops.gated_mixed_chunk`: the same work at every position.

    Outside of autograd the tensors of ``state`` are overwritten: the state that came in must not be used
    again.

    Args:
        projected: Of one token, ``n = 1``, without lengths; its bias is that towards a key 0 to ``c - 1``
            tokens back, ``(c,)``.
        options: Causal; of its chunk size are the rings.
        state: What came before.
        backend: ``"auto"``, or the name of an implementation, which insists where it has a step of its own.

    Returns:
        ``(b, 1, e)``, gated, and the state after the token.

    Raises:
        ValueError: ``linear_norm`` is unknown, or the backend cannot run.

    Source: Hua et al. 2022, section 3.2; the ring is ours.
    """
    backend = backend if backend in STEPS else "auto"
    return choose(backend, projected, options, state, among=STEPS)(projected, options, state)


def objections(projected: Projected, options: Options, state: ChunkState) -> list[str]:
    """Why the reference cannot run: it always can."""
    return []


def run(projected: Projected, options: Options, state: ChunkState) -> tuple[torch.Tensor, ChunkState]:
    """The reference: the pieces one after the other."""
    s = projected.gamma.shape[1]
    e = (projected.uvz.shape[2] - s) // 2
    u, v, z = split_silu(projected.uvz, [e, e, s])
    pairs = (
        Pair(q, k) for q, k in rotated_copies(z, *projected[1:5], projected.key_base).unflatten(0, (-1, 2))
    )
    branches = dict(zip(options.branches, pairs, strict=True))
    bias = projected.bias
    if bias is not None:
        back = state.fill.view(-1, 1, 1) - torch.arange(options.chunk_size, device=v.device)
        bias = bias[back.clamp(min=0)]  # what lies behind the slot is not of the open chunk
    inputs = Inputs(branches.get("quad"), branches.get("lin"), v, bias)
    out, state = mixed_chunk_step(inputs, options, state)
    return u * out, state


def mixed_chunk_step(inputs: Inputs, options: Options, state: ChunkState) -> tuple[torch.Tensor, ChunkState]:
    """One token of causal :func:`~fairseq_flash.ops.mixed_chunk_attention`.

    Outside of autograd the tensors of ``state`` are overwritten: the state that came in must not be used
    again.

    Args:
        inputs: Of one token, without padding; the bias is that of the token's slot, ``state.fill``, towards
            every slot, ``(b, 1, c)``.
        options: Causal; of its chunk size are the rings. There is no dropout in a step.
        state: What came before.

    Returns:
        ``(b, 1, e)`` and the state after the token.

    Raises:
        ValueError: ``linear_norm`` is unknown.

    Source: Hua et al. 2022, section 3.2; the ring is ours.
    """
    with torch.autocast(device_type=inputs.v.device.type, enabled=False):
        return _step(inputs, options, state)


def _step(inputs: Inputs, options: Options, state: ChunkState) -> tuple[torch.Tensor, ChunkState]:
    if torch.is_grad_enabled():
        state = state.map(torch.clone)
    quad, lin, v = inputs.quad, inputs.lin, inputs.v
    c, wide = state.v.shape[1], widened(v.dtype)
    slot = state.fill.view(-1, 1, 1)
    kept = kept_of_chunks(options.linear_norm, v.shape[-1], v.device)
    if lin is not None:
        if kept is not None:
            state.kv_sum.mul_(torch.where(slot == 0, in_columns(kept, state.kv_sum), 1))
        # k^T v of the token that leaves the ring, added in one pass over the sum.
        leaving = swap(state.k_lin, slot, lin.k).to(wide).transpose(1, 2)
        state.kv_sum.addcmul_(leaving, swap(state.v, slot, v).to(wide))
    else:
        swap(state.v, slot, v)
    ring = state.v.to(wide)
    # All products are batched, of one query with a ring or a sum; einsum would take as long as they do.
    open_chunk = torch.arange(c, device=v.device) <= slot
    weights, out = torch.zeros((), dtype=wide, device=v.device), None
    if lin is not None:
        count = state.position.view(-1, 1) - slot.squeeze(-1)
        denominator = linear_denominator(options.linear_norm, c, count, v.shape[-1], wide)
        query = lin.q.to(wide) / (denominator if kept is None else 1)
        weights = torch.bmm(query, state.k_lin.to(wide).transpose(1, 2)).masked_fill(open_chunk, 0)
        out = torch.bmm(query, state.kv_sum)
        if kept is not None:
            # Each column has a divisor of its own.
            out = torch.baddbmm(out, weights, ring) / denominator
            weights = torch.zeros_like(weights)
    if quad is not None:
        swap(state.k_quad, slot, quad.k)
        keys = state.k_quad.to(wide).transpose(1, 2)
        if options.softmax:
            scores = torch.bmm(quad.q.to(wide), keys) * quad.q.shape[2] ** -0.5
            near = scores.masked_fill(~open_chunk, -torch.inf).softmax(dim=-1)
        else:
            near = torch.baddbmm(inputs.bias.to(wide), quad.q.to(wide), keys, alpha=1 / c).relu().square()
        weights = torch.where(open_chunk, near, weights)
    out = torch.bmm(weights, ring) if out is None else torch.baddbmm(out, weights, ring)
    return out.to(v.dtype), state._replace(position=state.position + 1)
