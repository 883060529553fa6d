"""Softmax attention, as Transformers have it: for the systems that FLASH is compared with."""

from __future__ import annotations

from typing import Optional

import torch

__all__ = ["softmax_attention"]


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: Optional[torch.Tensor] = None,
    *,
    dropout: float = 0.0,
) -> torch.Tensor:
    r"""Attends by normalised scores, through PyTorch's own fused kernels.

    .. math:: \hat V = \mathrm{softmax}\bigl(Q K^\top / \sqrt r\bigr)\, V

    Args:
        q: Queries, ``(..., n, r)``; not scaled.
        k: Keys, ``(..., m, r)``.
        v: Values, ``(..., m, r)``.
        visible: Which keys a query sees, at least one, broadcastable to ``(..., n, m)``; None for causal
            attention of as many keys as queries.
        dropout: Of the normalised scores, 0 to below 1.

    Returns:
        ``(..., n, r)`` in the dtype of ``v``; the softmax runs in float32, or wider if the input is.

    Raises:
        ValueError: ``visible`` is None with unequal numbers of queries and keys.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    n, m = q.shape[-2], k.shape[-2]
    if visible is None and n != m:
        raise ValueError(f"visible=None needs as many queries as keys, got {n} and {m}")
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=visible is None)
