"""Triton kernels of the backward pass; the forward pass's own compute again what it has not kept.

No sum is made by atomics: what crosses programs is summed in two stages, so that repeated runs are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fairseq_flash.ops.mixed_chunk.kernel_forward import dot, product, read, row_length, silu_and_slope

__all__ = ["base_backward_kernel", "pairs_backward_kernel", "values_backward_kernel"]


@triton.jit(do_not_specialize=["n", "chunks"])
def pairs_backward_kernel(
    values, grad_branch, scores, states, grad_states, grad_scores, grad_copies, n, chunks, rows, copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, CAUSAL: tl.constexpr, CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The products over the columns: ``dA = do v^T`` turned into the scores' gradient through
    ``relu(x) = sqrt(A)``; ``dq_lin = do S^T``; ``dk_lin = v dS^T``.

    All tiles of a chunk are neighbours, so that its ``do``, ``v`` and states come from memory once.
    """
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    tiles = rows // TILE
    square = tiles * tiles if QUAD else 0
    wide = tiles * (S // TILE) if LIN else 0
    chunk = (tl.program_id(0) // (square + 2 * wide)).to(tl.int64)
    kind = tl.program_id(0) % (square + 2 * wide)
    b, g = chunk // chunks, chunk % chunks
    lane, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
    total = tl.zeros([TILE, TILE], tl.float32)
    if QUAD and kind < square:
        i, j = kind // tiles * TILE + lane, kind % tiles * TILE + lane
        at = (chunk * rows + i)[:, None] * rows + j[None, :]
        if CAUSAL and kind // tiles < kind % tiles:
            tl.store(grad_scores + at, tl.zeros([TILE, TILE], grad_scores.dtype.element_ty))
        else:
            for start in range(0, E, DEPTH):
                do = read(grad_branch, b, g * rows, i, start + k, n, E, E)
                v = read(values, b, g * rows, j, start + k, n, E, STRIDE)
                total = dot(do, tl.trans(v), total, PRECISION)
            weights = tl.load(scores + at).to(tl.float32)
            tl.store(grad_scores + at, (2 * tl.sqrt(weights) * total).to(grad_scores.dtype.element_ty))
    if LIN:
        kind -= square
        row, d = kind % tiles * TILE + lane, kind // tiles % (S // TILE) * TILE + lane
        at = grad_copies + (chunk * rows + row)[:, None] * S + d[None, :]
        state = ((chunk if CAUSAL else b) * S + d)[:, None] * E
        if kind >= wide:
            stop = E
            if CAUSAL:
                stop = tl.where(g == chunks - 1, 0, E)
            for start in range(0, stop, DEPTH):
                column = start + k
                v = read(values, b, g * rows, row, column, n, E, STRIDE)
                kv = tl.load(grad_states + state + column[None, :], mask=(column < E)[None, :], other=0.0)
                total = dot(v, tl.trans(kv), total, PRECISION)
            tl.store(at + (H - 1) * copy_stride, total.to(grad_copies.dtype.element_ty))
        elif kind >= 0:
            stop = E
            if CAUSAL and not CARRIED:
                stop = tl.where(g == 0, 0, E)
            for start in range(0, stop, DEPTH):
                column = start + k
                do = read(grad_branch, b, g * rows, row, column, n, E, E)
                kv = tl.load(states + state + column[None, :], mask=(column < E)[None, :], other=0.0)
                total = dot(do, tl.trans(kv), total, PRECISION)
            tl.store(at + (H - 2) * copy_stride, total.to(grad_copies.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "chunks"])
def values_backward_kernel(
    uvz, grad_branch, copies, turned, grad_states, lengths, grad_uvz, n, chunks, rows, copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dv = A^T do + k_lin dS`` and through SiLU, zero at padding, into the values' part of ``grad_uvz``."""
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    tiles, slices = rows // TILE, tl.cdiv(E, COLUMNS)
    chunk = (tl.program_id(0) // (tiles * slices)).to(tl.int64)
    b, g = chunk // chunks, chunk % chunks
    tile = tl.program_id(0) // slices % tiles
    row = tile * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    token = g * rows + row
    raw = read(uvz + E, b, g * rows, row, column, n, E, 2 * E + S)
    first, near, far = 0, 0, 0
    if QUAD:
        first = tile * TILE if CAUSAL else 0
        near = rows - first
    if LIN:
        far = S
        if CAUSAL:
            far = tl.where(g == chunks - 1, 0, S)
    first_row, first_column = chunk * rows + tile * TILE, tl.program_id(0) % slices * COLUMNS
    total = product(
        turned + first_row * rows + first, rows, grad_branch + (b * n + g * rows + first) * E + first_column,
        E, near, n - g * rows - first, copies + (H - 1) * copy_stride + first_row * S, S,
        grad_states + (chunk if CAUSAL else b) * (S * E) + first_column, E, far, (column < E)[None, :],
        TILE, COLUMNS, DEPTH, PRECISION,
    )  # fmt: skip
    at = (b * n + token)[:, None] * (2 * E + S) + E + column[None, :]
    grad = tl.where((token < row_length(lengths, b, n, HAS_LENGTHS))[:, None], total, 0.0)
    _, slope = silu_and_slope(raw.to(tl.float32))
    grad *= slope
    tl.store(
        grad_uvz + at, grad.to(grad_uvz.dtype.element_ty), mask=(token < n)[:, None] & (column < E)[None, :]
    )


@triton.jit
def _base(
    uvz, cos, sin, row, n, chunks, rows, angle_stride, half, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Where z' and the keys' base of some rows lie, which of them are tokens, both halves of z', cosine and
    sine."""
    token = row // rows % chunks * rows + row % rows
    b = row // rows // chunks
    inside = (token < n)[:, None]
    at = (b * n + token)[:, None] * (2 * E + S) + 2 * E + half[None, :]
    key_at = (b * n + token)[:, None] * S + half[None, :]
    first = tl.load(uvz + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(uvz + at + S // 2, mask=inside, other=0.0).to(tl.float32)
    angle = (b * angle_stride + token * (S // 2))[:, None] + half[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    return at, key_at, inside, first, second, cosine, sine


@triton.jit
def _rotate_back(grad, cosine, sine, S: tl.constexpr):
    x, y = tl.load(grad).to(tl.float32), tl.load(grad + S // 2).to(tl.float32)
    return x * cosine + y * sine, y * cosine - x * sine


@triton.jit(do_not_specialize=["n", "chunks", "angle_stride"])
def base_backward_kernel(
    uvz, keys, gamma, cos, sin, grad_copies, grad_uvz, grad_keys, partial,
    n, chunks, rows, copy_stride, angle_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """From the copies' gradients to that of ``z'``; and a program's sums for gamma's and beta's:
    ``partial`` (programs, 2, H, S). ``HAS_KEYS``: those of every second copy go to that of their own base."""
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    half = tl.arange(0, S // 2)
    zero = tl.zeros([BLOCK, S // 2], tl.float32)
    # Threads sum up their own rows first: sums across threads are dear.
    sums = (zero,) * (4 * H)
    for block in tl.static_range(BLOCKS):
        row = start + block * BLOCK
        at, key_at, inside, first, second, cosine, sine = _base(
            uvz, cos, sin, row, n, chunks, rows, angle_stride, half, E, S
        )
        first, slope_first = silu_and_slope(first)
        second, slope_second = silu_and_slope(second)
        key_first, key_second = first, second
        if HAS_KEYS:
            key_first = tl.load(keys + key_at, mask=inside, other=0.0).to(tl.float32)
            key_second = tl.load(keys + key_at + S // 2, mask=inside, other=0.0).to(tl.float32)
            key_first, key_slope_first = silu_and_slope(key_first)
            key_second, key_slope_second = silu_and_slope(key_second)
        grad_first, grad_second, added = zero, zero, ()
        grad_key_first, grad_key_second = zero, zero
        for h in tl.static_range(H):
            grad = grad_copies + h * copy_stride + row[:, None] * S + half[None, :]
            x, y = _rotate_back(grad, cosine, sine, S)
            x_scale = tl.load(gamma + h * S + half).to(tl.float32)[None, :]
            y_scale = tl.load(gamma + h * S + S // 2 + half).to(tl.float32)[None, :]
            if HAS_KEYS and h % 2 == 1:
                grad_key_first += x * x_scale
                grad_key_second += y * y_scale
                added += (sums[4 * h] + x * key_first, sums[4 * h + 1] + y * key_second)
            else:
                grad_first += x * x_scale
                grad_second += y * y_scale
                added += (sums[4 * h] + x * first, sums[4 * h + 1] + y * second)
            added += (sums[4 * h + 2] + x, sums[4 * h + 3] + y)
        sums = added
        grad_first *= slope_first
        grad_second *= slope_second
        tl.store(grad_uvz + at, grad_first.to(grad_uvz.dtype.element_ty), mask=inside)
        tl.store(grad_uvz + at + S // 2, grad_second.to(grad_uvz.dtype.element_ty), mask=inside)
        if HAS_KEYS:
            grad_key_first *= key_slope_first
            grad_key_second *= key_slope_second
            tl.store(grad_keys + key_at, grad_key_first.to(grad_keys.dtype.element_ty), mask=inside)
            tl.store(grad_keys + key_at + S // 2, grad_key_second.to(grad_keys.dtype.element_ty), mask=inside)
    for h in tl.static_range(H):
        out = partial + tl.program_id(0).to(tl.int64) * (2 * H * S) + h * S + half
        tl.store(out, tl.sum(sums[4 * h], 0))
        tl.store(out + S // 2, tl.sum(sums[4 * h + 1], 0))
        tl.store(out + H * S, tl.sum(sums[4 * h + 2], 0))
        tl.store(out + H * S + S // 2, tl.sum(sums[4 * h + 3], 0))
