"""Learned parts of the positions: the scaled sinusoid at the input and the relative bias of the scores."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from fairseq_flash.modules.checks import check_choice, check_even, check_sizes, require
from fairseq_flash.ops import (
    rotary_angles,
    rotary_bias,
    rotary_bias_by_distance,
    scaled_sin,
    toeplitz_bias,
)

__all__ = [
    "RELATIVE_BIASES",
    "RotaryBias",
    "ScaledSin",
    "ToeplitzBias",
    "build_relative_bias",
]

RELATIVE_BIASES = ("toeplitz", "rotary")


class ScaledSin(nn.Module):
    """Sinusoidal positions times one learned number, for positions of any size.

    Args:
        dim: ``d``, even.

    Raises:
        ValueError: ``dim`` is odd.

    Source: Hua et al. 2022, ScaledSin.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_sizes(embed_dim=dim)
        check_even("embed_dim", dim)
        self.dim = dim
        self.alpha = nn.Parameter(torch.full((1,), dim**-0.5))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Takes integers ``(..., n)``, gives ``(..., n, d)`` in the dtype of the parameter."""
        return scaled_sin(positions, self.dim, self.alpha.dtype).to(self.alpha.dtype) * self.alpha


class ToeplitzBias(nn.Module):
    """Relative bias from a learned table, one value a distance.

    Args:
        limit: Longest row, ``L``; the table has ``2L - 1`` values.

    Source: Hua et al. 2022, relative position bias up to length 512.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        check_sizes(limit=limit)
        self.limit = limit
        self.table = nn.Parameter(torch.empty(2 * limit - 1).normal_(std=0.02))

    def start_near(self, height: float = 0.03) -> None:
        """Starts as :meth:`RotaryBias.start_near` does, with as many frequencies."""
        distances = torch.arange(1 - self.limit, self.limit).abs()
        cos, _ = rotary_angles(distances, 128)
        with torch.no_grad():
            self.table.copy_(height * cos.mean(dim=-1))

    def check_length(self, length: int) -> None:
        """Refuses a row of ``length`` tokens that is longer than the table.

        Raises:
            ValueError: it is.
        """
        if length > self.limit:
            raise ValueError(self._too_long.format(length=length))

    def check_lengths(self, lengths: torch.Tensor) -> None:
        """As :meth:`check_length` of rows ``(b,)``, without waiting for a GPU, which stops by itself.

        Raises:
            ValueError: one is longer than the table.
        """
        longest = lengths.max()
        require(longest <= self.limit, self._too_long, length=longest)

    @property
    def _too_long(self) -> str:
        return (
            "a row of {length} tokens is longer than the table of relative_bias='toeplitz', whose limit is "
            f"{self.limit}; shorten the rows or train with relative_bias='rotary', which has none"
        )

    def matrix(self, length: int, lengths: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The bias within a row, as a matrix.

        Args:
            length: Columns of the row, ``n``.
            lengths: Tokens in them, ``(b,)``; None for ``n``.

        Returns:
            ``(n, n)``.

        Raises:
            ValueError: the row is longer than the table.
        """
        if lengths is None or length <= self.limit:
            self.check_length(length)
            return toeplitz_bias(self.table, length)
        self.check_lengths(lengths)
        positions = torch.arange(length, device=self.table.device)
        return self(positions, positions)

    def by_distance(self, length: int) -> torch.Tensor:
        """The bias towards a key 0 to ``length - 1`` tokens back, ``(length,)``.

        Raises:
            ValueError: ``length`` is beyond the table.
        """
        self.check_length(length)
        return self.table[self.limit - 1 : self.limit - 1 + length]

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Takes ``(..., i)`` and ``(..., j)``, gives ``(..., i, j)``; lengths are the caller's to check."""
        distances = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
        # Only padding lies beyond the table.
        return self.table[(distances + self.limit - 1).clamp(0, 2 * self.limit - 2)]


class RotaryBias(nn.Module):
    """Relative bias as the product of two rotated vectors: no table, any length.

    Args:
        dim: ``s``, even.

    Source: Hua et al. 2022, relative position bias beyond length 512.
    """

    limit: Optional[int] = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_sizes(attention_dim=dim)
        check_even("attention_dim", dim)
        self.a = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.b = nn.Parameter(torch.empty(dim).normal_(std=0.02))

    def start_near(self, height: float = 0.03) -> None:
        """Starts as a smooth hill: ``height`` at distance 0, falling with the distance's logarithm.

        Two random vectors start as noise near zero, whose square no gradient can get hold of.
        """
        for vector in (self.a, self.b):
            nn.init.constant_(vector, (height / vector.numel()) ** 0.5)

    def matrix(self, length: int, lengths: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The bias within a row of ``length`` columns as a matrix, ``(n, n)``, however many hold tokens.

        It is in float32 or wider.
        """
        return toeplitz_bias(rotary_bias_by_distance(self.a, self.b, length, both=True), length)

    def by_distance(self, length: int) -> torch.Tensor:
        """The bias towards a key 0 to ``length - 1`` tokens back, ``(length,)`` in float32 or wider."""
        return rotary_bias_by_distance(self.a, self.b, length)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Takes ``(..., i)`` and ``(..., j)``, gives ``(..., i, j)``."""
        return rotary_bias(self.a, self.b, query_positions, key_positions)


def build_relative_bias(relative_bias: str, limit: int, attention_dim: int) -> nn.Module:
    """The relative bias of a layer.

    Args:
        relative_bias: ``"toeplitz"`` or ``"rotary"``.
        limit: Longest row (the chunk, where attention stays in chunks); used by ``"toeplitz"``.
        attention_dim: ``s``; used by ``"rotary"``.

    Returns:
        A module with ``matrix(length, lengths)`` and ``forward(query_positions, key_positions)``.

    Raises:
        ValueError: ``relative_bias`` is unknown.
    """
    check_choice("relative_bias", relative_bias, RELATIVE_BIASES)
    return ToeplitzBias(limit) if relative_bias == "toeplitz" else RotaryBias(attention_dim)
