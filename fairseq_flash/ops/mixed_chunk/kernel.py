"""Gated mixed chunk attention by Triton kernels: the forward and the backward pass as operators of PyTorch.

Between the two passes only the pre-activations are kept. See
:mod:`~fairseq_flash.ops.mixed_chunk.kernel_forward` for what runs and why.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_flash.ops.mixed_chunk import kernel_backward as backward
from fairseq_flash.ops.mixed_chunk import kernel_forward as forward
from fairseq_flash.ops.mixed_chunk.exact import draw, mistakes
from fairseq_flash.ops.mixed_chunk.gated import Projected
from fairseq_flash.ops.mixed_chunk.inputs import Carry, Options

__all__ = ["CHUNK_SIZES", "DTYPES", "WIDTHS", "objections", "run"]

CHUNK_SIZES = (64, 128, 256, 512)
#: Sizes of queries and keys.
WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = forward.INTERPRETED.value
#: Triton's compiled kernels have taken all arguments, with the constants, since 3.3.
LOOKED_UP = not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


class Tiling(NamedTuple):
    """How a kernel cuts its work: rows and columns of a result, depth of a step, warps and stages.

    ``registers``, if not None, are a thread's at most, where two programs would not fit a processor else.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: Optional[int] = None


#: Of 16-bit numbers, the same for every length, as measured on an H200 (scripts/results/kernels.csv).
TILINGS = {
    "scores": Tiling(128, 128, 128, 8, 1),
    "states": Tiling(128, 64, 64, 8, 3),
    "serial": Tiling(128, 64, 64, 8, 3, 128),
    "output": Tiling(64, 64, 64, 4, 3),
    "output_backward": Tiling(64, 64, 64, 4, 4),
    "pairs": Tiling(128, 128, 64, 4, 3),
    "values": Tiling(64, 128, 64, 4, 3),
}
BASE = (8, 4, 4)
#: From so many programs on, each goes through a whole row.
SERIAL_PROGRAMS = 128
#: Without tensor cores: fewer warps, or more stages, spill registers.
FLOAT32_TILING = Tiling(64, 64, 32, 8, 1)


#: Compiled kernels by what Triton compiles anew for, with their constants.
_compiled: dict[tuple, tuple] = {}


