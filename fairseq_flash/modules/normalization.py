"""The norms a block can start with."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["NORMS", "RMSNorm", "ScaleNorm", "build_norm"]

NORMS = ("layernorm", "scalenorm", "rmsnorm")


class ScaleNorm(nn.Module):
    r"""Scales to a learned root mean square, :math:`g \, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`.

    Computed in float32 or wider.

    Args:
        eps: Added to the mean square.

    Source: Nguyen and Salazar 2019, in the form of Hua et al. 2022 (mean instead of sum).
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes ``(..., d)``, gives the same shape and dtype."""
        return (_normalized(x, self.eps) * self.scale).to(x.dtype)


class RMSNorm(nn.Module):
    r"""As :class:`ScaleNorm` with one scale a channel (Zhang and Sennrich 2019).

    Computed in float32 or wider.

    Args:
        dim: ``d``.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes ``(..., d)``, gives the same shape and dtype."""
        return (_normalized(x, self.eps) * self.weight).to(x.dtype)


def build_norm(norm: str, dim: int) -> nn.Module:
    """A norm over ``dim`` channels.

    Args:
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        dim: ``d``.

    Returns:
        A module from ``(..., d)`` to ``(..., d)``.

    Raises:
        ValueError: ``norm`` is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; allowed: {', '.join(NORMS)}")
    if norm == "layernorm":
        return nn.LayerNorm(dim)
    return ScaleNorm() if norm == "scalenorm" else RMSNorm(dim)


def _normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
