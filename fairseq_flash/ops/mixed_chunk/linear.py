"""The linear branch: every token reads the summed keys and values of other chunks, at constant cost."""

from __future__ import annotations

import torch

from fairseq_flash.ops.precision import ranged, widened, without_autocast

__all__ = [
    "LINEAR_NORMS",
    "chunk_summaries",
    "exclusive_sum",
    "linear_attention",
    "linear_denominator",
]

LINEAR_NORMS = ("chunk", "mean")


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


def exclusive_sum(kv: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Sums the summaries of strictly earlier chunks.

    A shift of the inclusive sum, never "inclusive minus own", which would leak a chunk's own content by
    rounding.

    Args:
        kv: Summaries of all chunks but the last, ``(b, g - 1, s, e)``.
        initial: Sum of everything before the first chunk, ``(b, s, e)``.

    Returns:
        ``(b, g, s, e)``.
    """
    return torch.cat((initial.unsqueeze(1), kv), dim=1).cumsum(dim=1)


def linear_denominator(
    linear_norm: str, chunk_size: int, count: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What the linear branch is divided by.

    Args:
        linear_norm: ``"chunk"`` (the paper) or ``"mean"``.
        chunk_size: ``c``.
        count: Tokens that were summed, any shape.
        dtype: Of the result.

    Returns:
        ``c``, or ``max(1, count)``, in the shape of ``count``.

    Raises:
        ValueError: ``linear_norm`` is unknown.
    """
    if linear_norm not in LINEAR_NORMS:
        raise ValueError(f"linear_norm={linear_norm!r} is unknown; allowed: {', '.join(LINEAR_NORMS)}")
    if linear_norm == "chunk":
        return torch.full_like(count, chunk_size, dtype=dtype)
    return count.clamp(min=1).to(dtype)


@without_autocast
def linear_attention(q: torch.Tensor, kv_sum: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    r"""Reads the summed chunks.

    .. math:: \hat V_g = Q_g \Bigl(\sum_p K_p^\top V_p\Bigr) / \mathrm{denominator}_g

    Args:
        q: Linear queries, ``(b, g, c, s)``.
        kv_sum: What each chunk may see, ``(b, g, s, e)``, from :func:`exclusive_sum` for causal attention;
            ``(b, 1, s, e)`` of all chunks for bidirectional.
        denominator: ``(b, g)`` or ``(b, 1)``, from :func:`linear_denominator`.

    Returns:
        ``(b, g, c, e)`` in the dtype of ``q``; the product runs in that dtype (float32 for float16).

    Source: Hua et al. 2022, section 3.2, the linear branch.
    """
    compute = ranged(q.dtype)
    # The sum grows with the position: divided before it is narrowed.
    kv_mean = (kv_sum / denominator[:, :, None, None].to(kv_sum.dtype)).to(compute)
    return torch.einsum("bgis,bgse->bgie", q.to(compute), kv_mean).to(q.dtype)
