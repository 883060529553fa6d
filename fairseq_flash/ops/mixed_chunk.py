"""Mixed chunk attention: quadratic inside the chunk, linear across chunks."""

from __future__ import annotations

from typing import Optional

import torch

from fairseq_flash.ops.backend import check_backend
from fairseq_flash.ops.chunk_state import ChunkState
from fairseq_flash.ops.linear import chunk_summaries, exclusive_sum, linear_attention, linear_denominator
from fairseq_flash.ops.quadratic import quadratic_attention
from fairseq_flash.ops.softmax import softmax_attention

__all__ = ["mixed_chunk_attention"]


def mixed_chunk_attention(
    q_quad: Optional[torch.Tensor],
    k_quad: Optional[torch.Tensor],
    q_lin: Optional[torch.Tensor],
    k_lin: Optional[torch.Tensor],
    v: torch.Tensor,
    bias: Optional[torch.Tensor],
    *,
    causal: bool,
    chunk_size: int,
    linear_norm: str = "mean",
    padding_mask: Optional[torch.Tensor] = None,
    state: Optional[ChunkState] = None,
    softmax: bool = False,
    attention_dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, Optional[ChunkState]]:
    r"""Attends inside the chunk and, linearly, to other chunks.

    .. math::
        \hat V_g = \mathrm{relu}^2\bigl(Q^{quad}_g {K^{quad}_g}^\top / c + B\bigr) V_g
            + Q^{lin}_g \Bigl(\sum_{p<g} {K^{lin}_p}^\top V_p\Bigr) / c

    The sum runs over strictly earlier chunks if causal, over all chunks if not. Without ``q_quad`` only the
    linear branch is computed (GlobalOnly), without ``q_lin`` only the quadratic one (LocalOnly).

    Args:
        q_quad: Quadratic queries, ``(b, n, s)``, rotated, not scaled.
        k_quad: Quadratic keys, ``(b, n, s)``.
        q_lin: Linear queries, ``(b, n, s)``.
        k_lin: Linear keys, ``(b, n, s)``.
        v: Values, ``(b, n, e)``.
        bias: Relative position bias, ``(c, c)``, added before the squared ReLU; its leading corner serves a
            row that is shorter; unused by softmax attention.
        causal: Whether a token sees only tokens before it.
        chunk_size: ``c``, at least 1; what scores are divided by, however short the row.
        linear_norm: ``"chunk"`` divides the linear branch by ``c``, ``"mean"`` by the number of tokens
            summed.
        padding_mask: ``(b, n)``, True at padding, which may only trail; None without padding.
        state: What came before, for causal attention; None at the start of a row if no state is wanted back.
        softmax: Whether the quadratic branch is causal softmax attention (MC-TFM++).
        attention_dropout: Of the normalised scores of softmax attention, 0 to below 1.
        backend: ``"auto"`` or ``"reference"``.

    Returns:
        ``(b, n, e)`` in the dtype of ``v``, not yet gated, finite and meaningless at padding; and the state
        after the last valid token of each row, None if none came in.

    Raises:
        ValueError: neither branch has queries, a state or softmax attention with ``causal=False``, or the
            backend cannot run.

    Source: Hua et al. 2022, section 3.2, mixed chunk attention.
    """
    check_backend(backend)
    if q_quad is None and q_lin is None:
        raise ValueError("q_quad and q_lin are both None; one branch is needed")
    if softmax and not causal:
        raise ValueError("softmax=True with causal=False is not allowed; allowed: causal=True")
    if padding_mask is not None:
        v = v.masked_fill(padding_mask.unsqueeze(-1), 0)

    def inside(q, k, v):
        if softmax:
            return softmax_attention(q, k, v, dropout=attention_dropout)
        c, denominator = v.shape[2], float(chunk_size)
        return quadratic_attention(
            q, k, v, bias[:c, :c], causal=causal, denominator=denominator, backend=backend
        )

    if state is not None:
        if not causal:
            raise ValueError("state is given with causal=False; only causal attention can be continued")
        return _continue(
            inside, q_quad, k_quad, q_lin, k_lin, v, chunk_size, linear_norm, padding_mask, state, backend
        )
    length = v.shape[1]
    c = min(chunk_size, length)
    grid = [None if x is None else _to_chunks(x, c) for x in (q_quad, k_quad, q_lin, k_lin, v)]
    kv_sum = denominator = None
    if q_lin is not None:
        kv_sum = _whole_row_sum(grid[3], grid[4], causal)
        count = _tokens_summed(grid[4], causal, length, padding_mask)
        denominator = linear_denominator(linear_norm, chunk_size, count, kv_sum.dtype)
    out = _chunk_outputs(inside, *grid, kv_sum, denominator, backend)
    return out.flatten(1, 2)[:, :length], None


def _to_chunks(x: torch.Tensor, c: int) -> torch.Tensor:
    """(b, n, s) to (b, g, c, s), the last chunk filled up with zeros."""
    missing = -x.shape[1] % c
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(1, (-1, c))


