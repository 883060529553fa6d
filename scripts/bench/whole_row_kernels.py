"""Mixed chunk attention by Triton kernels that go through whole rows: what benchmark_kernels.py tries.

Nothing of mixed chunk attention crosses columns but scores and their gradients. So a program takes a slice of
the columns from chunk to chunk: the sum over earlier chunks stays in registers, values are activated where
they are used, and the forward pass moves half of what the package's kernels do. Causal, with both branches,
of 16-bit numbers (sums of float32 want a partial sum for each chunk).
"""

import torch
import triton
import triton.language as tl

from fairseq_flash.ops.mixed_chunk import kernel
from fairseq_flash.ops.mixed_chunk.kernel_forward import (
    dot,
    gate_output,
    read,
    row_length,
    scale_of,
    silu,
    silu_and_slope,
)

__all__ = ["TILINGS", "backward", "forward"]

TILINGS = {"rows": kernel.Tiling(128, 64, 64, 8, 2), "rows_backward": kernel.Tiling(128, 64, 64, 8, 2)}


@triton.jit
def _own(E: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's row and columns, which of these there are, and where they lie in a state."""
    slices = tl.cdiv(E, COLUMNS)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, S)[:, None] * E + column[None, :]
    return (tl.program_id(0) // slices).to(tl.int64), column, (column < E)[None, :], place


@triton.jit
def _outputs(
    tile, state, total, uvz, copies, scores, values, grad, out, grad_branch, b, g, chunk, length, column, n,
    rows, copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    BACKWARD: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of a tile's rows. ``UPDATE``: of the last tile, which reads every value of the
    chunk; returns ``total`` with the chunk's ``k^T v``, and backward writes the values."""
    k, d = tl.arange(0, DEPTH), tl.arange(0, S)
    row = tile * TILE + tl.arange(0, TILE)
    token = g * rows + row
    gate = read(uvz, b, g * rows, row, column, n, E, 2 * E + S)
    dout = gate
    if BACKWARD:
        dout = read(grad, b, g * rows, row, column, n, E, E)
    queries = tl.load(copies + (H - 2) * copy_stride + (chunk * rows + row)[:, None] * S + d[None, :])
    y = dot(queries, state, tl.zeros([TILE, column.shape[0]], tl.float32), PRECISION)
    for start in range(0, tile * TILE + TILE, DEPTH):
        source = g * rows + start + k
        v = silu(read(uvz + E, b, g * rows, start + k, column, n, E, 2 * E + S).to(tl.float32))
        v = tl.where((source < length)[:, None], v, 0.0).to(uvz.dtype.element_ty)
        weights = tl.load(scores + (chunk * rows + row)[:, None] * rows + (start + k)[None, :])
        y = dot(weights, v, y, PRECISION)
        if UPDATE:
            keys = copies + (H - 1) * copy_stride + (chunk * rows + start + k)[:, None] * S + d[None, :]
            total = dot(tl.trans(tl.load(keys)), v, total, PRECISION)
            if BACKWARD:
                at = values + (b * n + source)[:, None] * E + column[None, :]
                tl.store(at, v, mask=(source < n)[:, None] & (column < E)[None, :])
    gate_output(y, gate, dout, out, grad_branch, b, token, column, n, E, S, BACKWARD)
    return total


@triton.jit(do_not_specialize=["n", "chunks"])
def rows_kernel(
    uvz, copies, scores, values, states, initial, grad, out, grad_branch, lengths, counts, n, chunks, rows,
    copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BACKWARD: tl.constexpr, MEAN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = silu(u') (A v + q S)`` of the rows, from pre-activations.

    Backward: gradients of ``u'``, in ``out`` (laid out like ``uvz``), and of ``A v + q S``; and what the
    other kernels read: values and states.
    """
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    b, column, known, place = _own(E, S, COLUMNS)
    length = row_length(lengths, b, n, HAS_LENGTHS)
    total = tl.zeros([S, COLUMNS], tl.float32)
    if CARRIED:
        total += tl.load(initial + b * (S * E) + place, mask=known, other=0.0).to(tl.float32)
    for g in range(0, chunks):
        chunk = b * chunks + g
        state = (total * scale_of(counts, b, g, rows, length, C, MEAN, CAUSAL, CARRIED)).to(
            uvz.dtype.element_ty
        )
        last = rows // TILE - 1
        if BACKWARD:
            tl.store(states + chunk * (S * E) + place, state, mask=known)
        else:
            # Nobody reads what the last chunk would add.
            last = tl.where(g == chunks - 1, last + 1, last)
        for tile in range(0, last):
            _outputs(
                tile, state, total, uvz, copies, scores, values, grad, out, grad_branch, b, g, chunk, length,
                column, n, rows, copy_stride, E, S, H, TILE, DEPTH, BACKWARD, False, PRECISION,
            )  # fmt: skip
        if last < rows // TILE:
            total = _outputs(
                last, state, total, uvz, copies, scores, values, grad, out, grad_branch, b, g, chunk, length,
                column, n, rows, copy_stride, E, S, H, TILE, DEPTH, BACKWARD, True, PRECISION,
            )  # fmt: skip


@triton.jit
def _value_gradients(
    tile, state, summary, uvz, copies, turned, grad_branch, grad_uvz, b, g, chunk, length, column, n, rows,
    copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a tile's values. ``UPDATE``: of the first tile, which every row of the chunk
    reads; returns ``summary`` with the chunk's ``q^T do``."""
    k, d = tl.arange(0, DEPTH), tl.arange(0, S)
    row = tile * TILE + tl.arange(0, TILE)
    token = g * rows + row
    raw = read(uvz + E, b, g * rows, row, column, n, E, 2 * E + S)
    keys = tl.load(copies + (H - 1) * copy_stride + (chunk * rows + row)[:, None] * S + d[None, :])
    dv = dot(keys, state, tl.zeros([TILE, column.shape[0]], tl.float32), PRECISION)
    for start in range(tile * TILE, rows, DEPTH):
        do = read(grad_branch, b, g * rows, start + k, column, n, E, E)
        weights = tl.load(turned + (chunk * rows + row)[:, None] * rows + (start + k)[None, :])
        dv = dot(weights, do, dv, PRECISION)
        if UPDATE:
            queries = copies + (H - 2) * copy_stride + (chunk * rows + start + k)[:, None] * S + d[None, :]
            summary = dot(tl.trans(tl.load(queries)), do, summary, PRECISION)
    _, slope = silu_and_slope(raw.to(tl.float32))
    dv = tl.where((token < length)[:, None], dv, 0.0) * slope
    at = (b * n + token)[:, None] * (2 * E + S) + E + column[None, :]
    inside = (token < n)[:, None] & (column < E)[None, :]
    tl.store(grad_uvz + at, dv.to(grad_uvz.dtype.element_ty), mask=inside)
    return summary


@triton.jit(do_not_specialize=["n", "chunks"])
def rows_backward_kernel(
    uvz, copies, turned, grad_branch, grad_states, final, grad_uvz, lengths, counts, n, chunks, rows,
    copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, MEAN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, CARRIED: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dv = A^T do + k dS`` through SiLU into ``grad_uvz``, from the last chunk to the first; ``dS`` of each
    chunk into ``grad_states``, and that of the carry into ``final`` if asked.

    Tiles are at most those of the scores: ``turned`` has no zeros above its diagonal blocks.
    """
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    b, column, known, place = _own(E, S, COLUMNS)
    length = row_length(lengths, b, n, HAS_LENGTHS)
    total = tl.zeros([S, COLUMNS], tl.float32)
    for step in range(0, chunks):
        g = chunks - 1 - step
        chunk = b * chunks + g
        state = total.to(grad_states.dtype.element_ty)
        tl.store(grad_states + chunk * (S * E) + place, state, mask=known)
        for tile in range(1, rows // TILE):
            _value_gradients(
                tile, state, total, uvz, copies, turned, grad_branch, grad_uvz, b, g, chunk, length, column,
                n, rows, copy_stride, E, S, H, TILE, DEPTH, False, PRECISION,
            )  # fmt: skip
        summary = _value_gradients(
            0, state, tl.zeros([S, COLUMNS], tl.float32), uvz, copies, turned, grad_branch, grad_uvz, b, g,
            chunk, length, column, n, rows, copy_stride, E, S, H, TILE, DEPTH, True, PRECISION,
        )  # fmt: skip
        total += summary * scale_of(counts, b, g, rows, length, C, MEAN, CAUSAL, CARRIED)
    if FINAL:
        tl.store(final + b * (S * E) + place, total, mask=known)


def _rows(launch, copies, scores, initial, grad=None, out=None):
    """The output; with ``grad`` gradients of u', in ``out``, and of the branches' sum, values, states."""
    b, n, e, s, _h, chunks, rows = launch.sizes
    backward = grad is not None
    result = launch.empty(b, n, e)
    values, states = (torch.empty_like(result), launch.empty(launch.grid, s, e)) if backward else (None, None)
    constants = _constants(launch, "rows")
    kernel._start(
        rows_kernel, b * triton.cdiv(e, constants["COLUMNS"]),
        launch.uvz, copies, scores, values, states, initial, grad, out if backward else result, result,
        launch.lengths, launch.count, n, chunks, rows, launch.copy_stride, BACKWARD=backward, **constants,
    )  # fmt: skip
    return result, values, states


def _constants(launch, name):
    _b, _n, e, s, h, _chunks, rows = launch.sizes
    tiling = TILINGS[name]
    compiled = dict(num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers)
    tiles = dict(TILE=64 if rows % tiling.rows else tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth)
    return dict(E=e, S=s, H=h, C=launch.chunk_size, **tiles, **launch.norm, **launch.product, **compiled)


def forward(launch, copies, scores, kv_sum):
    """As the package's ``_forward_by_chunks``."""
    return _rows(launch, copies, scores, kv_sum)[0]


def backward(launch, copies, scores, turned, kv_sum, grad, grad_uvz):
    """As the package's ``_backward_by_chunks``."""
    grad_branch, values, states = _rows(launch, copies, scores, kv_sum, grad, grad_uvz)
    b, n, e, s, _h, chunks, rows = launch.sizes
    grad_states, final = launch.empty(launch.grid, s, e), kv_sum is not None
    carried = launch.empty(b, s, e, dtype=torch.float32) if final else None
    constants = _constants(launch, "rows_backward")
    kernel._start(
        rows_backward_kernel, b * triton.cdiv(e, constants["COLUMNS"]),
        launch.uvz, copies, turned, grad_branch, grad_states, carried, grad_uvz, launch.lengths, launch.count,
        n, chunks, rows, launch.copy_stride, FINAL=final, **constants,
    )  # fmt: skip
    pairs = launch.pairs_backward(grad_branch, copies, values, scores, states, grad_states)
    return *pairs, carried
