"""Triton kernels of the forward pass: rotated copies, scores, sums over chunks, gated output.

Between the kernels each chunk has ``rows`` rows, a multiple of 64: ``c``, or fewer if the whole row of
tokens is shorter. What lies beyond a row's last token is masked where tokens are read or written
(``uvz``, the output and their gradients) and zero in between, so that nothing of the size of ``uvz`` is
ever padded or copied. Both operands of every product come from memory as they are, never from registers,
and no product's result is transposed: either goes wrong on some compilers (triton #6124, #9433). Values
are therefore activated once a pass, by the kernel that sums them up first.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fairseq_flash.ops.mixed_chunk.linear import LONGEST, kept_of_chunks, linear_denominator

__all__ = [
    "copies_kernel",
    "fading_table",
    "output_kernel",
    "scan_kernel",
    "scores_kernel",
    "states_kernel",
]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
#: Chunks after which a fading sum's weights are, in float32, what they are after any number.
SETTLED = tl.constexpr(25 * LONGEST)


@functools.cache
def fading_table(chunk_size: int, e: int, device: torch.device) -> torch.Tensor:
    """What a fading mean is made with, computed on the host in float64: once, however long rows are.

    Args:
        chunk_size: ``c``.
        e: Columns of the values.
        device: Where it is to lie.

    Returns:
        ``(2 + SETTLED, groups)`` in float32: what a sum keeps of earlier chunks; then, for 0, 1, ... chunks
        that have passed, one over what it is divided by.
    """
    kept = kept_of_chunks("fading", e, torch.device("cpu"))
    count = chunk_size * torch.arange(SETTLED.value + 1, device="cpu")
    # A column for each group: as many divide their own number.
    divisors = linear_denominator("fading", chunk_size, count, len(kept), torch.float64)
    return torch.cat((kept[None], 1 / divisors)).to(device, torch.float32)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``, summed in float32."""
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def over_sigmoid(x, of):
    """``x sigmoid(of)`` in float32, without a division's care for tiny and huge numbers, which is dear."""
    below = 1 + tl.exp2(of * -1.4426950408889634)
    if INTERPRETED:
        return x / below
    else:
        return libdevice.fast_dividef(x, below)


@triton.jit
def silu(x):
    return over_sigmoid(x, x)


@triton.jit
def silu_and_slope(x):
    """SiLU and its derivative."""
    gate = over_sigmoid(tl.full(x.shape, 1, tl.float32), x)
    y = x * gate
    return y, gate + y * (1 - gate)


@triton.jit
def row_length(lengths, b, n, HAS_LENGTHS: tl.constexpr):
    """Valid tokens of row ``b``."""
    if HAS_LENGTHS:
        return tl.load(lengths + b).to(tl.int32)
    else:
        return n


@triton.jit
def read(pointer, b, first, row, column, n, E: tl.constexpr, STRIDE: tl.constexpr):
    """Tokens ``first + row`` by columns of a tensor (b, n, E), rows ``STRIDE`` apart; zero beyond."""
    # 64 bits for a program, 32 for each element.
    offsets = row[:, None] * STRIDE + column[None, :]
    inside = (first + row < n)[:, None] & (column < E)[None, :]
    return tl.load(pointer + (b * n + first) * STRIDE + offsets, mask=inside, other=0.0)


