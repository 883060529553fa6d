"""The norms a block can start with."""

from __future__ import annotations

import torch
from torch import nn

from fairseq_flash.modules.checks import check_choice, check_numbers, check_sizes
from fairseq_flash.ops.precision import widened

__all__ = ["NORMS", "ScaleNorm", "build_norm"]

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
        check_numbers(eps=eps)
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes ``(..., d)``, gives the same shape and dtype."""
        wide = x.to(widened(x.dtype))
        normalized = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normalized * self.scale).to(x.dtype)


def build_norm(norm: str, dim: int) -> nn.Module:
    """A norm over ``dim`` channels.

    Args:
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        dim: ``d``.

    Returns:
        A module from ``(..., d)`` to ``(..., d)``.

    Raises:
        ValueError: ``norm`` is unknown, or ``dim`` no size.
    """
    check_choice("norm", norm, NORMS)
    check_sizes(dim=dim)
    if norm == "layernorm":
        return nn.LayerNorm(dim)
    return ScaleNorm() if norm == "scalenorm" else nn.RMSNorm(dim, eps=1e-5)
