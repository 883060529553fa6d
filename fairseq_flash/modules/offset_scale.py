"""Queries and keys as cheap copies of one shared base."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from fairseq_flash.modules.checks import check_sizes
from fairseq_flash.ops import offset_scale

__all__ = ["OffsetScale"]


class OffsetScale(nn.Module):
    r"""Makes ``h`` copies of the base, :math:`\gamma_h z + \beta_h`.

    Args:
        dim: ``s``.
        copies: ``h``; gamma starts at N(0, 0.02), beta at zero.

    Source: Hua et al. 2022, section 3.1.
    """

    def __init__(self, dim: int, copies: int) -> None:
        super().__init__()
        check_sizes(dim=dim, copies=copies)
        self.gamma = nn.Parameter(torch.empty(copies, dim).normal_(std=0.02))
        self.beta = nn.Parameter(torch.zeros(copies, dim))

    def forward(self, z: torch.Tensor, keys: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Takes ``(b, n, s)``, gives ``(h, b, n, s)``: every copy contiguous, every second of ``keys``."""
        return offset_scale(z, self.gamma, self.beta, keys)