def _start(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launches ``programs`` of a kernel.

    Triton looks at each argument and at its own settings before every launch, for longer than many a kernel
    runs. What the arguments decide is looked up here in one place.
    """
    key = None
    if LOOKED_UP:
        key = (id(kernel), args[0].get_device(), *map(_trait, args), *constants.items())
    if key in _compiled:
        found, rest = _compiled[key]
        found[programs, 1, 1](*args, *rest)
        return
    found = kernel[programs,](*args, **constants)
    if LOOKED_UP and isinstance(found, triton.compiler.CompiledKernel):
        _compiled[key] = found, [constants[name] for name in kernel.arg_names[len(args) :]]


def _trait(argument: Any) -> Any:
    """What Triton compiles anew for: type and alignment of a pointer, size and divisors of a number."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return argument


class _Sizes(NamedTuple):
    b: int
    n: int
    e: int
    s: int
    h: int
    chunks: int
    rows: int

    @classmethod
    def of(cls, uvz: Tensor, gamma: Tensor, chunk_size: int) -> _Sizes:
        (b, n, width), (h, s) = uvz.shape, gamma.shape
        rows = min(chunk_size, triton.cdiv(n, 64) * 64)
        return cls(b, n, (width - s) // 2, s, h, triton.cdiv(n, rows), rows)


class _Launch:
    """Sizes, constants and buffers that the kernels of one pass share."""

    def __init__(self, uvz, gamma, lengths, keys, count, chunk_size, causal, norm, quad, lin):
        self.uvz, self.lengths, self.keys, self.count = uvz, lengths, keys, count
        self.sizes = _Sizes.of(uvz, gamma, chunk_size)
        self.chunk_size, self.causal, self.quad, self.lin = chunk_size, causal, quad, lin
        b, _n, _e, s, _h, chunks, rows = self.sizes
        self.grid = b * chunks
        self.copy_stride = self.grid * rows * s
        tf32 = uvz.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        self.fading, groups = None, 1
        if norm == "fading":
            self.fading = forward.fading_table(chunk_size, self.sizes.e, uvz.device)
            groups = self.fading.shape[1]
        self.norm = dict(NORM=norm, GROUPS=groups, CAUSAL=causal)
        self.norm |= dict(HAS_LENGTHS=lengths is not None, CARRIED=count is not None)
        self.product = dict(PRECISION="tf32" if tf32 else "ieee")

    def empty(self, *shape, dtype=None):
        return self.uvz.new_empty(shape, dtype=dtype)

    def tiling(self, kernel):
        """Of a kernel for these tensors: its tiles divide a chunk's rows."""
        tiling = FLOAT32_TILING if self.uvz.dtype == torch.float32 else TILINGS[kernel]
        tile = 64 if self.sizes.rows % tiling.rows else tiling.rows
        compiled = dict(
            DEPTH=min(tiling.depth, self.sizes.s),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            maxnreg=tiling.registers,
        )
        return tile, tiling.columns, compiled

    def copies(self, gamma, beta, cos, sin):
        _b, n, e, s, h, chunks, rows = self.sizes
        copies = self.empty(h, self.grid, rows, s)
        _start(
            forward.copies_kernel, self.grid * rows // 32,
            self.uvz, self.keys, gamma, beta, cos, sin, copies,
            n, chunks, rows, self.copy_stride, _angle_stride(cos),
            E=e, S=s, H=h, BLOCK=32, HAS_KEYS=self.keys is not None,
        )  # fmt: skip
        return copies

    def scores(self, copies, bias, *, turned=False):
        """Queries by keys; with ``turned`` keys by queries as well (zeros are not written there)."""
        _b, _n, _e, s, _h, _chunks, rows = self.sizes
        scores = self.empty(self.grid, rows, rows)
        other = torch.empty_like(scores) if turned else scores
        tile, _, tiling = self.tiling("scores")
        _start(
            forward.scores_kernel, self.grid * (rows // tile) ** 2,
            copies, bias, scores, other, rows, self.copy_stride, bias.shape[-1],
            C=self.chunk_size, S=s, TILE=tile, CAUSAL=self.causal, TURNED=turned, **tiling, **self.product,
        )  # fmt: skip
        return scores, other

    def states(self, copies, source, values=None, initial=None, *, final=False):
        """What each chunk reads, and the sum over all of them if asked: of ``k^T v``, or backward ``q^T do``.

        Activates the values on the way: ``values`` is where they go; without it ``source`` is ``do``.
        """
        b, n, e, s, _h, chunks, rows = self.sizes
        backward, dtype = values is None, self.uvz.dtype
        serial = b * triton.cdiv(e, self.tiling("serial")[1]) >= SERIAL_PROGRAMS and self.lin
        _, columns, tiling = self.tiling("serial" if serial else "states")
        states = whole = sums = self.empty(0)
        if self.lin:
            states = sums = self.empty(self.grid if self.causal else b, s, e)
            if not serial and (not self.causal or dtype == torch.float16):
                # A summary is narrowed once, their sums never; float16 has not the range for either.
                sums = self.empty(self.grid, s, e, dtype=torch.float32 if dtype == torch.float16 else dtype)
            if final:
                whole = self.empty(b, s, e, dtype=torch.float32)
        first, last = 0, chunks
        if self.causal and not final:
            first, last = (1, chunks) if backward else (0, chunks - 1)
        shared = dict(E=e, S=s, C=self.chunk_size, BACKWARD=backward, FINAL=final, **self.norm)
        _start(
            forward.states_kernel, b * (1 if serial else chunks) * triton.cdiv(e, columns),
            source, copies, values, sums, initial, whole, self.lengths, self.count, self.fading,
            n, chunks, rows, first, last,
            STRIDE=e if backward else values.stride(1), COLUMNS=columns, SERIAL=serial, LIN=self.lin,
            PRECISION=self.product["PRECISION"], **tiling, **shared,
        )  # fmt: skip
        if self.lin and not serial:
            _start(
                forward.scan_kernel, b * triton.cdiv(s * e, 1024),
                sums, states, initial, whole, self.lengths, self.count, self.fading,
                n, chunks, rows, first, last,
                BLOCK=1024, **shared,
            )  # fmt: skip
        return states, whole

    def output(self, copies, values, scores, states, grad=None, out=None):
        """The gated output; with ``grad``, gradients of u', in ``out``, and of the branches' sum."""
        b, n, e, _s, _h, chunks, rows = self.sizes
        backward = grad is not None
        result = self.empty(b, n, e)
        tile, columns, tiling = self.tiling("output_backward" if backward else "output")
        _start(
            forward.output_kernel, self.grid * (rows // tile) * triton.cdiv(e, columns),
            self.uvz, copies, values, scores, states, grad, out if backward else result, result,
            n, chunks, rows, self.copy_stride, STRIDE=values.stride(1), CARRIED=self.norm["CARRIED"],
            TILE=tile, COLUMNS=columns, BACKWARD=backward, **tiling, **self.core(),
        )  # fmt: skip
        return result

    def core(self):
        """Constants of the kernels whose products run over keys or columns."""
        _b, _n, e, s, h, _chunks, _rows = self.sizes
        return dict(
            E=e, S=s, H=h, QUAD=self.quad, LIN=self.lin, CAUSAL=self.causal, **self.product,
        )  # fmt: skip

    def pairs_backward(self, grad_branch, copies, values, scores, states, grad_states):
        """Gradients of the scores (before division) and of the copies."""
        _b, n, _e, s, _h, chunks, rows = self.sizes
        grad_copies = torch.empty_like(copies)
        grad_scores = torch.empty_like(scores) if self.quad else None
        tile, _, tiling = self.tiling("pairs")
        tile = min(tile, s)
        programs = self.quad * (rows // tile) ** 2 + self.lin * 2 * (rows // tile) * (s // tile)
        _start(
            backward.pairs_backward_kernel, self.grid * programs,
            values, grad_branch, scores, states, grad_states, grad_scores, grad_copies,
            n, chunks, rows, self.copy_stride, STRIDE=values.stride(1), CARRIED=self.norm["CARRIED"],
            TILE=tile, **tiling, **self.core(),
        )  # fmt: skip
        if self.quad:
            scaled = dict(beta=0, alpha=1 / self.chunk_size)
            queries, keys = grad_copies[0], grad_copies[1]
            torch.baddbmm(queries, grad_scores, copies[1], out=queries, **scaled)
            torch.baddbmm(keys, grad_scores.mT, copies[0], out=keys, **scaled)
        return grad_scores, grad_copies

    def values_backward(self, grad_branch, copies, turned, grad_states, grad_uvz):
        _b, n, e, _s, _h, chunks, rows = self.sizes
        tile, columns, tiling = self.tiling("values")
        _start(
            backward.values_backward_kernel, self.grid * (rows // tile) * triton.cdiv(e, columns),
            self.uvz, grad_branch, copies, turned, grad_states, self.lengths, grad_uvz,
            n, chunks, rows, self.copy_stride, TILE=tile, COLUMNS=columns,
            HAS_LENGTHS=self.norm["HAS_LENGTHS"], **tiling, **self.core(),
        )  # fmt: skip

    def base_backward(self, gamma, cos, sin, grad_copies, grad_uvz):
        """Fills the part of z'; returns the gradients of gamma and beta, (2, h, s), and of the keys' base."""
        _b, n, e, s, h, chunks, rows = self.sizes
        block, blocks, warps = BASE
        programs = self.grid * rows // (block * blocks)
        partial = self.empty(programs, 2, h, s, dtype=torch.float32)
        grad_keys = None if self.keys is None else torch.empty_like(self.keys)
        _start(
            backward.base_backward_kernel, programs,
            self.uvz, self.keys, gamma, cos, sin, grad_copies, grad_uvz, grad_keys, partial,
            n, chunks, rows, self.copy_stride, _angle_stride(cos),
            E=e, S=s, H=h, BLOCK=block, BLOCKS=blocks, HAS_KEYS=self.keys is not None, num_warps=warps,
        )  # fmt: skip
        return *partial.sum(0), grad_keys


def _angle_stride(cos: Tensor) -> int:
    return cos[0].numel() if cos.dim() == 3 else 0


def _prepare(launch, gamma, beta, cos, sin, bias, *, turned=False):
    """What both passes begin with: copies, and scores (also turned, if asked)."""
    copies = launch.copies(gamma, beta, cos, sin)
    return copies, *(launch.scores(copies, bias, turned=turned) if launch.quad else (copies, copies))


def _differentiated(launch, copies, scores, turned, kv_sum, grad, grad_uvz):
    """Fills ``grad_uvz`` but for z'; returns gradients of scores, copies and carry."""
    # The values lie where their gradient will, which needs them no more.
    source = launch.sizes.e
    values = grad_uvz[..., source:]
    states, _ = launch.states(copies[-1], launch.uvz[..., source:], values, kv_sum)
    grad_branch = launch.output(copies, values, scores, states, grad, grad_uvz)
    grad_states = carried = states
    if launch.lin:
        grad_states, carried = launch.states(copies[-2], grad_branch, final=kv_sum is not None)
    pairs = launch.pairs_backward(grad_branch, copies, values, scores, states, grad_states)
    launch.values_backward(grad_branch, copies, turned, grad_states, grad_uvz)
    return *pairs, carried


def _operator(name: str) -> Callable[[Callable], Any]:
    """Makes a function PyTorch's operator ``fairseq_flash::name``.

    Without ``torch.library.custom_op``, whose checks of each call take as long as several kernels.
    """

    def register(function: Callable) -> Any:
        """Defines the operator by the function's annotations; returns it."""
        qualified = f"fairseq_flash::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, ("cpu", "cuda"), torch.compiler.disable(function))
        return getattr(torch.ops.fairseq_flash, name).default

    return register


@_operator("gated_mixed_chunk")
def _gated(
    uvz: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor, sin: Tensor, bias: Optional[Tensor],
    lengths: Optional[Tensor], keys: Optional[Tensor], kv_sum: Optional[Tensor], count: Optional[Tensor],
    chunk_size: int, causal: bool, norm: str, quad: bool, lin: bool,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(uvz):
        launch = _Launch(uvz, gamma, lengths, keys, count, chunk_size, causal, norm, quad, lin)
        copies, scores, _ = _prepare(launch, gamma, beta, cos, sin, bias)
        b, n, e, *_ = launch.sizes
        values = launch.empty(b, n, e)
        states, _ = launch.states(copies[-1], uvz[..., e:], values, kv_sum)
        return launch.output(copies, values, scores, states)


@torch.library.register_fake("fairseq_flash::gated_mixed_chunk")
def _(uvz, gamma, beta, cos, sin, bias, lengths, keys, kv_sum, count, chunk_size, causal, norm, quad, lin):
    b, n, width = uvz.shape
    return uvz.new_empty(b, n, (width - gamma.shape[1]) // 2)


@_operator("gated_mixed_chunk_backward")
def _gated_backward(
    grad: Tensor, uvz: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor, sin: Tensor,
    bias: Optional[Tensor], lengths: Optional[Tensor], keys: Optional[Tensor],
    kv_sum: Optional[Tensor], count: Optional[Tensor],
    chunk_size: int, causal: bool, norm: str, quad: bool, lin: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(uvz):
        launch = _Launch(uvz, gamma, lengths, keys, count, chunk_size, causal, norm, quad, lin)
        grad_uvz = torch.empty_like(uvz)
        copies, scores, turned = _prepare(launch, gamma, beta, cos, sin, bias, turned=True)
        grad_scores, grad_copies, carried = _differentiated(
            launch, copies, scores, turned, kv_sum, grad.contiguous(), grad_uvz
        )
        grad_gamma, grad_beta, grad_keys = launch.base_backward(gamma, cos, sin, grad_copies, grad_uvz)
    grad_bias = uvz.new_empty(0)
    if quad:
        m = bias.shape[-1]
        grad_bias = grad_scores.sum(0, dtype=torch.float32)[:m, :m].to(bias.dtype, copy=True)
    return (
        grad_uvz,
        grad_gamma.to(gamma.dtype, copy=True),
        grad_beta.to(beta.dtype, copy=True),
        grad_bias,
        uvz.new_empty(0) if keys is None else grad_keys,
        uvz.new_empty(0) if kv_sum is None else carried.to(kv_sum.dtype),
    )


@torch.library.register_fake("fairseq_flash::gated_mixed_chunk_backward")
def _(
    grad, uvz, gamma, beta, cos, sin, bias, lengths, keys, kv_sum, count, chunk_size, causal, norm, quad, lin
):
    return (
        torch.empty_like(uvz),
        torch.empty_like(gamma),
        torch.empty_like(beta),
        torch.empty_like(bias) if quad else uvz.new_empty(0),
        uvz.new_empty(0) if keys is None else torch.empty_like(keys),
        uvz.new_empty(0) if kv_sum is None else torch.empty_like(kv_sum),
    )


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


@once_differentiable
def _differentiate(ctx, grad):
    uvz, gamma, beta, *rest = _gated_backward(grad, *ctx.saved_tensors, *ctx.options)
    given = (ctx.saved_tensors[place] for place in (5, 7, 8))
    bias, keys, kv_sum = (None if x is None else found for x, found in zip(given, rest, strict=True))
    return uvz, gamma, beta, None, None, bias, None, keys, kv_sum, None, *(None,) * 5


torch.library.register_autograd("fairseq_flash::gated_mixed_chunk", _differentiate, setup_context=_keep)


def run(projected: Projected, options: Options, carry: Optional[Carry] = None) -> Tensor:
    """As :func:`~fairseq_flash.ops.gated_mixed_chunk`; sums in float32, what lies between is narrowed."""
    b, n, width = projected.uvz.shape
    if n == 0 or b == 0:
        return projected.uvz[..., : (width - projected.gamma.shape[1]) // 2]
    return _gated(*_arguments(projected, options, carry))


def objections(projected: Projected, options: Options) -> list[str]:
    """Why the kernels cannot run; for the first tensors on a card, they are tried out there."""
    uvz, s, c, found = projected.uvz, projected.gamma.shape[1], options.chunk_size, []
    if uvz.device.type != "cuda" and not INTERPRETED:
        found.append(f"uvz is on {uvz.device.type}, not on a CUDA device")
    if uvz.dtype not in DTYPES:
        found.append(f"uvz is {uvz.dtype}; the kernels take {', '.join(map(str, DTYPES))}")
    if s not in WIDTHS:
        found.append(f"attention_dim is {s}; the kernels take {' or '.join(map(str, WIDTHS))}")
    if c not in CHUNK_SIZES:
        found.append(f"chunk_size is {c}; the kernels take {', '.join(map(str, CHUNK_SIZES))}")
    if options.softmax or options.dropout:
        found.append("softmax and dropout are the reference's alone")
    if not found and not INTERPRETED:
        fading = _norm(options) == "fading"
        keyed = projected.keys is not None
        found += _tried(uvz.device.index, uvz.dtype, s, c, options.causal, options.branches, keyed, fading)
    return found


@torch.compiler.assume_constant_result
def _tried(*configuration) -> list[str]:
    return list(_failures(*configuration))


@functools.cache
def _failures(
    index: int,
    dtype: torch.dtype,
    s: int,
    chunk_size: int,
    causal: bool,
    branches: tuple[str, ...],
    keyed: bool,
    fading: bool,
) -> tuple[str, ...]:
    """Tries the kernels out in a configuration on a card, once: small integers, of which every sum is exact.

    Each tiling may be compiled wrongly where another is right: no configuration speaks for another. Few rows
    and many are summed up by different kernels. What a fading sum keeps is felt with a carry alone.
    """
    options = Options(chunk_size, causal, "fading" if fading else "chunk", branches=branches)
    device, found = torch.device("cuda", index), set()
    try:
        for b, carried in itertools.product((2, 64), (False, True) if fading else (False,)):
            inputs = draw(options, (b, chunk_size + 70, 72, s), padded=True, carried=carried, keyed=keyed)
            found |= {*mistakes(run, options, inputs, dtype, device)}
        if not found:
            return ()
        wrong = f"computes {', '.join(sorted(found))} wrongly"
    except Exception as error:
        # Another card may have less of what a tiling needs, another Triton another way to say so.
        wrong = f"fails with {type(error).__name__}: {error}"
    pair = f"Triton {triton.__version__} on {torch.cuda.get_device_name(index)}"
    wrong = f"{pair} {wrong} in {dtype} for chunks of {chunk_size}"
    warnings.warn(f"{wrong}; the kernels are left out", stacklevel=2)
    return (wrong,)


def _arguments(projected: Projected, options: Options, carry: Optional[Carry]) -> tuple:
    tensors = [None if x is None else x.contiguous() for x in (*projected, *(carry or (None, None)))]
    quad, lin = (name in options.branches for name in ("quad", "lin"))
    if not quad:
        tensors[5] = None
    if not lin:
        tensors[8:] = None, None
    return *tensors, options.chunk_size, options.causal, _norm(options), quad, lin


def _norm(options: Options) -> str:
    """What the linear branch is divided by, one and the same without one."""
    return options.linear_norm if "lin" in options.branches else "chunk"
