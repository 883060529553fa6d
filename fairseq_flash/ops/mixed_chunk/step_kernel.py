"""One step of decoding in two Triton kernels: from pre-activations to the gated output, states in place.

The first reads each ring and the sum once, a slice of ``e`` at a time, and puts the new values into their
slot; the second puts the new keys into theirs, once nobody reads the old ones any more, and counts the token.
All arithmetic is float32, whatever the weights are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fairseq_flash.ops.mixed_chunk.gated import Projected
from fairseq_flash.ops.mixed_chunk.inputs import Options
from fairseq_flash.ops.mixed_chunk.kernel_forward import (
    INTERPRETED,
    fading_scale,
    fading_table,
    kept_of,
)
from fairseq_flash.ops.mixed_chunk.state import ChunkState

__all__ = ["objections", "run"]

#: Keys that are read at a time.
KEYS = 64
#: Slices of e by the number of rows up to which they are taken: enough of them to fill a card, and no more,
#: as each slice reads all keys.
SLICES = {4: 32, 32: 64, 2**31: 256}

_INTERPRETED = INTERPRETED.value


def objections(projected: Projected, options: Options, state: ChunkState) -> list[str]:
    """Why the kernels cannot run."""
    found, s = [], projected.gamma.shape[1]
    if torch.compiler.is_compiling():
        found.append("a compiler is reading the operations")
    if projected.uvz.device.type != "cuda" and not _INTERPRETED:
        found.append(f"uvz is on {projected.uvz.device.type}, not on a CUDA device")
    if projected.uvz.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found.append(f"uvz is {projected.uvz.dtype}; the kernels take float32, bfloat16 and float16")
    for name, size in (("attention_dim", s), ("chunk_size", options.chunk_size)):
        if size & (size - 1) or size < 16:
            found.append(f"{name} is {size}; the kernels take powers of two from 16 on")
    if torch.is_grad_enabled():
        found.append("gradients are enabled; the kernels have no backward pass")
    return found


def run(projected: Projected, options: Options, state: ChunkState) -> tuple[torch.Tensor, ChunkState]:
    """As :func:`~fairseq_flash.ops.gated_mixed_chunk_step`; overwrites ``state`` and returns it."""
    uvz, gamma, beta, cos, sin, bias, _, keys = projected
    b, s = uvz.shape[0], gamma.shape[1]
    e = (uvz.shape[2] - s) // 2
    uvz, cos, sin = uvz.view(b, -1), cos.reshape(-1, s // 2), sin.reshape(-1, s // 2)
    out = torch.empty(b, 1, e, dtype=uvz.dtype, device=uvz.device)
    quad, lin = "quad" in options.branches, "lin" in options.branches
    keys, fading, groups = None if keys is None else keys.contiguous(), None, 1
    if lin and options.linear_norm == "fading":
        fading = fading_table(options.chunk_size, e, uvz.device)
        groups = fading.shape[1]
    # A branch that there is not passes any tensor, which is not read.
    states = (
        state.kv_sum if lin else out,
        state.k_quad if quad else out,
        state.k_lin if lin else out,
        state.v,
        state.position,
    )
    tensors = (uvz, keys, gamma, beta, cos, sin)
    angles = s // 2 if len(cos) == b else 0
    sizes = dict(E=e, C=options.chunk_size, S=s, QUAD=quad, LIN=lin, ANGLES=angles, HAS_KEYS=keys is not None)
    slice_of_e = next(slice_of_e for rows, slice_of_e in SLICES.items() if b <= rows)
    _attend[(b, triton.cdiv(e, slice_of_e))](
        *(*tensors, bias if quad else out, fading),
        *(*states, out),
        NORM=options.linear_norm,
        GROUPS=groups,
        KEYS=min(KEYS, options.chunk_size),
        SLICE=slice_of_e,
        **sizes,
    )
    _remember[(b,)](*tensors, *states[1:3], state.position, **sizes)
    return out, state


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _copy(
    uvz, keys, gamma, beta, cos, sin, row, h: tl.constexpr, E,
    S: tl.constexpr, ANGLES: tl.constexpr, HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """The rotated copy ``h`` of the base of a row, in two halves; every second one of ``keys``, if given."""
    half = tl.arange(0, S // 2)
    z = uvz + row.to(tl.int64) * (2 * E + S) + 2 * E + half
    if HAS_KEYS and h % 2 == 1:
        z = keys + row.to(tl.int64) * S + half
    z1, z2 = _silu(tl.load(z).to(tl.float32)), _silu(tl.load(z + S // 2).to(tl.float32))
    g, o = gamma + h * S + half, beta + h * S + half
    x1 = tl.load(g).to(tl.float32) * z1 + tl.load(o).to(tl.float32)
    x2 = tl.load(g + S // 2).to(tl.float32) * z2 + tl.load(o + S // 2).to(tl.float32)
    c = tl.load(cos + row * ANGLES + half).to(tl.float32)
    s = tl.load(sin + row * ANGLES + half).to(tl.float32)
    return x1 * c - x2 * s, x2 * c + x1 * s


@triton.jit
def _attend(
    uvz,
    new_keys,
    gamma,
    beta,
    cos,
    sin,
    bias,
    fading,
    kv_sum,
    k_quad,
    k_lin,
    v_ring,
    position,
    out,
    E,
    C: tl.constexpr,
    S: tl.constexpr,
    QUAD: tl.constexpr,
    LIN: tl.constexpr,
    ANGLES: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    KEYS: tl.constexpr,
    SLICE: tl.constexpr,
):
    row, half = tl.program_id(0), tl.arange(0, S // 2)
    wide_row = row.to(tl.int64)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    inside = columns < E
    here = tl.load(position + row)
    slot = (here % C).to(tl.int32)
    activations = uvz + wide_row * (2 * E + S)
    v = _silu(tl.load(activations + E + columns, mask=inside, other=0).to(tl.float32))
    rings, keys = v_ring + wide_row * C * E, wide_row * C * S
    total = tl.zeros((SLICE,), tl.float32)
    if LIN:
        first: tl.constexpr = 2 if QUAD else 0
        q1, q2 = _copy(uvz, new_keys, gamma, beta, cos, sin, row, first, E, S, ANGLES, HAS_KEYS)
        count = (here - slot).to(tl.float32)
        denominator = tl.maximum(count, 1.0) if NORM == "mean" else C * 1.0
        lin1, lin2 = q1 / denominator, q2 / denominator
        if NORM == "fading":
            # Each column has a divisor of its own, and fades when a chunk begins.
            lin1, lin2 = q1, q2
            scale = fading_scale(fading, here - slot, columns, E, GROUPS, C)
            kept = tl.where(slot == 0, kept_of(fading, columns, E, GROUPS), 1.0)
        # The token that leaves the ring joins the sum.
        old_v = tl.load(rings + slot * E + columns, mask=inside, other=0).to(tl.float32)
        old = k_lin + keys + slot * S + half
        cells = kv_sum + (wide_row * S + half[:, None]) * E + columns[None, :]
        kv1 = tl.load(cells, mask=inside[None, :], other=0)
        if NORM == "fading":
            kv1 *= kept[None, :]
        kv1 += tl.load(old).to(tl.float32)[:, None] * old_v[None, :]
        tl.store(cells, kv1, mask=inside[None, :])
        total += tl.sum(lin1[:, None] * kv1, axis=0)
        cells += S // 2 * E
        kv2 = tl.load(cells, mask=inside[None, :], other=0)
        if NORM == "fading":
            kv2 *= kept[None, :]
        kv2 += tl.load(old + S // 2).to(tl.float32)[:, None] * old_v[None, :]
        tl.store(cells, kv2, mask=inside[None, :])
        total += tl.sum(lin2[:, None] * kv2, axis=0)
        if NORM == "fading":
            total *= scale
    if QUAD:
        quad1, quad2 = _copy(uvz, new_keys, gamma, beta, cos, sin, row, 0, E, S, ANGLES, HAS_KEYS)
        own1, own2 = _copy(uvz, new_keys, gamma, beta, cos, sin, row, 1, E, S, ANGLES, HAS_KEYS)
        own = tl.sum(quad1 * own1 + quad2 * own2, axis=0) / C + tl.load(bias).to(tl.float32)
        own = tl.maximum(own, 0.0)
        total += own * own * v
    for start in range(0, C, KEYS):
        j = start + tl.arange(0, KEYS)
        weights = tl.zeros((KEYS,), tl.float32)
        if QUAD:
            at = k_quad + keys + j[:, None] * S + half[None, :]
            products = tl.load(at).to(tl.float32) * quad1[None, :]
            products += tl.load(at + S // 2).to(tl.float32) * quad2[None, :]
            near = tl.load(bias + slot - j, mask=j < slot, other=0).to(tl.float32)
            scores = tl.maximum(tl.sum(products, axis=1) / C + near, 0.0)
            weights = tl.where(j < slot, scores * scores, weights)
        if LIN:
            at = k_lin + keys + j[:, None] * S + half[None, :]
            products = tl.load(at).to(tl.float32) * lin1[None, :]
            products += tl.load(at + S // 2).to(tl.float32) * lin2[None, :]
            weights = tl.where(j > slot, tl.sum(products, axis=1), weights)
        ring = rings + j[:, None] * E + columns[None, :]
        values = tl.load(ring, mask=inside[None, :], other=0).to(tl.float32)
        if LIN and NORM == "fading":
            values = tl.where((j > slot)[:, None], values * scale[None, :], values)
        total += tl.sum(weights[:, None] * values, axis=0)
    # Every thread has read the slot before one overwrites it.
    tl.debug_barrier()
    tl.store(rings + slot * E + columns, v, mask=inside)
    u = _silu(tl.load(activations + columns, mask=inside, other=0).to(tl.float32))
    tl.store(out + wide_row * E + columns, u * total, mask=inside)


@triton.jit
def _remember(
    uvz,
    keys,
    gamma,
    beta,
    cos,
    sin,
    k_quad,
    k_lin,
    position,
    E,
    C: tl.constexpr,
    S: tl.constexpr,
    QUAD: tl.constexpr,
    LIN: tl.constexpr,
    ANGLES: tl.constexpr,
    HAS_KEYS: tl.constexpr,
):
    row, half = tl.program_id(0), tl.arange(0, S // 2)
    here = tl.load(position + row)
    at = (row.to(tl.int64) * C + here % C) * S + half
    if QUAD:
        k1, k2 = _copy(uvz, keys, gamma, beta, cos, sin, row, 1, E, S, ANGLES, HAS_KEYS)
        tl.store(k_quad + at, k1)
        tl.store(k_quad + at + S // 2, k2)
    if LIN:
        last: tl.constexpr = 3 if QUAD else 1
        k1, k2 = _copy(uvz, keys, gamma, beta, cos, sin, row, last, E, S, ANGLES, HAS_KEYS)
        tl.store(k_lin + at, k1)
        tl.store(k_lin + at + S // 2, k2)
    tl.debug_barrier()
    tl.store(position + row, here + 1)
