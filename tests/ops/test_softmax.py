"""Proves that softmax attention is the oracle's, causal or by what is visible, and finite at any score."""

import pytest
import torch

from fairseq_flash import ops
from support import oracle

TOLERANCE = 16 * torch.finfo(torch.float64).eps  # measured: 1.4 eps
B, HEADS, R = 2, 3, 4


def draw(n, m):
    return torch.randn(B, HEADS, n, R), *torch.randn(2, B, HEADS, m, R)


def oracle_of(q, k, v, visible):
    """The average over the keys that each query of one head sees."""
    out = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if visible[i, j]]
        scores = [torch.dot(q[i], k[j]) / R**0.5 for j in seen]
        out.append(oracle._softmax_average(scores, [v[j] for j in seen]))
    return torch.stack(out)


def assert_is_the_oracles(ours, q, k, v, visible):
    visible = visible.expand(B, 1, q.shape[2], k.shape[2])
    for b in range(B):
        for head in range(HEADS):
            want = oracle_of(q[b, head], k[b, head], v[b, head], visible[b, 0])
            assert (ours[b, head] - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("n", [1, 7, 12])
def test_without_a_choice_of_keys_it_is_causal(n):
    q, k, v = draw(n, n)
    assert_is_the_oracles(ops.softmax_attention(q, k, v), q, k, v, torch.ones(n, n).tril().bool())


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (5, 9), (9, 2)])
def test_a_query_sees_the_keys_that_are_visible_and_no_other(n, m):
    q, k, v = draw(n, m)
    visible = torch.rand(B, 1, n, m) < 0.5
    visible[..., 0] = True
    assert_is_the_oracles(ops.softmax_attention(q, k, v, visible), q, k, v, visible)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    inputs = [x.requires_grad_() for x in draw(3, 3)]
    visible = torch.tensor([[True, False, False], [False] * 3, [True] * 3])
    out = ops.softmax_attention(*inputs, visible)
    out.sum().backward()
    assert (out[:, :, 1] == 0).all()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("n", [2, 13, 600])
def test_the_past_is_bit_equal_whatever_the_future(n):
    q, k, v = draw(n, n)
    whole = ops.softmax_attention(q, k, v)
    cut = n // 2
    for x in (q, k, v):
        x[:, :, cut:] = 1e3 * torch.randn(B, HEADS, n - cut, R)
    assert torch.equal(ops.softmax_attention(q, k, v)[:, :, :cut], whole[:, :, :cut])


@pytest.mark.parametrize("visible", [None, torch.tensor([[True, False, True]] * 3)], ids=["causal", "chosen"])
def test_gradients_pass_gradcheck(visible):
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 3, R)]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.softmax_attention(q, k, v, visible), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_half_precision_stays_close_at_scores_that_would_overflow_an_exponential(dtype, magnitude):
    q, k, v = (x.to(dtype) for x in draw(9, 9))
    ours = ops.softmax_attention(magnitude * q, k, v)
    exact = ops.softmax_attention((magnitude * q).double(), k.double(), v.double())
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()  # measured: 0.2 eps


def test_dropout_drops_weights_and_scales_the_rest():
    q, k, v = torch.zeros(1, 1, 2000, R), torch.zeros(1, 1, 2000, R), torch.ones(1, 1, 2000, R)
    visible = torch.eye(2000, dtype=torch.bool)
    dropped = ops.softmax_attention(q, k, v, visible, dropout=0.25)[0, 0, :, 0]
    assert set(dropped.tolist()) == {0.0, 1 / 0.75}
    assert 0.2 < (dropped == 0).double().mean() < 0.3
    assert (ops.softmax_attention(q, k, v, visible) == 1).all()


def test_unequal_lengths_cannot_be_causal():
    q, k, v = draw(2, 3)
    with pytest.raises(ValueError, match="visible=None needs as many queries as keys, got 2 and 3"):
        ops.softmax_attention(q, k, v)
