"""The fast path in PyTorch: keeps pre-activations and what is dear, and computes the rest again.

Kept for the backward pass are ``uvz``, the output before the gate (up to ``c + s`` multiply-adds a number)
and the sums that the chunks read (``c`` multiply-adds a number): ``3e + s + s e / c`` numbers a token, and
``s`` more of keys with a base of their own. Autograd on the reference keeps both sides of every SiLU, product
and sum. SiLU, the rotated copies and the scores are computed again.

Scores above the diagonal are left out block by block, nobody sums the last chunk of a causal row, the running
sum is added up in place, and gradients are written where they belong: no concatenation, no zeros to add to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_flash.ops.mixed_chunk.gated import Projected
from fairseq_flash.ops.mixed_chunk.in_place import add_or_put, add_product, rotated
from fairseq_flash.ops.mixed_chunk.inputs import Carry, Options
from fairseq_flash.ops.mixed_chunk.linear import kept_of_chunks, linear_denominator
from fairseq_flash.ops.mixed_chunk.state import in_columns
from fairseq_flash.ops.positions import trailing_padding
from fairseq_flash.ops.precision import widened

__all__ = ["objections", "run"]

#: Queries in a block: the smaller, the less is computed above the diagonal, and the slower each product.
BLOCK = 128

Gradients = tuple[Optional[Tensor], ...]
_silu, _silu_backward = nn.functional.silu, torch.ops.aten.silu_backward


def objections(projected: Projected, options: Options) -> list[str]:
    """Why the fast path cannot run."""
    uvz, found = projected.uvz, []
    if uvz.device.type != "cpu":
        found.append(f"uvz is on {uvz.device.type}; this path was measured to win on a CPU alone")
    if uvz.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        found.append(f"uvz is {uvz.dtype}, whose squared scores would overflow")
    if options.softmax or options.dropout:
        found.append("softmax and dropout are the reference's alone")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        found.append("a compiler is reading the operations; it fuses those of the reference")
    return found


def run(projected: Projected, options: Options, carry: Optional[Carry]) -> Tensor:
    """As :func:`~fairseq_flash.ops.gated_mixed_chunk`; computes in the dtype of ``uvz``, sums in float32."""
    uvz, gamma, beta, cos, sin, bias, lengths, keys = projected
    n = uvz.shape[1]
    if n == 0:
        return uvz[..., : (uvz.shape[2] - gamma.shape[1]) // 2]
    missing = -n % options.chunk_of(n)
    if missing:
        # Zeros need no mask: their values are silu(0) = 0.
        uvz, cos, sin, keys = (
            x if x is None else nn.functional.pad(x, (0, 0, 0, missing)) for x in (uvz, cos, sin, keys)
        )
    kv_sum, count = (None, None) if carry is None else carry
    if lengths is None and not options.causal:
        lengths = uvz.new_full((uvz.shape[0],), n, dtype=torch.long)
    # Under autocast they are as wide as the weights.
    gamma, beta = gamma.to(uvz.dtype), beta.to(uvz.dtype)
    fixed = _Fixed(options, options.chunk_of(n))
    given = _Given(uvz, keys, gamma, beta, bias, kv_sum, cos, sin, lengths, count, fixed)
    return _Recomputed.apply(*given)[:, :n]


class _Fixed(NamedTuple):
    options: Options
    c: int


class _Given(NamedTuple):
    """What autograd is given, in this order: the gradients come in the same."""

    uvz: Tensor
    keys: Optional[Tensor]
    gamma: Tensor
    beta: Tensor
    bias: Optional[Tensor]
    kv_sum: Optional[Tensor]
    cos: Tensor
    sin: Tensor
    lengths: Optional[Tensor]
    count: Optional[Tensor]  # type: ignore[assignment]  # a tuple has a method of that name
    fixed: _Fixed


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.fixed = arguments
        with torch.autocast(tensors[0].device.type, enabled=False):
            grid = _Grid(_Given(*arguments))
            out, sums = grid.attend()
            ctx.save_for_backward(*tensors, out, sums)
            return (_silu(grid.u) * out).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gated: Tensor) -> Gradients:
        *arguments, out, sums = ctx.saved_tensors
        with torch.autocast(d_gated.device.type, enabled=False):
            grid = _Grid(_Given(*arguments, ctx.fixed))
            return (*grid.gradients(d_gated, out, sums), None, None, None, None, None)


class _Grid:
    """Rows as chunks, and what is cheap to compute of them: made anew in each pass."""

    def __init__(self, given: _Given) -> None:
        uvz, self.keys, gamma, beta, bias, self.kv_sum, cos, sin, lengths, count, fixed = given
        self.options, c = fixed
        s, self.c, self.causal = gamma.shape[1], c, self.options.causal
        self.e = e = (uvz.shape[2] - s) // 2
        self.uvz, self.gamma, self.angles = uvz, gamma, (cos, sin)
        self.u, self.v_pre, self.z_pre = uvz.unflatten(1, (-1, c)).split([e, e, s], dim=-1)
        self.v, self.bases, self.padding = _silu(self.v_pre), _silu(uvz[None, ..., 2 * e :]), None
        if self.keys is not None:
            self.bases = torch.cat((self.bases, _silu(self.keys[None])))
        if lengths is not None:
            self.padding = trailing_padding(lengths, uvz.shape[1]).view(*self.v.shape[:3], 1)
            self.v.masked_fill_(self.padding, 0)
        gamma, beta = (x.view(-1, 2, 1, 1, s) for x in (gamma, beta))
        copies = rotated(torch.addcmul(beta, self.bases, gamma), cos, sin).unflatten(3, (-1, c))
        pairs = dict(zip(self.options.branches, copies, strict=True))
        self.quad, self.lin = pairs.get("quad"), pairs.get("lin")
        if self.quad is not None:
            hidden = torch.ones(c, c, dtype=torch.bool, device=bias.device).triu(1)
            self.bias = (bias.masked_fill(hidden, -torch.inf) if self.causal else bias).to(uvz.dtype)
        if self.lin is not None:
            self.denominators = self._denominators(lengths, count)
            self.kept = kept_of_chunks(self.options.linear_norm, e, uvz.device)

    def attend(self) -> tuple[Tensor, Optional[Tensor]]:
        """The output before the gate (b, g, c, e), and what the chunks read, (g or 1, b, s, e)."""
        out = torch.zeros_like(self.v) if self.quad is None else torch.empty_like(self.v)
        for rows, columns in self._blocks():
            attention = self._relu(rows, columns).square_()
            torch.bmm(attention, self.v.flatten(0, 1)[:, columns], out=out.flatten(0, 1)[:, rows])
        if self.lin is None:
            return out, None
        sums = self._sums()
        for queries, seen, reached in self._readers(self.lin[0], sums, out):
            reached.baddbmm_(queries, seen)
        return out, sums

    def gradients(self, d_gated: Tensor, out: Tensor, sums: Optional[Tensor]) -> Gradients:
        """Gradients of uvz, keys, gamma, beta, bias and kv_sum."""
        d_gated = d_gated.unflatten(1, (-1, self.c))
        d_uvz = torch.empty_like(self.uvz)
        d_u, d_v_pre, d_z_pre = d_uvz.unflatten(1, (-1, self.c)).split(
            [self.e, self.e, self.gamma.shape[1]], dim=-1
        )
        _silu_backward(d_gated * out, self.u, grad_input=d_u)
        d_out = _silu(self.u).mul_(d_gated)
        d_v = torch.zeros_like(self.v) if self.quad is None else torch.empty_like(self.v)
        d_copies, d_bias, d_kv_sum = [], None, None
        if self.quad is not None:
            *d_pair, d_bias = self._quad_gradients(d_out, d_v)
            d_copies += d_pair
        if self.lin is not None:
            *d_pair, d_kv_sum = self._lin_gradients(d_out, d_v, sums)
            d_copies += d_pair
        if self.padding is not None:
            d_v.masked_fill_(self.padding, 0)
        _silu_backward(d_v, self.v_pre, grad_input=d_v_pre)
        (d_z, *d_base), d_gamma, d_beta = self._offset_scale_gradients(torch.stack(d_copies).flatten(2, 3))
        _silu_backward(d_z.unflatten(1, (-1, self.c)), self.z_pre, grad_input=d_z_pre)
        d_keys = None if self.keys is None else _silu_backward(*d_base, self.keys)
        return d_uvz, d_keys, d_gamma, d_beta, d_bias, d_kv_sum

    def _quad_gradients(self, d_out: Tensor, d_v: Tensor) -> Gradients:
        (q, k), v = (x.flatten(0, 1) for x in self.quad), self.v.flatten(0, 1)
        d_out, d_v = d_out.flatten(0, 1), d_v.flatten(0, 1)
        d_q, d_k = torch.empty_like(q), torch.empty_like(k)
        d_bias = torch.zeros_like(self.bias, dtype=widened(v.dtype))
        scale = 2 / self.options.chunk_size
        # The widest block comes first: it writes all keys, and the others add to it.
        for rows, columns in reversed(list(self._blocks())):
            relu = self._relu(rows, columns)
            half = torch.bmm(d_out[:, rows], v[:, columns].transpose(1, 2)).mul_(relu)
            d_bias[rows, columns] = half.sum(0, dtype=d_bias.dtype).mul_(2)
            torch.bmm(half, k[:, columns] * scale, out=d_q[:, rows])
            add_or_put(d_k, columns, half.transpose(1, 2), q[:, rows] * scale)
            add_or_put(d_v, columns, relu.square_().transpose(1, 2), d_out[:, rows])
        return d_q.view_as(self.quad[0]), d_k.view_as(self.quad[1]), d_bias

    def _lin_gradients(self, d_out: Tensor, d_v: Tensor, sums: Tensor) -> Gradients:
        q, k = self.lin
        d_q, d_k = torch.empty_like(q), torch.empty_like(k)
        if self.causal:
            # Nobody is seen by the first chunk, and nobody sees the last one.
            d_q[:, 0].zero_()
            d_k[:, -1].zero_()
        for d_queries, seen, d_reached in self._readers(d_q, sums, d_out):
            torch.bmm(d_reached, seen.transpose(1, 2), out=d_queries)
        d_sum = torch.zeros_like(sums[0], dtype=widened(q.dtype))
        if not self.causal:
            add_product(d_sum, q.flatten(1, 2).transpose(1, 2), d_out.flatten(1, 2))
            d_sum.div_(self.denominators[0])
            self._summary_gradients(d_sum, *(x.flatten(1, 2) for x in (k, self.v, d_k, d_v)))
            return d_q, d_k, d_sum if self.kv_sum is not None else None
        for g in reversed(range(len(sums))):
            if g < len(sums) - 1:
                self._summary_gradients(d_sum, k[:, g], self.v[:, g], d_k[:, g], d_v[:, g])
            self._fade(d_sum)
            if g > 0 or self.kv_sum is not None:
                # Divided is the narrower one, but for columns with divisors of their own.
                divided = q if self.kept is None else d_out
                narrow = (divided[:, g] / self.denominators[g]).to(q.dtype)
                pair = (narrow, d_out[:, g]) if self.kept is None else (q[:, g], narrow)
                add_product(d_sum, pair[0].transpose(1, 2), pair[1])
        return d_q, d_k, d_sum if self.kv_sum is not None else None

    @staticmethod
    def _summary_gradients(d_sum: Tensor, k: Tensor, v: Tensor, d_k: Tensor, d_v: Tensor) -> None:
        """Of ``k^T v`` (b, s, e): puts that of k, adds that of v."""
        d_sum = d_sum.to(v.dtype)
        d_v.baddbmm_(k, d_sum)
        torch.bmm(v, d_sum.transpose(1, 2), out=d_k)

    def _offset_scale_gradients(self, d_copies: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Of the bases, (b, n, s) each, gamma and beta."""
        cos, sin = self.angles
        d_copies = rotated(d_copies, cos, -sin)
        d_bases, d_gamma = [], torch.empty_like(self.gamma)
        for first, base in enumerate(self.bases):
            own = slice(first, None, len(self.bases))
            d_gamma[own] = torch.stack([(copy * base).sum((0, 1)) for copy in d_copies[own]])
            d_base, *others = zip(d_copies[own], self.gamma[own], strict=True)
            d_bases.append(torch.mul(*d_base))
            for copy, scale in others:
                d_bases[-1].addcmul_(copy, scale)
        return d_bases, d_gamma, d_copies.sum((1, 2))

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that they see, of the quadratic branch."""
        step = BLOCK if self.causal else self.c
        for start in range(0, self.c, step) if self.quad is not None else ():
            end = min(start + step, self.c)
            yield slice(start, end), slice(0, end if self.causal else self.c)

    def _relu(self, rows: slice, columns: slice) -> Tensor:
        q, k = (x.flatten(0, 1) for x in self.quad)
        keys = k[:, columns].transpose(1, 2)
        scale = 1 / self.options.chunk_size
        return torch.baddbmm(self.bias[rows, columns], q[:, rows], keys, alpha=scale).relu_()

    def _readers(self, queries: Tensor, sums: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, what they see and where it goes: chunk by chunk, or the whole row."""
        if not self.causal:
            return [(queries.flatten(1, 2), sums[0], out.flatten(1, 2))]
        first = 1 if self.kv_sum is None else 0
        return [(queries[:, g], sums[g], out[:, g]) for g in range(first, len(sums))]

    def _sums(self) -> Tensor:
        k, v = self.lin[1], self.v
        b, g, _, s = k.shape
        total = v.new_zeros(b, s, self.e, dtype=widened(v.dtype))
        if self.kv_sum is not None:
            total += self.kv_sum
        if not self.causal:
            add_product(total, k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2))
            # The sum grows with the position: divided before it is narrowed.
            return total.div_(self.denominators[0]).to(v.dtype).unsqueeze(0)
        sums = v.new_empty(g, b, s, self.e)
        for index in range(g):
            if index > 0:
                self._fade(total)
                add_product(total, k[:, index - 1].transpose(1, 2), v[:, index - 1])
            sums[index] = total / self.denominators[index]
        return sums

    def _fade(self, total: Tensor) -> None:
        """What a sum (b, s, e), or its gradient, keeps across a chunk's border."""
        if self.kept is not None:
            total.mul_(in_columns(self.kept, total))

    def _denominators(self, lengths: Optional[Tensor], count: Optional[Tensor]) -> Tensor:
        """Of every chunk, or of the whole row: (g or 1, b or 1, 1, 1 or e)."""
        device = self.v.device
        counts = torch.arange(self.v.shape[1], device=device).view(-1, 1) * self.c
        if not self.causal:
            counts = lengths.view(1, -1)
        if count is not None:
            counts = counts + count
        options, wide = self.options, widened(self.v.dtype)
        return linear_denominator(options.linear_norm, options.chunk_size, counts, self.e, wide).unsqueeze(2)
