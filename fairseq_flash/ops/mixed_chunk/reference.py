"""Mixed chunk attention in PyTorch, the readable truth: rows that start here, and pieces that continue."""

from __future__ import annotations

from typing import Optional, Union

import torch

from fairseq_flash.ops.mixed_chunk.inputs import Carry, Inputs, Options, Pair
from fairseq_flash.ops.mixed_chunk.linear import (
    chunk_summaries,
    exclusive_sum,
    kept_of_chunks,
    linear_attention,
    linear_denominator,
)
from fairseq_flash.ops.mixed_chunk.state import ChunkState
from fairseq_flash.ops.positions import trailing_padding
from fairseq_flash.ops.quadratic import quadratic_attention
from fairseq_flash.ops.softmax import softmax_attention

__all__ = ["blanked", "continued", "on_grid", "part_summary", "to_chunks", "whole"]


def whole(inputs: Inputs, options: Options, carry: Optional[Carry] = None) -> torch.Tensor:
    """Attention of rows that start here, or at a chunk behind ``carry``.

    Args:
        inputs: Tensors ``(b, n, .)``.
        options: Any.
        carry: What the linear branch sees beside these rows; None for nothing.

    Returns:
        ``(b, n, e)`` in the dtype of the values.
    """
    n = inputs.v.shape[1]
    c = options.chunk_of(n)
    quad, lin = (pair and Pair(*(to_chunks(x, c) for x in pair)) for pair in (inputs.quad, inputs.lin))
    v = to_chunks(blanked(inputs.v, inputs.lengths), c)
    return on_grid(inputs._replace(quad=quad, lin=lin, v=v), options, carry, n)


def continued(inputs: Inputs, options: Options, state: ChunkState) -> tuple[torch.Tensor, ChunkState]:
    """Attention of a piece of any length that continues ``state``, each row from its own slot.

    Args:
        inputs: Tensors ``(b, n, .)``.
        options: Causal.
        state: What came before.

    Returns:
        ``(b, n, e)`` in the dtype of the values, and the state after the last valid token of each row.
    """
    n, (quad, lin) = inputs.v.shape[1], inputs[:2]
    places = state.grid(n, inputs.lengths)
    if quad is not None:
        quad = Pair(places.place(quad.q), places.place(quad.k, state.k_quad))
    if lin is not None:
        lin = Pair(places.place(lin.q), places.place(lin.k, state.k_lin))
    v = places.place(blanked(inputs.v, inputs.lengths), state.v)
    grid, sums, counts = inputs._replace(quad=quad, lin=lin, v=v), None, None
    kept = kept_of_chunks(options.linear_norm, v.shape[-1], v.device)
    if lin is not None:
        sums, counts = _seen_by_each_chunk(lin.k, v, kept, state.carry(places, kept))
    out = places.take(_outputs(grid, options, sums, counts), n)
    return out, state.after(places, quad and quad.k, lin and lin.k, v, sums, kept)


def blanked(v: torch.Tensor, lengths: Optional[torch.Tensor]) -> torch.Tensor:
    """Values ``(b, n, e)`` with zeros at padding, which then has no weight anywhere."""
    if lengths is None:
        return v
    return v.masked_fill(trailing_padding(lengths, v.shape[1]).unsqueeze(-1), 0)


def part_summary(
    k: torch.Tensor, v: torch.Tensor, lengths: Optional[torch.Tensor], options: Options
) -> torch.Tensor:
    """``k^T v`` of the linear branch over a part of rows ``(b, n, .)``: ``(b, s, e)``."""
    c, kept = options.chunk_size, kept_of_chunks(options.linear_norm, v.shape[-1], v.device)
    kv = chunk_summaries(to_chunks(k, c), to_chunks(blanked(v, lengths), c))
    return kv.sum(1) if kept is None else exclusive_sum(kv, torch.zeros_like(kv[:, 0]), kept)[:, -1]


def to_chunks(x: torch.Tensor, c: int) -> torch.Tensor:
    """(..., n, s) to (..., g, c, s), the last chunk filled up with zeros."""
    missing = -x.shape[-2] % c
    if missing or torch.jit.is_tracing():
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (x.shape[-2] // c, c))


def on_grid(grid: Inputs, options: Options, carry: Optional[Carry], n: int) -> torch.Tensor:
    """As :func:`whole`, of tensors ``(b, g, c, .)`` that hold ``n`` tokens a row, blank at padding."""
    sums = counts = None
    if n == 0:
        return grid.v.flatten(1, 2)
    if grid.lin is not None and options.causal:
        kept = kept_of_chunks(options.linear_norm, grid.v.shape[-1], grid.v.device)
        sums, counts = _seen_by_each_chunk(grid.lin.k, grid.v, kept, carry)
    elif grid.lin is not None:
        sums, counts = _seen_by_all(grid.lin.k, grid.v, n if grid.lengths is None else grid.lengths, carry)
    return _outputs(grid, options, sums, counts).flatten(1, 2)[:, :n]


def _seen_by_each_chunk(
    k_lin: torch.Tensor, v: torch.Tensor, kept: Optional[torch.Tensor], carry: Optional[Carry]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over strictly earlier chunks (b, g, s, e), and the tokens in them (b, g)."""
    b, g, c, s = k_lin.shape
    # Nobody reads the summary of the last chunk.
    kv = chunk_summaries(k_lin[:, :-1], v[:, :-1])
    counts = (torch.arange(g, device=v.device) * c).expand(b, g)
    if carry is None:
        return exclusive_sum(kv, kv.new_zeros(b, s, v.shape[-1]), kept), counts
    return exclusive_sum(kv, carry.kv_sum, kept), counts + carry.count.unsqueeze(1)


def _seen_by_all(
    k_lin: torch.Tensor, v: torch.Tensor, lengths: Union[int, torch.Tensor], carry: Optional[Carry]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over all chunks (b, 1, s, e), and the tokens in it (b, 1)."""
    sums = chunk_summaries(k_lin.flatten(1, 2).unsqueeze(1), v.flatten(1, 2).unsqueeze(1))
    counts = torch.zeros(v.shape[0], dtype=torch.long, device=v.device) + lengths
    if carry is not None:
        sums, counts = sums + carry.kv_sum.unsqueeze(1), counts + carry.count
    return sums, counts.unsqueeze(1)


def _outputs(
    grid: Inputs, options: Options, sums: Optional[torch.Tensor], counts: Optional[torch.Tensor]
) -> torch.Tensor:
    """Both branches on the grid: (b, g, c, e)."""
    out = None if grid.quad is None else _inside(grid, options)
    if grid.lin is not None:
        denominator = linear_denominator(
            options.linear_norm, options.chunk_size, counts, sums.shape[-1], sums.dtype
        )
        across = linear_attention(grid.lin.q, sums, denominator)
        out = across if out is None else out + across
    return out


def _inside(grid: Inputs, options: Options) -> torch.Tensor:
    (q, k), v, c = grid.quad, grid.v, grid.v.shape[2]
    if options.softmax:
        return softmax_attention(q, k, v, dropout=options.dropout)
    bias, denominator = grid.bias[:c, :c], float(options.chunk_size)
    return quadratic_attention(q, k, v, bias, causal=options.causal, denominator=denominator)