@triton.jit
def product(
    left, left_stride, right, right_stride, near, length,
    far_left, far_left_stride, far_right, far_right_stride, far, known,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``left @ right + far_left @ far_right`` over ``near`` and ``far`` terms, in one loop: one pipeline.

    All four are pointers to a corner, rows a stride apart; rows of ``right`` end at ``length``.
    """
    row, k, column = tl.arange(0, TILE), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for step in range(0, near + far, DEPTH):
        start = step - near
        inside = start < 0
        # One address a program, 32 bits an element.
        x_at = tl.where(inside, left + step, far_left + start)
        y_at = tl.where(inside, right + step * right_stride, far_right + start * far_right_stride)
        x_stride = tl.where(inside, left_stride, far_left_stride)
        y_stride = tl.where(inside, right_stride, far_right_stride)
        limit = tl.where(inside, length - step, DEPTH)
        x = tl.load(x_at + (row[:, None] * x_stride + k[None, :]))
        y_at += k[:, None] * y_stride + column[None, :]
        y = tl.load(y_at, mask=(k < limit)[:, None] & known, other=0.0)
        total = dot(x, y, total, PRECISION)
    return total


@triton.jit
def kept_of(fading, column, E: tl.constexpr, GROUPS: tl.constexpr):
    """What a fading sum keeps of earlier chunks, by column."""
    return tl.load(fading + column // (E // GROUPS), mask=column < E, other=0.0)


@triton.jit
def fading_scale(fading, count, column, E: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr):
    """What a fading sum of ``count`` tokens, of whole chunks, is multiplied by, by column."""
    group = column // (E // GROUPS)
    passed = tl.minimum(count // C, SETTLED)
    return tl.load(fading + (passed + 1) * GROUPS + group, mask=column < E, other=0.0)


@triton.jit
def scale_of(
    counts, fading, b, g, rows, length, column,
    E: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr, CAUSAL: tl.constexpr,
    CARRIED: tl.constexpr,
):  # fmt: skip
    """What chunk ``g``'s linear branch is multiplied by, one over what it is divided by: of a fading mean by
    ``column``, otherwise a number."""
    if NORM == "chunk":
        return 1.0 / C
    elif NORM == "fading":
        count = g * rows
        if CARRIED:
            count += tl.load(counts + b)
        return fading_scale(fading, count, column, E, GROUPS, C)
    else:
        count = length
        if CAUSAL:
            count = tl.minimum(g * rows, length)
        count = count.to(tl.float32)
        if CARRIED:
            count += tl.load(counts + b).to(tl.float32)
        return 1.0 / tl.maximum(count, 1.0)


@triton.jit
def beside(x, y):
    """``x``, held by the threads that hold ``y``: a compiler would compute what both need once for each."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def gate_output(
    y, gate, dout, out, grad_branch, b, token, column, n,
    E: tl.constexpr, S: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Writes ``silu(u') y``; backward the gradients of ``u'``, into ``out``, and of ``y``."""
    inside = (token < n)[:, None] & (column < E)[None, :]
    wide = (b * n + token)[:, None] * (2 * E + S) + column[None, :]
    narrow = (b * n + token)[:, None] * E + column[None, :]
    u = gate.to(tl.float32)
    if BACKWARD:
        u = beside(u, y)
        do = dout.to(tl.float32)
        gated, slope = silu_and_slope(u)
        tl.store(out + wide, (do * y * slope).to(out.dtype.element_ty), mask=inside)
        tl.store(grad_branch + narrow, (do * gated).to(grad_branch.dtype.element_ty), mask=inside)
    else:
        tl.store(out + narrow, (silu(u) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "chunks", "angle_stride"])
def copies_kernel(
    uvz, keys, gamma, beta, cos, sin, copies, n, chunks, rows, copy_stride, angle_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """The ``H`` rotated copies of ``silu(z')``, zero beyond the row: (H, b g, rows, S).

    ``HAS_KEYS``: every second one of ``silu(keys)``, (b, n, S).
    """
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = row // rows % chunks * rows + row % rows
    b = row // rows // chunks
    inside = (token < n)[:, None]
    half = tl.arange(0, S // 2)[None, :]
    base = uvz + (b * n + token)[:, None] * (2 * E + S) + 2 * E + half
    first = silu(tl.load(base, mask=inside, other=0.0).to(tl.float32))
    second = silu(tl.load(base + S // 2, mask=inside, other=0.0).to(tl.float32))
    key_first, key_second = first, second
    if HAS_KEYS:
        base = keys + (b * n + token)[:, None] * S + half
        key_first = silu(tl.load(base, mask=inside, other=0.0).to(tl.float32))
        key_second = silu(tl.load(base + S // 2, mask=inside, other=0.0).to(tl.float32))
    angle = (b * angle_stride + token * (S // 2))[:, None] + half
    # Zero beyond the row, and with it the rotated copies.
    cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    for h in tl.static_range(H):
        scale, offset = gamma + h * S + half, beta + h * S + half
        x, y = (key_first, key_second) if h % 2 == 1 else (first, second)
        x = tl.load(scale).to(tl.float32) * x + tl.load(offset).to(tl.float32)
        y = tl.load(scale + S // 2).to(tl.float32) * y + tl.load(offset + S // 2).to(tl.float32)
        out = copies + h * copy_stride + row[:, None] * S + half
        tl.store(out, (x * cosine - y * sine).to(copies.dtype.element_ty))
        tl.store(out + S // 2, (x * sine + y * cosine).to(copies.dtype.element_ty))


@triton.jit(do_not_specialize=["bias_length"])
def scores_kernel(
    copies, bias, scores, turned, rows, copy_stride, bias_length,
    C: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, CAUSAL: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``relu(q k^T / C + bias)^2`` of every chunk, exact zeros above the diagonal: (b g, rows, rows).

    ``TURNED``: into ``turned`` as well, keys by queries.
    """
    tiles = rows // TILE
    chunk = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    i = tl.program_id(0) // tiles % tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    out = (chunk * rows + i)[:, None] * rows + j[None, :]
    if CAUSAL and tl.program_id(0) // tiles % tiles < tl.program_id(0) % tiles:
        tl.store(scores + out, tl.zeros([TILE, TILE], scores.dtype.element_ty))
    else:
        total = tl.zeros([TILE, TILE], tl.float32)
        for start in range(0, S, DEPTH):
            k = start + tl.arange(0, DEPTH)
            queries = tl.load(copies + (chunk * rows + i)[:, None] * S + k[None, :])
            keys = tl.load(copies + copy_stride + (chunk * rows + j)[:, None] * S + k[None, :])
            total = dot(queries, tl.trans(keys), total, PRECISION)
        known = (i < bias_length)[:, None] & (j < bias_length)[None, :]
        shift = tl.load(bias + i[:, None] * bias_length + j[None, :], mask=known, other=0.0)
        x = tl.maximum(total / C + shift.to(tl.float32), 0.0)
        if CAUSAL:
            x = tl.where(j[None, :] <= i[:, None], x, 0.0)
        x = (x * x).to(scores.dtype.element_ty)
        tl.store(scores + out, x)
        if TURNED:
            tl.store(turned + (chunk * rows + j)[None, :] * rows + i[:, None], x)


@triton.jit(do_not_specialize=["n", "chunks", "first", "last"])
def states_kernel(
    source, copies, values, sums, initial, final, lengths, counts, fading, n, chunks, rows, first, last,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SERIAL: tl.constexpr, BACKWARD: tl.constexpr, LIN: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, CARRIED: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``k^T v`` of every chunk, and on the way ``v``: SiLU of ``source``, zero at padding.

    Backward ``q^T do`` instead, where ``source`` is ``do``, of chunks that were divided by different counts.
    ``SERIAL``: one program goes through a row, with the sums that ``scan_kernel`` would make of summaries;
    otherwise one program a chunk, whose summary goes to ``sums``. Only ``first`` to ``last`` are summed.
    """
    slices = tl.cdiv(E, COLUMNS)
    parts = 1 if SERIAL else chunks
    part = tl.program_id(0) // slices % parts
    b = (tl.program_id(0) // slices // parts).to(tl.int64)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    known = (column < E)[None, :]
    k = tl.arange(0, S)
    place = k[:, None] * E + column[None, :]
    length = row_length(lengths, b, n, HAS_LENGTHS)
    total = tl.zeros([S, COLUMNS], tl.float32)
    if SERIAL and CARRIED and not BACKWARD:
        total += tl.load(initial + b * (S * E) + place, mask=known, other=0.0).to(tl.float32)
    for step in range(0, chunks if SERIAL else 1):
        g = part
        if SERIAL:
            g = chunks - 1 - step if BACKWARD else step
        chunk = b * chunks + g
        scale = scale_of(
            counts, fading, b, g, rows, length, column[None, :], E, C, NORM, GROUPS, CAUSAL, CARRIED
        )
        if SERIAL and CAUSAL:
            state = total if BACKWARD else total * scale
            tl.store(sums + chunk * (S * E) + place, state.to(sums.dtype.element_ty), mask=known)
        summary = tl.zeros([S, COLUMNS], tl.float32)
        for start in range(0, rows, DEPTH):
            row = start + tl.arange(0, DEPTH)
            token = g * rows + row
            v = read(source, b, g * rows, row, column, n, E, E if BACKWARD else 2 * E + S)
            if not BACKWARD:
                v = silu(v.to(tl.float32))
                v = tl.where((token < length)[:, None], v, 0.0).to(values.dtype.element_ty)
                at = values + (b * n + g * rows) * STRIDE + row[:, None] * STRIDE + column[None, :]
                tl.store(at, v, mask=(token < n)[:, None] & known)
            if LIN:
                keys = tl.load(copies + (chunk * rows + row)[:, None] * S + k[None, :])
                summary = dot(tl.trans(keys), v, summary, PRECISION)
        if BACKWARD and CAUSAL:
            summary *= scale
        if SERIAL and NORM == "fading":
            total *= kept_of(fading, column[None, :], E, GROUPS)
        total += summary
        if LIN and not SERIAL:
            needed = known & (g >= first) & (g < last)
            tl.store(sums + chunk * (S * E) + place, summary.to(sums.dtype.element_ty), mask=needed)
    if SERIAL and LIN and not CAUSAL:
        state = total * scale_of(
            counts, fading, b, 0, rows, length, column[None, :], E, C, NORM, GROUPS, CAUSAL, CARRIED
        )
        tl.store(sums + b * (S * E) + place, state.to(sums.dtype.element_ty), mask=known)
        total = state if BACKWARD else total
    if SERIAL and FINAL:
        tl.store(final + b * (S * E) + place, total, mask=known)


@triton.jit(do_not_specialize=["n", "chunks", "first", "last"])
def scan_kernel(
    summaries, states, initial, final, lengths, counts, fading, n, chunks, rows, first, last,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
    NORM: tl.constexpr, GROUPS: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    CARRIED: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Sums of the summaries of strictly earlier (backward: later) chunks in float32, divided once, narrowed.

    A fading sum keeps its share of what came before whenever a chunk passes, in either direction.
    Bidirectional: the sum over all chunks, one state a row. ``states`` may be ``summaries`` itself.
    """
    blocks = tl.cdiv(S * E, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside, column = place < S * E, place % E
    length = row_length(lengths, b, n, HAS_LENGTHS)
    total = tl.zeros([BLOCK], tl.float32)
    if NORM == "fading":
        kept = kept_of(fading, column, E, GROUPS)
    if CARRIED and not BACKWARD:
        total += tl.load(initial + b * (S * E) + place, mask=inside, other=0.0).to(tl.float32)
    for step in range(0, chunks, 4):
        # Four loads are under way at once: a scan waits for memory, and nothing else.
        g0 = chunks - 1 - step if BACKWARD else step
        g1 = g0 - 1 if BACKWARD else g0 + 1
        g2 = g1 - 1 if BACKWARD else g1 + 1
        g3 = g2 - 1 if BACKWARD else g2 + 1
        at = summaries + b * chunks * (S * E) + place
        x0 = tl.load(at + g0.to(tl.int64) * (S * E), mask=inside & (g0 >= first) & (g0 < last), other=0.0)
        x1 = tl.load(at + g1.to(tl.int64) * (S * E), mask=inside & (g1 >= first) & (g1 < last), other=0.0)
        x2 = tl.load(at + g2.to(tl.int64) * (S * E), mask=inside & (g2 >= first) & (g2 < last), other=0.0)
        x3 = tl.load(at + g3.to(tl.int64) * (S * E), mask=inside & (g3 >= first) & (g3 < last), other=0.0)
        for t in tl.static_range(4):
            g = g0 if t == 0 else (g1 if t == 1 else (g2 if t == 2 else g3))
            x = x0 if t == 0 else (x1 if t == 1 else (x2 if t == 2 else x3))
            if CAUSAL:
                state = total
                if not BACKWARD:
                    state = total * scale_of(
                        counts, fading, b, g, rows, length, column, E, C, NORM, GROUPS, CAUSAL, CARRIED
                    )
                out = states + (b * chunks + g) * (S * E) + place
                tl.store(out, state.to(states.dtype.element_ty), mask=inside & (g >= 0) & (g < chunks))
            if NORM == "fading":
                # Beyond the row's end nothing passes.
                total = tl.where((g >= 0) & (g < chunks), total * kept, total)
            total += x.to(tl.float32)
    if not CAUSAL:
        state = total * scale_of(
            counts, fading, b, 0, rows, length, column, E, C, NORM, GROUPS, CAUSAL, CARRIED
        )
        tl.store(states + b * (S * E) + place, state.to(states.dtype.element_ty), mask=inside)
        total = state if BACKWARD else total
    if FINAL:
        tl.store(final + b * (S * E) + place, total, mask=inside)


@triton.jit(do_not_specialize=["n", "chunks"])
def output_kernel(
    uvz, copies, values, scores, states, grad, out, grad_branch, n, chunks, rows, copy_stride,
    E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, STRIDE: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = A v + q S`` and the gate: ``out = silu(u') y``.

    Backward: the same ``y``, from which the gradient of ``u'`` goes into ``out`` (laid out like ``uvz``) and
    that of ``y`` into ``grad_branch``.
    """
    copy_stride = copy_stride.to(tl.int64)  # times a copy's number
    tiles, slices = rows // TILE, tl.cdiv(E, COLUMNS)
    chunk = (tl.program_id(0) // (tiles * slices)).to(tl.int64)
    b, g = chunk // chunks, chunk % chunks
    tile = tl.program_id(0) // slices % tiles
    row = tile * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    token = g * rows + row
    # What the end needs is asked for before the products, so that it is there when they are done.
    gate = read(uvz, b, g * rows, row, column, n, E, 2 * E + S)
    dout = gate
    if BACKWARD:
        dout = read(grad, b, g * rows, row, column, n, E, E)
    near, far = 0, 0
    if QUAD:
        near = tile * TILE + TILE if CAUSAL else rows
    if LIN:
        far = S
        if CAUSAL and not CARRIED:
            far = tl.where(g == 0, 0, S)
    first_row, first_column = chunk * rows + tile * TILE, tl.program_id(0) % slices * COLUMNS
    y = product(
        scores + first_row * rows, rows, values + (b * n + g * rows) * STRIDE + first_column, STRIDE, near,
        n - g * rows, copies + (H - 2) * copy_stride + first_row * S, S,
        states + (chunk if CAUSAL else b) * (S * E) + first_column, E, far, (column < E)[None, :],
        TILE, COLUMNS, DEPTH, PRECISION,
    )  # fmt: skip
    gate_output(y, gate, dout, out, grad_branch, b, token, column, n, E, S, BACKWARD)
