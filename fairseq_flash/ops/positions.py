"""Positions: rotary and sinusoidal encodings, and the two relative biases of the paper's code.

Nothing here has a maximum length: angles are computed for the positions at hand, in float64, so that position
100 000 is as exact as position 1; only the Toeplitz bias has a table, and it says so.
"""

from __future__ import annotations

import torch

__all__ = ["apply_rotary", "rotary", "rotary_angles", "rotary_bias", "scaled_sin", "toeplitz_bias"]


def rotary_angles(
    positions: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cosine and sine of :math:`\mathrm{position} \cdot 10000^{-i / (s/2)}`.

    Args:
        positions: Integers, ``(..., n)``; any size.
        dim: ``s``, even.
        dtype: Of the result; float16 and bfloat16 are widened to float32.

    Returns:
        Cosines and sines, each ``(..., n, s/2)``.

    Raises:
        ValueError: ``dim`` is odd.

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    if dim % 2:
        raise ValueError(f"attention_dim={dim} is odd; rotary positions need an even number")
    half = dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / half
    angles = positions.double().unsqueeze(-1) * torch.pow(10000.0, -exponents)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs ``(x[i], x[i + s/2])`` of the last axis (half-split) by given angles.

    Args:
        x: ``(..., n, s)``.
        cos: Cosines, broadcastable to ``(..., n, s/2)``.
        sin: Sines, likewise.

    Returns:
        Like ``x``, in the dtype of ``x``; computed in the wider of the dtypes of ``x`` and ``cos``.

    Source: Su et al. 2021 (RoFormer), equation 34.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions: :func:`apply_rotary` at the angles of ``positions``.

    Args:
        x: ``(..., n, s)``, ``s`` even.
        positions: ``(n,)`` or ``(..., n)``.

    Returns:
        Like ``x``.

    Raises:
        ValueError: ``s`` is odd.
    """
    return apply_rotary(x, *rotary_angles(positions, x.shape[-1], x.dtype))


def scaled_sin(positions: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    r"""Absolute positions :math:`[\sin | \cos](\mathrm{position} \cdot 10000^{-i / (d/2)})`, not yet scaled.

    Args:
        positions: Integers, ``(..., n)``; any size.
        dim: ``d``, even.
        dtype: Of the result; float16 and bfloat16 are widened to float32.

    Returns:
        ``(..., n, d)``.

    Raises:
        ValueError: ``dim`` is odd.

    Source: Hua et al. 2022, ScaledSin.
    """
    if dim % 2:
        raise ValueError(f"embed_dim={dim} is odd; sinusoidal positions need an even number")
    cos, sin = rotary_angles(positions, dim, dtype)
    return torch.cat((sin, cos), dim=-1)


def toeplitz_bias(table: torch.Tensor, length: int) -> torch.Tensor:
    r"""Relative bias from a learned table, :math:`b(i - j) = \mathrm{table}[i - j + L - 1]`.

    Args:
        table: ``(2L - 1,)``, one value a distance from ``-(L - 1)`` to ``L - 1``.
        length: ``n``, 1 to ``L``.

    Returns:
        ``(n, n)``, row ``i`` query, column ``j`` key.

    Raises:
        ValueError: ``length`` is beyond the table.

    Source: Hua et al. 2022, relative position bias (``rel_pos_bias``, up to length 512).
    """
    limit = (table.numel() + 1) // 2
    if not 1 <= length <= limit:
        raise ValueError(f"length={length} is beyond the Toeplitz table; allowed: 1 to {limit}")
    # Every row is a window of the reversed table: a view, whose backward pass sums without an index.
    windows = table[limit - length : limit + length - 1].flip(0).unfold(0, length, 1)
    return windows.flip(0)


def rotary_bias(
    a: torch.Tensor, b: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    r"""Relative bias without a table, :math:`b(i - j) = \mathrm{rope}(a)_i \cdot \mathrm{rope}(b)_j`.

    Args:
        a: ``(s,)``, ``s`` even.
        b: ``(s,)``.
        query_positions: ``(..., i)``.
        key_positions: ``(..., j)``.

    Returns:
        ``(..., i, j)``.

    Raises:
        ValueError: ``s`` is odd.

    Source: Hua et al. 2022, relative position bias beyond length 512.
    """
    rotated_a = rotary(a.expand(*query_positions.shape, -1), query_positions)
    rotated_b = rotary(b.expand(*key_positions.shape, -1), key_positions)
    return torch.einsum("...is,...js->...ij", rotated_a, rotated_b)
