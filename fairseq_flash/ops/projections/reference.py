"""Gate, values and base from one projection, and queries and keys as cheap copies of the base."""

from __future__ import annotations

import torch

from fairseq_flash.ops.positions import apply_rotary

__all__ = ["offset_scale", "rotated_copies", "split_silu"]


def split_silu(projected: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """SiLU of a dense layer's output, cut into its parts.

    Args:
        projected: Pre-activations, ``(b, n, w)``.
        sizes: Of the parts, such as ``[e, e, s]`` for ``u``, ``v`` and ``z``; their sum is ``w``.

    Returns:
        The parts, views of one tensor.

    Source: Hua et al. 2022, section 3.1.
    """
    return torch.nn.functional.silu(projected).split(sizes, dim=-1)


def offset_scale(z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    r"""Makes ``h`` copies of the base, :math:`\gamma_h z + \beta_h`.

    Args:
        z: ``(b, n, s)``.
        gamma: ``(h, s)``.
        beta: ``(h, s)``.

    Returns:
        ``(h, b, n, s)``: every copy contiguous.

    Source: Hua et al. 2022, section 3.1.
    """
    return z * gamma[:, None, None] + beta[:, None, None]


def rotated_copies(
    z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Queries and keys: :func:`offset_scale`, then rotary positions.

    Args:
        z: ``(b, n, s)``, ``s`` even.
        gamma: ``(h, s)``.
        beta: ``(h, s)``.
        cos: Rotary cosines, ``(n, s/2)`` or ``(b, n, s/2)``.
        sin: Rotary sines, likewise.

    Returns:
        ``(h, b, n, s)``.
    """
    return apply_rotary(offset_scale(z, gamma, beta), cos, sin)
