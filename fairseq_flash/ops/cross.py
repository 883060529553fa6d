"""Attention from one sequence to another: what a decoder reads of a source."""

from __future__ import annotations

import torch

from fairseq_flash.ops.quadratic import quadratic_attention

__all__ = ["cross_attention"]


def cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    r"""Attends to every token of a source, by content alone.

    .. math:: \hat V = \mathrm{relu}^2\bigl(Q K^\top / \sqrt s\bigr)\, V / m

    This is :func:`~fairseq_flash.ops.quadratic_attention` without a bias, under its precision, with
    :math:`\sqrt{s m}` as what scores are divided by.

    Args:
        q: Queries, ``(b, n, s)``; not scaled.
        k: Keys, ``(b, m, s)``; anything finite at padding.
        v: Values, ``(b, m, e)``; padding positions already zero.
        valid: Tokens of each source, ``(b,)``; 0 for a row of padding, which gives zeros.

    Returns:
        ``(b, n, e)`` in the dtype of ``v``, not yet gated.

    Source: Hua et al. 2022, section 3.1, with the source in place of the row itself.
    """
    denominator = (q.shape[-1] * valid.clamp(min=1)).double().sqrt()
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    no_bias = q.new_zeros(1, 1)
    out = quadratic_attention(q, k, v, no_bias, causal=False, denominator=denominator)
    return out.squeeze(1)
