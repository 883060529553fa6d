"""Positions: rotary and sinusoidal encodings, and the two relative biases of the paper's code.

Nothing here has a maximum length: angles are computed for the positions at hand, so that position 100 000 is
as exact as position 1; only the Toeplitz bias has a table, and it says so.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fairseq_flash.ops.precision import widened

__all__ = [
    "apply_rotary",
    "check_even",
    "rotary",
    "rotary_angles",
    "rotary_bias",
    "rotary_bias_by_distance",
    "scaled_sin",
    "summed_angles",
    "toeplitz_bias",
    "trailing_padding",
]

#: Positions are written in this base, with three digits: those below 2 ** 33 have angles of their own.
BASE = 2048


def check_even(name: str, size: int) -> None:
    """Refuses an odd ``size`` of the argument ``name``.

    Raises:
        ValueError: it is odd.
    """
    if size % 2:
        raise ValueError(f"{name}={size} is odd; allowed: even numbers, whose halves are rotated")


def trailing_padding(lengths: torch.Tensor, n: int) -> torch.Tensor:
    """Padding behind ``lengths`` ``(b,)`` valid tokens: ``(b, n)``, True at padding."""
    return torch.arange(n, device=lengths.device) >= lengths.unsqueeze(1)


def rotary_angles(
    positions: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Cosine and sine of :math:`\mathrm{position} \cdot 10000^{-i / (s/2)}`.

    Args:
        positions: Integers, ``(..., n)``, 0 to 2 ** 33 - 1.
        dim: ``s``, even.
        dtype: Of the result; float16 and bfloat16 are widened to float32.

    Returns:
        Cosines and sines, each ``(..., n, s/2)``, exact to the rounding of ``dtype`` at any position: through
        float64 on a CPU and for float64, as :func:`summed_angles` elsewhere.

    Raises:
        ValueError: ``dim`` is odd.

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    check_even("attention_dim", dim)
    dtype = widened(dtype)
    if dtype != torch.float64 and not positions.is_cpu:
        return summed_angles(positions, dim)
    angles = positions.double().unsqueeze(-1) * _frequencies(dim, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def summed_angles(positions: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""As :func:`rotary_angles` in float32, without float64 on the device of the positions.

    A position is a number of three digits, whose angles add up:
    :math:`e^{i \omega (h + l)} = e^{i \omega h} e^{i \omega l}`. Those of each digit come from a table that
    the host computes in float64, once; what remains is the rounding of two products.

    Args:
        positions: Integers, ``(..., n)``, 0 to 2 ** 33 - 1.
        dim: ``s``, even.

    Returns:
        Cosines and sines, each ``(..., n, s/2)``.
    """
    tables = _digit_tables(dim, positions.device)
    cos, sin = tables[0][(positions & (BASE - 1))].chunk(2, dim=-1)
    for digit, table in enumerate(tables[1:], start=1):
        cos_high, sin_high = table[(positions // BASE**digit) & (BASE - 1)].chunk(2, dim=-1)
        cos, sin = cos * cos_high - sin * sin_high, sin * cos_high + cos * sin_high
    return cos, sin


def _frequencies(dim: int, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2)
    return torch.pow(10000.0, -exponents)


@torch.compiler.assume_constant_result
def _digit_tables(dim: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of every value of every digit: (3, BASE, s)."""
    return _cached_digit_tables(dim, device)


# A compiler looks through a cache, and would make the table on the host, and copy it, in every pass.
@functools.lru_cache(maxsize=16)
def _cached_digit_tables(dim: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        digits = torch.arange(BASE, dtype=torch.float64)
        powers = BASE ** torch.arange(3, dtype=torch.float64)
        angles = (powers.view(3, 1, 1) * digits.view(1, -1, 1)) * _frequencies(dim, torch.device("cpu"))
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(device)


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
        positions: Integers, ``(..., n)``, 0 to 2 ** 33 - 1.
        dim: ``d``, even.
        dtype: Of the result; float16 and bfloat16 are widened to float32.

    Returns:
        ``(..., n, d)``.

    Raises:
        ValueError: ``dim`` is odd.

    Source: Hua et al. 2022, ScaledSin.
    """
    check_even("embed_dim", dim)
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


def rotary_bias_by_distance(
    a: torch.Tensor, b: torch.Tensor, length: int, *, both: bool = False
) -> torch.Tensor:
    r"""The bias of :func:`rotary_bias` as a function of the distance, from few numbers.

    .. math:: b(t) = \sum_i (a_i b_i + a'_i b'_i) \cos \omega_i t + (a_i b'_i - a'_i b_i) \sin \omega_i t

    Args:
        a: ``(s,)``, ``s`` even; :math:`a'` is its second half.
        b: ``(s,)``.
        length: Distances 0 to ``length - 1``.
        both: Whether those towards later keys, from ``1 - length`` on, come first.

    Returns:
        ``(length,)``, or ``(2 length - 1,)``, in float32 or wider.
    """
    wide = widened(a.dtype)
    (a1, a2), (b1, b2) = a.to(wide).chunk(2), b.to(wide).chunk(2)
    heights = torch.cat((a1 * b1 + a2 * b2, a1 * b2 - a2 * b1))
    begin = 1 - length if both else 0
    return _waves(begin, length, a.numel(), wide, a.device) @ heights


def _waves(begin: int, end: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Cosines, then sines, of every frequency at distances ``begin`` to ``end - 1``: (end - begin, s)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # A compiler makes it where it is used.
        return _signed_angles(torch.arange(begin, end, device=device), dim, dtype)
    # Of many lengths one table, twice as long as need be at most.
    table = _cached_waves(
        1 << (int(end) - 1).bit_length(), dim, dtype, device, torch._guards.detect_fake_mode()
    )
    middle = table.shape[0] // 2
    return table[middle + begin : middle + end]


@functools.lru_cache(maxsize=16)
def _cached_waves(
    length: int, dim: int, dtype: torch.dtype, device: torch.device, fake_mode: Any
) -> torch.Tensor:
    """Tensors without numbers, of a ``fake_mode``, never meet those with numbers."""
    with torch.inference_mode(False), torch.no_grad():
        distances = torch.arange(1 - length, length)
        return _signed_angles(distances, dim, torch.float64).to(device, dtype)


def _signed_angles(distances: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    cos, sin = rotary_angles(distances.abs(), dim, dtype)
    return torch.cat((cos, sin * distances.sign().unsqueeze(-1)), dim=-1)
