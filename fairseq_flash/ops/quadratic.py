"""Squared-ReLU attention over the positions of a chunk, or of a whole row (FLASH-Quad)."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch

from fairseq_flash.ops.backend import check_backend, without_autocast

__all__ = ["QuadraticState", "quadratic_attention"]


class QuadraticState(NamedTuple):
    """What FLASH-Quad remembers of a row: every key and value, so it grows with the position.

    Attributes:
        k: Keys, ``(b, m, s)``.
        v: Values, ``(b, m, e)``; zero where the column was padding.
        key_positions: Position of each column in its row, ``(b, m)``.
        position: Valid tokens so far, ``(b,)``.
    """

    k: torch.Tensor
    v: torch.Tensor
    key_positions: torch.Tensor
    position: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor, attention_dim: int, expanded_dim: int) -> QuadraticState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device."""
        b = like.shape[0]
        integers = torch.zeros(b, 0, dtype=torch.long, device=like.device)
        return cls(
            like.new_zeros(b, 0, attention_dim), like.new_zeros(b, 0, expanded_dim), integers, integers.sum(1)
        )

    def extend(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, padding_mask: Optional[torch.Tensor]
    ) -> QuadraticState:
        """Appends keys ``(b, n, s)`` and values ``(b, n, e)`` of tokens at ``positions`` ``(b, n)``."""
        valid = torch.ones_like(positions) if padding_mask is None else (~padding_mask).long()
        if padding_mask is not None:
            v = v.masked_fill(padding_mask.unsqueeze(-1), 0)
        return QuadraticState(
            torch.cat((self.k, k), dim=1),
            torch.cat((self.v, v), dim=1),
            torch.cat((self.key_positions, positions), dim=1),
            self.position + valid.sum(1),
        )


@without_autocast
def quadratic_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    causal: bool,
    denominator: Union[float, torch.Tensor],
    backend: str = "auto",
) -> torch.Tensor:
    r"""Attends to every position of the same chunk.

    .. math:: \hat V_g = \mathrm{relu}^2\bigl(Q_g K_g^\top / \mathrm{denominator} + B\bigr)\, V_g

    The squares are computed in float32 for float16 tensors (the raw square overflows beyond 256), otherwise
    in the dtype of ``v``, whose range is float32's or wider.

    Args:
        q: Queries, ``(b, g, i, s)``; not scaled, the division happens here.
        k: Keys, ``(b, g, j, s)``.
        v: Values, ``(b, g, j, e)``; padding positions already zero.
        bias: Relative position bias, ``(i, j)`` or ``(b, 1, i, j)``, added after the division.
        causal: Whether query ``i`` sees only keys ``j <= i``; needs as many keys as queries.
        denominator: Of the scores: the chunk size, ``n_ref``, or the valid tokens of each row ``(b,)``.
        backend: ``"auto"`` or ``"reference"``.

    Returns:
        ``(b, g, i, e)`` in the dtype of ``v``, not yet gated.

    Raises:
        ValueError: causal with unequal numbers of queries and keys, or the backend cannot run.

    Source: Hua et al. 2022, section 3.1 and the quadratic branch of section 3.2.
    """
    check_backend(backend)
    b, g, i, _ = q.shape
    j = k.shape[2]
    if causal and i != j:
        raise ValueError(f"causal=True needs as many queries as keys, got {i} and {j}")
    compute = torch.float32 if v.dtype == torch.float16 else v.dtype
    bias = bias.to(compute)
    if causal:
        # relu turns the minus infinity into an exact zero, in both passes.
        bias = bias.masked_fill(torch.ones(i, j, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    if isinstance(denominator, torch.Tensor):
        q, scale = q.to(compute) / denominator.to(compute).view(b, 1, 1, 1), 1.0
    else:
        scale = 1.0 / denominator
    scores = torch.baddbmm(
        bias.expand(b, g, i, j).reshape(b * g, i, j) if bias.dim() == 4 else bias,
        q.to(compute).flatten(0, 1),
        k.to(compute).flatten(0, 1).transpose(1, 2),
        alpha=scale,
    )
    attention = scores.relu().square()
    return torch.bmm(attention, v.to(compute).flatten(0, 1)).unflatten(0, (b, g)).to(v.dtype)
