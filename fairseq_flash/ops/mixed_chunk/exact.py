"""Inputs of small integers, of which every sum is exact in 16 bits: what a kernel is tried out with.

SiLU of 0 and 64 is 0 and 64, and its slope 1/2 and 1, in every dtype; cosines and sines are 0 and 1; all
else is a power of two times a small integer. So a kernel's result equals the reference's in float64,
rounded once. Of a fading mean the first group keeps a half and the last all, and either is divided by a power
of two in some chunks, far from the start the first in all: elsewhere nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from fairseq_flash.ops.mixed_chunk import gated
from fairseq_flash.ops.mixed_chunk.inputs import Carry, Options
from fairseq_flash.ops.mixed_chunk.linear import linear_denominator

__all__ = ["draw", "mistakes", "results"]

#: Chunks that have passed: a power of two, and so many that what keeps a half is divided by 2c.
FAR = 64


def draw(
    options: Options,
    sizes: tuple[int, int, int, int],
    *,
    padded: bool = False,
    carried: bool = False,
    keyed: bool = False,
) -> tuple[gated.Projected, Optional[Carry], Tensor]:
    """Inputs and the gradient of the output, in float64 on the CPU, the same in each call.

    Args:
        options: With ``linear_norm="chunk"`` or ``"fading"``, and a power of two as chunk size.
        sizes: Rows ``b``, tokens ``n``, size of values ``e``, size of queries and keys ``s``.
        padded: Whether the last row is padded.
        carried: Whether something is carried in.
        keyed: Whether keys have a base of their own.

    Returns:
        The tensors; what is carried, or None; and the gradient.
    """
    (b, n, e, s), generator = sizes, torch.Generator().manual_seed(0)

    def sparse(*shape: int, one_in: int, signed: bool = True) -> Tensor:
        """Ones, or signs, at one place in ``one_in``, zero elsewhere."""
        values = torch.randint(-1 if signed else 1, 2, shape, generator=generator).double()
        return values * (torch.randint(0, one_in, shape, generator=generator) == 0)

    u, v = sparse(b, n, e, one_in=2, signed=False), sparse(b, n, e, one_in=8, signed=False)
    uvz = 64 * torch.cat((u, v, sparse(b, n, s, one_in=16, signed=False)), dim=-1)
    # q k / c is a multiple of 1/8, whose square 16 bits hold; the linear branch's keys are signs.
    c = options.chunk_size
    scales = {"quad": (c / 64 / 64, 1 / 8 / 64 * 64), "lin": (1 / 64, 1 / 64)}
    scale = torch.tensor([x for name in options.branches for x in scales[name]], dtype=torch.float64)
    gamma = scale[:, None] * (1 - 2 * torch.randint(0, 2, (len(scale), s), generator=generator))
    turns = torch.randint(0, 4, (n, s // 2), generator=generator)
    cos, sin = (torch.tensor(x, dtype=torch.float64)[turns] for x in ([1, 0, -1, 0], [0, 1, 0, -1]))
    bias = sparse(min(c, n), min(c, n), one_in=4) / 8 if "quad" in options.branches else None
    lengths = torch.tensor([n] * (b - 1) + [max(0, n - 9)]) if padded else None
    carry = None
    if carried:
        # Of rows by turns, another chunk is the one before which a power of two has passed.
        carry = Carry(64 * sparse(b, s, e, one_in=8), c * (FAR - torch.arange(b) % -(-n // c)))
    grad = sparse(b, n, e, one_in=8) * (torch.randint(0, 8, (b, n, 1), generator=generator) == 0)
    keys = 64 * sparse(b, n, s, one_in=16, signed=False) if keyed else None
    if options.linear_norm == "fading":
        before = carry.count if carry else torch.zeros(b, dtype=torch.long)
        count = before[:, None] + torch.arange(n) // c * c
        divisor = linear_denominator("fading", c, count, e, torch.float64)
        exact = torch.frexp(divisor).mantissa == 0.5
        uvz[..., :e] *= exact
        grad *= exact
    return gated.Projected(uvz, gamma, 0 * gamma, cos, sin, bias, lengths, keys), carry, grad


def results(
    run: Callable, options: Options, inputs: tuple, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The output of an implementation and its gradients, by name, zero at padding.

    Args:
        run: The implementation.
        options: Of :func:`draw`.
        inputs: From :func:`draw`.
        dtype: Of the computation; angles stay float32 or wider.
        device: Where to compute.

    Returns:
        ``out``, and gradients by the names of ``Projected`` and ``Carry``.
    """
    projected, carry, grad = inputs
    wide = torch.promote_types(dtype, torch.float32)
    kinds = dict(cos=wide, sin=wide, kv_sum=wide, lengths=None, count=None)
    given = projected._asdict() | (carry._asdict() if carry else {})
    moved = {k: x if x is None else x.to(device, kinds.get(k, dtype), copy=True) for k, x in given.items()}
    leaves = {
        k: x.requires_grad_()
        for k, x in moved.items()
        if x is not None and k not in ("cos", "sin", "lengths", "count")
    }
    carry = Carry(moved.pop("kv_sum"), moved.pop("count")) if carry else None
    out = run(gated.Projected(**moved), options, carry)
    if projected.lengths is not None:
        real = torch.arange(out.shape[1], device=device) < moved["lengths"].unsqueeze(1)
        out = out.masked_fill(~real.unsqueeze(-1), 0)
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def mistakes(
    run: Callable, options: Options, inputs: tuple, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """What an implementation computes wrongly: names of results, none if all is well.

    Args:
        run: The implementation.
        options: Of :func:`draw`.
        inputs: From :func:`draw`.
        dtype: Of its tensors.
        device: Where it is to run.
    """
    # Whoever asks may be evaluating.
    with torch.inference_mode(False), torch.enable_grad():
        want = results(gated.run, options, inputs, torch.float64, torch.device("cpu"))
        ours = results(run, options, inputs, dtype, device)
    return [name for name, x in ours.items() if not torch.equal(x.cpu(), want[name].to(x.dtype))]
