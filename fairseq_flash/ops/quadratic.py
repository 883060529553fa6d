"""Squared-ReLU attention over the positions of a chunk, or of a whole row (FLASH-Quad)."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch

from fairseq_flash.ops.backend import check_backend, without_autocast

__all__ = ["NEVER", "QuadraticState", "quadratic_attention"]


#: Position of a column that holds padding: later than any token, so that nobody sees it.
NEVER = 2**62


class QuadraticState(NamedTuple):
    """A cache: every key and value of a row, so it grows with the position.

    Outside of autograd new columns are written in place into spare room, which grows by an eighth at a time:
    a step reads the cache and copies it only now and then.

    Attributes:
        k: Keys, ``(b, room, s)``.
        v: Values, ``(b, room, e)``; zero where the column was padding.
        key_positions: Position of each column in its row, ``(b, room)``; beyond any token's for padding.
        position: Valid tokens so far, ``(b,)``.
        columns: How many columns are in use.
    """

    k: torch.Tensor
    v: torch.Tensor
    key_positions: torch.Tensor
    position: torch.Tensor
    columns: int = 0

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
        """Appends tokens; outside of autograd this state must not be used again.

        Args:
            k: Keys, ``(b, n, s)``.
            v: Values, ``(b, n, e)``.
            positions: Of the tokens in their rows, ``(b, n)``.
            padding_mask: ``(b, n)``, True at padding; None without padding.

        Returns:
            The state after the tokens.
        """
        valid: Union[int, torch.Tensor] = k.shape[1]
        if padding_mask is not None:
            valid = (~padding_mask).sum(1)
            v = v.masked_fill(padding_mask.unsqueeze(-1), 0)
            positions = positions.masked_fill(padding_mask, NEVER)
        columns = self.columns + k.shape[1]
        room = 0 if torch.is_grad_enabled() else columns // 8 + 64
        parts = zip(self[:3], (k, v, positions), strict=True)
        return QuadraticState(
            *(_append(old, new, self.columns, room) for old, new in parts), self.position + valid, columns
        )

    def used(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys ``(b, m, s)``, values ``(b, m, e)`` and positions ``(b, m)`` of the columns in use: views."""
        return self.k[:, : self.columns], self.v[:, : self.columns], self.key_positions[:, : self.columns]

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """Which columns tokens at ``positions`` ``(b, n)`` may see, themselves among them: ``(b, n, m)``."""
        return self.used()[2].unsqueeze(1) <= positions.unsqueeze(2)


def _append(old: torch.Tensor, new: torch.Tensor, columns: int, room: int) -> torch.Tensor:
    """Writes ``new`` (b, n, ...) behind the columns in use, in place if it fits and autograd is off."""
    end = columns + new.shape[1]
    if torch.is_grad_enabled() or end > old.shape[1]:
        spare = new.new_zeros(new.shape[0], room, *new.shape[2:])
        return torch.cat((old[:, :columns], new.to(old.dtype), spare.to(old.dtype)), dim=1)
    old[:, columns:end] = new
    return old


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
        # Divided before it is narrowed: bfloat16 has no 2049.
        wide = torch.promote_types(compute, torch.float32)
        q, scale = q.to(wide) / denominator.to(wide).view(b, 1, 1, 1), 1.0
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
