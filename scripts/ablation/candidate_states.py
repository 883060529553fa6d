"""What candidates make of the linear branch: the state that each chunk reads, as functions of tensors.

Shapes: b rows, g chunks of c tokens, s of queries and keys, e of values, which are h groups of e / h columns.
A chunk reads the state before it, so that decay is counted up to its border.
"""

from typing import Optional

import torch

from fairseq_flash.ops.mixed_chunk.linear import chunk_summaries, exclusive_sum
from fairseq_flash.ops.precision import widened, without_autocast

__all__ = [
    "decayed_states",
    "delta_states",
    "faded_means",
    "grouped_norm",
    "half_lives",
    "read_states",
    "summed_states",
]

#: Added to mean squares.
EPS = 1e-6


def half_lives(groups: int, chunk_size: int, longest: int = 64) -> torch.Tensor:
    """Tokens after which a group of values has lost half: ``(groups - 1,)``.

    They grow evenly in scale from one chunk to ``longest`` chunks; the last group has none, as it keeps all.
    """
    return chunk_size * longest ** torch.linspace(0, 1, groups - 1)


def summed_states(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sums of ``k^T v`` over earlier chunks, ``(b, g, s, e)`` in float32 or wider, as in the package.

    Args:
        k: Linear keys, ``(b, g, c, s)``.
        v: Values, ``(b, g, c, e)``.
    """
    kv = chunk_summaries(k[:, :-1], v[:, :-1])
    return exclusive_sum(kv, kv.new_zeros(kv.shape[0], *kv.shape[2:]))


@without_autocast
def decayed_states(k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    r"""States that forget, :math:`S_g = \sum_j \exp(\sum_{j < t < g c} \log a_t) \, k_j^\top v_j`.

    Args:
        k: Linear keys, ``(b, g, c, s)``.
        v: Values, ``(b, g, c, e)``.
        log_decay: Of each token and group, at most 0, ``(b, g, c, h)`` in float32 or wider.

    Returns:
        ``(b, g, s, e)`` in float32 or wider.

    Source: Dao and Gu 2024 (Mamba-2), section 6, with the state read at the border of the chunk.
    """
    weights, total = _inside_chunks(log_decay)
    kv = chunk_summaries(k[:, :-1], _weighed(v, weights)[:, :-1])
    ends = total.cumsum(1)
    # What is left at the begin of chunk g of what was there at the end of chunk p; only earlier ones count.
    left = ((ends - total).unsqueeze(2) - ends[:, :-1].unsqueeze(1)).clamp(max=0).exp()
    g = k.shape[1]
    earlier = torch.ones(g, g - 1, dtype=left.dtype, device=left.device).tril(-1)
    left = left * earlier[..., None]
    return torch.einsum("bgph,bpshr->bgshr", left, kv.unflatten(-1, (left.shape[-1], -1))).flatten(-2)


@without_autocast
def faded_means(k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    r"""Means that forget, :math:`S_g = \sum_{j<g} a^{g-1-j} K_j^\top V_j \, / \, c \sum_{j<g} a^{g-1-j}`.

    Args:
        k: Linear keys, ``(b, g, c, s)``.
        v: Values, ``(b, g, c, e)``.
        kept: ``a``, what is left of a chunk in each group after another, ``(h,)`` in float32 or wider.

    Returns:
        ``(b, g, s, e)`` in float32 or wider; with ``a = 1`` the mean of the package.
    """
    kv, h = chunk_summaries(k[:, :-1], v[:, :-1]), len(kept)
    sums = exclusive_sum(kv, kv.new_zeros(kv.shape[0], *kv.shape[2:]), kept)
    # Of chunks that each weigh what they have tokens.
    weights = exclusive_sum(kv.new_full((1, kv.shape[1], 1, h), k.shape[2]), kv.new_zeros(1, 1, h), kept)
    return sums / weights.clamp(min=1.0).repeat_interleave(v.shape[-1] // h, dim=-1)


@without_autocast
def delta_states(
    k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, log_decay: Optional[torch.Tensor]
) -> torch.Tensor:
    r"""States that are corrected once a chunk, :math:`S' = a S + K^\top B (V - a K S) / \|K^\top K\|_F`.

    The Frobenius norm is above the greatest eigenvalue of ``K^T K``, so that no correction overshoots,
    however alike the keys of a chunk are.

    Args:
        k: Linear keys of length 1, ``(b, g, c, s)``.
        v: Values, ``(b, g, c, e)``.
        beta: How much each token is written, 0 to 1, ``(b, g, c)``.
        log_decay: As for :func:`decayed_states`; None without.

    Returns:
        ``(b, g, s, e)`` in float32 or wider.

    Source: Schlag et al. 2021, the delta rule, here for all tokens of a chunk at once.
    """
    compute, wide = v.dtype, widened(v.dtype)
    k, write = k.to(compute), beta.to(compute)[..., None, None]
    h, keep = 1, None
    if log_decay is not None:
        weights, total = _inside_chunks(log_decay)
        h, write, keep = log_decay.shape[-1], write * weights.to(compute), total.exp()
    values = v.unflatten(-1, (h, -1))  # (b, g, c, h, r)
    sizes = torch.einsum("bgis,bgjs->bgij", k, k).to(wide).square().sum((2, 3)).sqrt().clamp(min=1.0)
    state = torch.zeros(k.shape[0], k.shape[3], *values.shape[3:], dtype=wide, device=k.device)
    found = [state]
    for chunk in range(k.shape[1] - 1):
        if keep is not None:
            state = state * keep[:, chunk, None, :, None]
        own = k[:, chunk]
        wrong = values[:, chunk] - torch.einsum("bjs,bshr->bjhr", own, state.to(compute))
        added = torch.einsum("bjs,bjhr->bshr", own, wrong * write[:, chunk])
        state = state + added.to(wide) / sizes[:, chunk, None, None, None]
        found.append(state)
    return torch.stack(found, dim=1).flatten(-2)


@without_autocast
def read_states(q: torch.Tensor, states: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """What queries ``(b, g, c, s)`` find in states ``(b, g, s, e)``: ``(b, g, c, e)`` in ``compute``."""
    return torch.einsum("bgis,bgse->bgie", q.to(compute), states.to(compute))


@without_autocast
def grouped_norm(x: torch.Tensor, gain: torch.Tensor, groups: int) -> torch.Tensor:
    """Root mean square norm of each group of columns, times ``gain`` ``(e,)``; ``(..., e)`` as ``x``."""
    wide = x.to(widened(x.dtype)).unflatten(-1, (groups, -1))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (normed.flatten(-2) * gain).to(x.dtype)


def _inside_chunks(log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of tokens at their chunk's end (b, g, c, h, 1), and the log decay of chunks (b, g, h)."""
    sums = log_decay.cumsum(2)
    return (sums[:, :, -1:] - sums).clamp(max=0).exp().unsqueeze(-1), sums[:, :, -1]


def _weighed(v: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Values (b, g, c, e) times weights of their groups (b, g, c, h, 1)."""
    return (v.unflatten(-1, (weights.shape[-2], -1)) * weights.to(v.dtype)).flatten(-2)
