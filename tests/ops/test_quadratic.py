"""Proves that quadratic attention is the paper's, causal and bidirectional, whole and with its cache."""

import pytest
import torch

from fairseq_flash import ops
from support import oracle

TOLERANCE = 64 * torch.finfo(torch.float64).eps  # measured: 6 eps


@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_oracles(n, causal):
    q, k = torch.randn(2, 2, 1, n, 4)
    v, bias = torch.randn(2, 1, n, 6), torch.randn(n, n)
    denominators = torch.tensor([3.0, 5.0])
    ours = ops.quadratic_attention(q, k, v, bias, causal=causal, denominator=denominators)
    for row, denominator in enumerate(denominators):
        want = oracle.quadratic_attention(
            q[row, 0], k[row, 0], v[row, 0], lambda i, j: bias[i, j], causal, denominator
        )
        assert (ours[row, 0] - want).abs().max() <= TOLERANCE * want.abs().max()


def test_a_number_and_a_number_a_row_divide_alike():
    q, k = torch.randn(2, 2, 3, 5, 4)
    v, bias = torch.randn(2, 3, 5, 6), torch.randn(5, 5)
    one = ops.quadratic_attention(q, k, v, bias, causal=True, denominator=7.0)
    each = ops.quadratic_attention(q, k, v, bias, causal=True, denominator=torch.full((2,), 7))
    assert (one - each).abs().max() <= TOLERANCE * one.abs().max()


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_pass_gradcheck(causal):
    inputs = [torch.randn(shape).requires_grad_() for shape in [(1, 2, 5, 4)] * 2 + [(1, 2, 5, 3), (5, 5)]]
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: ops.quadratic_attention(q, k, v, bias, causal=causal, denominator=5.0), inputs
    )


def test_unequal_lengths_cannot_be_causal():
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 6)
    with pytest.raises(ValueError, match="as many queries as keys, got 2 and 3"):
        ops.quadratic_attention(q, k, v, torch.zeros(2, 3), causal=True, denominator=1.0)


def test_padding_enters_the_cache_without_weight():
    state = ops.KeyValueCache.empty(torch.zeros(2, 1), 4, 6)
    k, v = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    state = state.after(k, v, torch.arange(3).expand(2, 3), torch.tensor([3, 1]))
    assert state.position.tolist() == [3, 1]
    assert (state.v[1, 1:] == 0).all()
    assert torch.equal(state.v[0], v[0])