def _whole_row_sum(k_lin: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Sum of the chunks that each chunk sees, of a row that starts here: (b, g or 1, s, e)."""
    if not causal:
        return chunk_summaries(k_lin.flatten(1, 2).unsqueeze(1), v.flatten(1, 2).unsqueeze(1))
    b, _, _, s = k_lin.shape
    # Nobody reads the summary of the last chunk.
    kv = chunk_summaries(k_lin[:, :-1], v[:, :-1])
    return exclusive_sum(kv, kv.new_zeros(b, s, v.shape[-1]))


def _tokens_summed(
    v: torch.Tensor, causal: bool, length: int, padding_mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """Valid tokens in each sum of a row that starts here: (b, g or 1)."""
    b, g, c, _ = v.shape
    if causal:
        return (torch.arange(g, device=v.device) * c).expand(b, g)
    if padding_mask is None:
        return torch.full((b, 1), length, device=v.device)
    return (~padding_mask).sum(1, keepdim=True)


def _chunk_outputs(inside, q_quad, k_quad, q_lin, k_lin, v, kv_sum, denominator, backend):
    """Both branches on the grid: all tensors (b, g, c, .), the result (b, g, c, e)."""
    out = None if q_quad is None else inside(q_quad, k_quad, v)
    if q_lin is not None:
        across = linear_attention(q_lin, kv_sum, denominator, backend=backend)
        out = across if out is None else out + across
    return out


def _continue(inside, q_quad, k_quad, q_lin, k_lin, v, c, linear_norm, padding_mask, state, backend):
    """Parallel attention over a piece of any length that continues ``state``, each row from its own slot."""
    b, n, _ = v.shape
    fill = (state.position % c).unsqueeze(1)
    lengths = torch.full_like(fill, n) if padding_mask is None else (~padding_mask).sum(1, keepdim=True)
    end = fill + lengths
    # Long enough for the fullest open chunk, so that the length of the grid needs no look at the device.
    slots = torch.arange(-(-(c - 1 + n) // c) * c, device=v.device)
    source = torch.where(slots < fill, slots, slots - fill + c)
    source = torch.where(slots < end, source, c + n)

    def to_grid(x, ring):
        if x is None:
            return None
        ring = x.new_zeros(b, c, x.shape[-1]) if ring is None else ring
        tokens = torch.cat((ring, x, x.new_zeros(b, 1, x.shape[-1])), dim=1)
        return _take(tokens, source).unflatten(1, (-1, c))

    q_quad, q_lin = to_grid(q_quad, None), to_grid(q_lin, None)
    k_quad, k_lin, v = to_grid(k_quad, state.k_quad), to_grid(k_lin, state.k_lin), to_grid(v, state.v)
    kv_sum = denominator = None
    if q_lin is not None:
        # The rest of the ring is the chunk before the open one: every chunk of this grid sees all of it.
        rest = (slots[:c] >= fill).unsqueeze(-1)
        before = state.kv_sum + _ring_summary(state.k_lin, state.v, rest)
        kv_sum = exclusive_sum(chunk_summaries(k_lin[:, :-1], v[:, :-1]), before)
        count = state.position.unsqueeze(1) - fill + slots[::c]
        denominator = linear_denominator(linear_norm, c, count, kv_sum.dtype)
    out = _chunk_outputs(inside, q_quad, k_quad, q_lin, k_lin, v, kv_sum, denominator, backend)
    out = _take(out.flatten(1, 2), fill + torch.arange(n, device=v.device))
    return out, _state_after(state, k_quad, k_lin, v, kv_sum, fill, end)


def _state_after(state, k_quad, k_lin, v, kv_sum, fill, end):
    """The ring and the sum once each row of the grid is valid up to ``end`` (b, 1)."""
    c = v.shape[2]
    chunk, new_fill = end // c, end % c
    slots = torch.arange(c, device=v.device)

    def ring(old, grid, start):
        return None if old is None else _take(torch.cat((old, grid.flatten(1, 2)), dim=1), start + slots)

    # One index serves every slot: `c` tokens on from a slot of the previous chunk lies its successor.
    start = chunk * c
    new_slot = start + torch.where(slots < new_fill, c, 0)
    new = ChunkState(
        None,
        ring(state.k_quad, k_quad, new_slot),
        ring(state.k_lin, k_lin, new_slot),
        ring(state.v, v, new_slot),
        state.position + (end - fill).squeeze(1),
    )
    if kv_sum is None:
        return new
    sums = torch.cat((state.kv_sum.unsqueeze(1), kv_sum), dim=1)
    base = sums.gather(1, chunk[:, :, None, None].expand(-1, 1, *sums.shape[2:])).squeeze(1)
    # In the first chunk, what lies before `fill` had left the ring before this piece.
    left = (slots < new_fill) & ((chunk > 0) | (slots >= fill))
    leaving = _ring_summary(ring(state.k_lin, k_lin, start), ring(state.v, v, start), left.unsqueeze(-1))
    return new._replace(kv_sum=base + leaving)


def _ring_summary(k_lin: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``k^T v`` over the chosen slots (b, c, 1) of a ring: (b, s, e)."""
    return chunk_summaries(k_lin.unsqueeze(1), (v * chosen).unsqueeze(1)).squeeze(1)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks columns ``index`` (b, m) of ``x`` (b, n, .), another set for each row."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
