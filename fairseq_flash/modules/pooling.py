"""From the features of a row to one vector, for a classification head."""

from typing import Optional

import torch
from torch import nn

from fairseq_flash.modules.checks import check_choice, check_sizes

__all__ = ["POOLINGS", "Pooling"]

#: The first token, where ``<s>`` stands; the mean of all; the mean under learned weights.
POOLINGS = ("first", "mean", "attention")


class Pooling(nn.Module):
    r"""One vector a row: that of the first token, or :math:`\sum_i w_i x_i` over the real tokens.

    The weights are equal (``"mean"``), or :math:`w = \mathrm{softmax}(x q / \sqrt d)` of a learned vector
    ``q``, zero at the start, so that ``"attention"`` begins as the mean; in float32 or wider.

    Args:
        kind: One of ``POOLINGS``.
        embed_dim: ``d``.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(self, kind: str, embed_dim: int) -> None:
        super().__init__()
        check_choice("pooling", kind, POOLINGS)
        check_sizes(embed_dim=embed_dim)
        self.kind = kind
        self.query: Optional[nn.Parameter] = None
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, features: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """Pools ``(b, n, d)``, finite, with padding ``(b, n)`` True anywhere, to ``(b, 1, d)``."""
        if self.kind == "first":
            first = padding_mask.logical_not().int().argmax(dim=1)
            return features[torch.arange(len(first), device=first.device), first].unsqueeze(1)
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        scores = wide.new_zeros(padding_mask.shape)
        if self.query is not None:
            scores = wide @ self.query.to(wide.dtype) * wide.shape[-1] ** -0.5
        # Not minus infinity: a row of padding alone must give numbers.
        scores = scores.masked_fill(padding_mask, torch.finfo(wide.dtype).min)
        return torch.einsum("bn,bnd->bd", scores.softmax(dim=-1), wide).to(features.dtype).unsqueeze(1)
