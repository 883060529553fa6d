"""Gate, values and base from one projection, and queries and keys as cheap copies of the base."""

from __future__ import annotations

from typing import Optional

import torch

from fairseq_flash.ops.positions import apply_rotary

__all__ = ["offset_scale", "rotated_copies", "shifted", "split_silu"]


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


def shifted(z: torch.Tensor, before: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The base of shifted keys: every second rotated pair of columns, half of them, is of the token before.

    So a layer finds, by what a token is, the token that came after the same one earlier.

    Args:
        z: Base, ``(b, n, s)``, before SiLU or after it.
        before: That of the token before the first, ``(b, 1, s)``; None for zeros, at the start of a row.

    Returns:
        ``(b, n, s)``.

    Source: Xu et al. 2024 (KV shifting attention); of half the columns, as in modded-nanogpt.
    """
    s = z.shape[-1]
    if before is None:
        earlier = torch.nn.functional.pad(z, (0, 0, 1, 0))[:, :-1]
    else:
        earlier = before.to(z.dtype)
        if z.shape[1] != 1:
            earlier = torch.cat((earlier, z[:, :-1]), dim=1)
    return torch.where(torch.arange(s, device=z.device) % (s // 2) % 2 == 1, earlier, z)


def offset_scale(
    z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, keys: Optional[torch.Tensor] = None
) -> torch.Tensor:
    r"""Makes ``h`` copies of the base, :math:`\gamma_h z + \beta_h`.

    Args:
        z: ``(b, n, s)``.
        gamma: ``(h, s)``.
        beta: ``(h, s)``.
        keys: Base of every second copy, ``(b, n, s)``; None for ``z``.

    Returns:
        ``(h, b, n, s)``: every copy contiguous.

    Source: Hua et al. 2022, section 3.1.
    """
    if keys is None:
        return z * gamma[:, None, None] + beta[:, None, None]
    scale, offset = (x.unflatten(0, (-1, 2))[:, :, None, None] for x in (gamma, beta))
    return (torch.stack((z, keys)) * scale + offset).flatten(0, 1)


def rotated_copies(
    z: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Queries and keys: :func:`offset_scale`, then rotary positions.

    Args:
        z: ``(b, n, s)``, ``s`` even.
        gamma: ``(h, s)``.
        beta: ``(h, s)``.
        cos: Rotary cosines, ``(n, s/2)`` or ``(b, n, s/2)``.
        sin: Rotary sines, likewise.
        keys: As for :func:`offset_scale`.

    Returns:
        ``(h, b, n, s)``.
    """
    return apply_rotary(offset_scale(z, gamma, beta, keys), cos, sin)
