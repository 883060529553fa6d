"""The linear branch: every token reads the summed keys and values of other chunks, at constant cost."""

from __future__ import annotations

import math
from typing import Optional

import torch

from fairseq_flash.ops.precision import ranged, widened, without_autocast

__all__ = [
    "LINEAR_NORMS",
    "chunk_summaries",
    "exclusive_sum",
    "kept_of_chunks",
    "linear_attention",
    "linear_denominator",
]

LINEAR_NORMS = ("chunk", "mean", "fading")
#: Of a fading mean: groups of values at most, and the chunks after which the slowest has lost half.
GROUPS, LONGEST = 16, 16
#: Chunks whose weights are one matrix.
BLOCK = 64


@without_autocast
def chunk_summaries(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``k^T v`` of every chunk.

    Args:
        k: Linear keys, ``(b, g, c, s)``.
        v: Values, ``(b, g, c, e)``; padding positions already zero.

    Returns:
        ``(b, g, s, e)`` in float32, or float64 if the input is. For bfloat16 each chunk's summary is rounded
        to bfloat16 once, the sums over chunks never.
    """
    compute = ranged(v.dtype)
    kv = torch.einsum("bgjs,bgje->bgse", k.to(compute), v.to(compute))
    return kv.to(widened(v.dtype))


def kept_of_chunks(linear_norm: str, e: int, device: torch.device) -> Optional[torch.Tensor]:
    """What weight an earlier chunk keeps when another one has passed, group by group of the values.

    Half-lives grow evenly in scale from one chunk to ``LONGEST`` chunks. They are fixed, and count chunks: a
    token's weight depends on its chunk alone.

    Args:
        linear_norm: One of ``LINEAR_NORMS``.
        e: Columns of the values; there are as many groups as divide it, at most ``GROUPS``.
        device: Of the result.

    Returns:
        ``(groups,)`` in float64, each for ``e / groups`` columns side by side; None unless ``"fading"``. One
        group, of odd ``e``, has a half-life of a chunk.

    Source: ours; several scales as in RetNet (Sun et al. 2023), groups of values as in Mamba-2 (Dao and Gu
    2024), on the chunk's border, where the state is read.
    """
    if linear_norm != "fading":
        return None
    groups = math.gcd(GROUPS, e)
    scale = torch.linspace(0, 1, groups, dtype=torch.float64, device=device)
    return 0.5 ** (1 / LONGEST**scale)


@without_autocast
def exclusive_sum(
    kv: torch.Tensor, initial: torch.Tensor, kept: Optional[torch.Tensor] = None
) -> torch.Tensor:
    r"""Sums the summaries of strictly earlier chunks, :math:`S_g = a S_{g-1} + K_{g-1}^\top V_{g-1}`.

    A shift of the inclusive sum, never "inclusive minus own", which would leak a chunk's own content by
    rounding.

    Args:
        kv: Summaries of all chunks but the last, ``(b, g - 1, s, e)``.
        initial: Sum of everything before the first chunk, ``(b, s, e)``.
        kept: ``a``, from :func:`kept_of_chunks`; None for 1.

    Returns:
        ``(b, g, s, e)``.
    """
    whole = torch.cat((initial.unsqueeze(1), kv), dim=1)
    if kept is None:
        return whole.cumsum(dim=1)
    return _fading_sum(whole.unflatten(-1, (kept.shape[0], -1)), kept.to(whole.dtype)).flatten(-2)


def _fading_sum(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The running sum of (b, g, s, h, r) along g, in which what came before keeps the share ``kept`` (h,)."""
    g = x.shape[1]
    if not torch.jit.is_tracing() and g > BLOCK:
        # Block by block, and then what each block is given by all before it.
        blocks = torch.nn.functional.pad(x, (0, 0) * 3 + (0, -g % BLOCK)).unflatten(1, (-1, BLOCK))
        inside = _fading_sum(blocks.flatten(0, 1), kept).view_as(blocks)
        before = _fading_sum(inside[:, :-1, -1], kept**BLOCK)
        shares = kept ** torch.arange(1, BLOCK + 1, device=x.device)[:, None]
        first, others = inside.split([1, inside.shape[1] - 1], dim=1)
        others = torch.addcmul(others, before.unsqueeze(2), shares[:, None, :, None])
        return torch.cat((first, others), dim=1).flatten(1, 2)[:, :g]
    back = torch.arange(g, device=x.device)[:, None] - torch.arange(g, device=x.device)
    weights = (kept ** back.clamp(min=0)[..., None]).masked_fill((back < 0)[..., None], 0)
    return torch.einsum("gph,bpshr->bgshr", weights, x)


def linear_denominator(
    linear_norm: str, chunk_size: int, count: torch.Tensor, e: int, dtype: torch.dtype
) -> torch.Tensor:
    """What the linear branch is divided by.

    Args:
        linear_norm: ``"chunk"`` (the paper), ``"mean"`` or ``"fading"``.
        chunk_size: ``c``.
        count: Tokens that were summed, any shape; for ``"fading"`` whole chunks.
        e: Columns of the values.
        dtype: Of the result.

    Returns:
        ``c``, or ``max(1, count)``, of each token its weight, ``(*count.shape, 1)``; for ``"fading"`` of
        each column, ``(*count.shape, e)``.

    Raises:
        ValueError: ``linear_norm`` is unknown.
    """
    if linear_norm not in LINEAR_NORMS:
        raise ValueError(f"linear_norm={linear_norm!r} is unknown; allowed: {', '.join(LINEAR_NORMS)}")
    count = count.unsqueeze(-1)
    if linear_norm == "chunk":
        return torch.full_like(count, chunk_size, dtype=dtype)
    kept = kept_of_chunks(linear_norm, e, count.device)
    if kept is not None:
        weights = chunk_size * (1 - kept ** (count // chunk_size)) / (1 - kept)
        count = weights.repeat_interleave(e // len(kept), dim=-1)
    return count.clamp(min=1).to(dtype)


@without_autocast
def linear_attention(q: torch.Tensor, kv_sum: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    r"""Reads the summed chunks.

    .. math:: \hat V_g = Q_g \Bigl(\sum_p K_p^\top V_p\Bigr) / \mathrm{denominator}_g

    Args:
        q: Linear queries, ``(b, g, c, s)``.
        kv_sum: What each chunk may see, ``(b, g, s, e)``, from :func:`exclusive_sum` for causal attention;
            ``(b, 1, s, e)`` of all chunks for bidirectional.
        denominator: ``(b, g, 1)`` or ``(b, g, e)``, for bidirectional ``(b, 1, 1)``, from
            :func:`linear_denominator`.

    Returns:
        ``(b, g, c, e)`` in the dtype of ``q``; the product runs in that dtype (float32 for float16).

    Source: Hua et al. 2022, section 3.2, the linear branch.
    """
    compute = ranged(q.dtype)
    # The sum grows with the position: divided before it is narrowed.
    kv_mean = (kv_sum / denominator.unsqueeze(2).to(kv_sum.dtype)).to(compute)
    return torch.einsum("bgis,bgse->bgie", q.to(compute), kv_mean).to(q.dtype)
