"""Proves that cross-attention is the definition's: sources of any length and padding, in any precision."""

import math

import pytest
import torch

from fairseq_flash import ops
from support import oracle
from support.pieces import error

TOLERANCE = 64 * torch.finfo(torch.float64).eps  # relative; measured: 2 eps
HALF_TOLERANCE = 4  # of the narrow type's epsilon, root mean square; measured: 0.9
S, E = 4, 6


def draw(b, n, m):
    return torch.randn(b, n, S), torch.randn(b, m, S), torch.randn(b, m, E), torch.full((b,), m)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (5, 1), (7, 12)])
def test_it_is_the_oracles(n, m):
    q, k, v, valid = draw(2, n, m)
    expected = torch.stack([oracle.cross_attention(*row) for row in zip(q, k, v, strict=True)])
    assert error(ops.cross_attention(q, k, v, valid), expected) <= TOLERANCE


@pytest.mark.parametrize("padding", [1, 4, 50])
def test_padding_of_the_source_has_no_weight_and_is_not_counted(padding):
    q, k, v, valid = draw(2, 3, 5)
    expected = ops.cross_attention(q, k, v, valid)
    longer = torch.cat((1e3 * torch.randn(2, padding, S), k), dim=1)
    zeros = torch.cat((torch.zeros(2, padding, E), v), dim=1)
    assert error(ops.cross_attention(q, longer, zeros, valid), expected) <= TOLERANCE


def test_a_source_without_tokens_gives_zeros():
    q, k, v, _ = draw(2, 3, 5)
    out = ops.cross_attention(q, k, torch.zeros_like(v), torch.tensor([0, 0]))
    assert torch.equal(out, torch.zeros(2, 3, E))


def test_gradients_pass_gradcheck():
    *inputs, valid = draw(2, 3, 5)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.cross_attention(q, k, v, valid), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [7, 3000])
def test_half_precision_neither_overflows_nor_drifts(dtype, m):
    """These scores reach 400, whose squares float16 cannot hold."""
    q, k, v, valid = draw(2, 5, m)
    q, k, v = (x.to(dtype) for x in (16 * q, 16 * k, 0.01 * v))
    assert (q.double() @ k.double().transpose(1, 2) / math.sqrt(S)).max() > 256
    expected = ops.cross_attention(q.double(), k.double(), v.double(), valid)
    ours = ops.cross_attention(q, k, v, valid)
    assert ours.dtype == dtype
    off = (ours.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert off <= HALF_TOLERANCE * torch.finfo(dtype).eps


def test_autocast_does_not_narrow_the_scores():
    q, k, v, valid = (x.float() if x.is_floating_point() else x for x in draw(2, 5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.cross_attention(q, k, v, valid)
    assert torch.equal(inside, ops.cross_attention(q, k, v, valid))
