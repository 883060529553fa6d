"""Squared-ReLU attention over the positions of a chunk, or of a whole row (FLASH-Quad)."""

from __future__ import annotations

from typing import Union

import torch

from fairseq_flash.ops.precision import ranged, widened, without_autocast

__all__ = ["quadratic_attention", "quadratic_scores"]


@without_autocast
def quadratic_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    causal: bool,
    denominator: Union[float, torch.Tensor],
) -> torch.Tensor:
    r"""Attends to every position of the same chunk.

    .. math:: \hat V_g = \mathrm{relu}^2\bigl(Q_g K_g^\top / \mathrm{denominator} + B\bigr)\, V_g

    The squares are computed in float32 for float16 tensors (the raw square overflows beyond 256), otherwise
    in the dtype of ``v``, whose range is float32's or wider.

    Args:
        q: Queries, ``(b, g, i, s)``; not scaled, the division happens here.
        k: Keys, ``(b, g, j, s)``.
        v: Values, ``(b, g, j, e)``; padding positions already zero.
        bias: Relative position bias, ``(i, j)`` or ``(b, 1, i, j)``, added after the division.
        causal: Whether query ``i`` sees only keys ``j <= i``; needs as many keys as queries.
        denominator: Of the scores: the chunk size, ``n_ref``, or the valid tokens of each row ``(b,)``.

    Returns:
        ``(b, g, i, e)`` in the dtype of ``v``, not yet gated.

    Raises:
        ValueError: causal with unequal numbers of queries and keys.

    Source: Hua et al. 2022, section 3.1 and the quadratic branch of section 3.2.
    """
    i, j = q.shape[2], k.shape[2]
    if causal and i != j:
        raise ValueError(f"causal=True needs as many queries as keys, got {i} and {j}")
    compute = ranged(v.dtype)
    bias = bias.to(compute)
    if causal:
        # relu turns the minus infinity into an exact zero, in both passes.
        bias = bias.masked_fill(torch.ones(i, j, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    attention = quadratic_scores(q, k, bias, denominator).relu().square()
    return torch.bmm(attention, v.to(compute).flatten(0, 1)).unflatten(0, v.shape[:2]).to(v.dtype)


@without_autocast
def quadratic_scores(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, denominator: Union[float, torch.Tensor]
) -> torch.Tensor:
    """What :func:`quadratic_attention` takes the squared ReLU of.

    Args:
        q: Queries, ``(b, g, i, s)``.
        k: Keys, ``(b, g, j, s)``.
        bias: ``(i, j)`` or ``(b, 1, i, j)``; its dtype is that of the scores.
        denominator: A number, or one for each row ``(b,)``, or ``(1,)`` for all.

    Returns:
        ``(b g, i, j)``, in the dtype of ``bias``.
    """
    b, g, i, _ = q.shape
    j, compute = k.shape[2], bias.dtype
    if isinstance(denominator, torch.Tensor):
        # Divided before it is narrowed: bfloat16 has no 2049.
        wide = widened(compute)
        q, scale = q.to(wide) / denominator.to(wide).view(-1, 1, 1, 1), 1.0
    else:
        scale = 1.0 / denominator
    return torch.baddbmm(
        bias.expand(b, g, i, j).reshape(b * g, i, j) if bias.dim() == 4 else bias,
        q.to(compute).flatten(0, 1),
        k.to(compute).flatten(0, 1).transpose(1, 2),
        alpha=scale,
    )
