"""Products and rotations that are written where they belong, for the fast path in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_or_put", "add_product", "rotated"]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As :func:`~fairseq_flash.ops.apply_rotary`, written half by half into the result.

    Args:
        x: ``(..., n, s)``.
        cos: ``(n, s/2)`` or ``(b, n, s/2)``.
        sin: Likewise; its negative rotates back.

    Returns:
        As ``x``, in its dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    out = torch.empty_like(wide)
    (x1, x2), (y1, y2) = wide.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return out.to(x.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds ``a b`` to ``total``: a product of narrower tensors is rounded once, the sum never.

    Args:
        total: ``(b, i, j)``, changed.
        a: ``(b, i, k)``.
        b: ``(b, k, j)``.
    """
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def add_or_put(total: Tensor, columns: slice, a: Tensor, b: Tensor) -> None:
    """Writes ``a b`` to the first ``columns`` of ``total``: puts it there if they are all, else adds it.

    Args:
        total: ``(b, j, w)``, changed.
        columns: From 0.
        a: ``(b, columns, i)``.
        b: ``(b, i, w)``.
    """
    if columns.stop == total.shape[1]:
        torch.bmm(a, b, out=total)
    else:
        total[:, columns].baddbmm_(a, b)
