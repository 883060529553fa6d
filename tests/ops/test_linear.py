"""Proves that the sum over earlier chunks never holds a trace of the chunk itself."""

import pytest
import torch

from fairseq_flash import ops


def test_the_exclusive_sum_is_a_shift_and_leaks_nothing():
    kv = torch.randn(2, 6, 3, 4).float() * torch.logspace(0, 6, 6, dtype=torch.float32).view(1, 6, 1, 1)
    initial = torch.randn(2, 3, 4).float()
    plain = ops.exclusive_sum(kv, initial)
    for g in range(6):
        changed = kv.clone()
        changed[:, g:] += 1e6
        assert torch.equal(ops.exclusive_sum(changed, initial)[:, : g + 1], plain[:, : g + 1])
    assert torch.equal(plain[:, 0], initial)
    assert torch.allclose(plain[:, -1], initial + kv.sum(1))


@pytest.mark.parametrize("norm", ["chunk", "mean"])
def test_the_denominator_is_never_zero(norm):
    count = torch.tensor([[0, 4, 8]])
    expected = {"chunk": [[4.0, 4.0, 4.0]], "mean": [[1.0, 4.0, 8.0]]}[norm]
    assert ops.linear_denominator(norm, 4, count, torch.float64).tolist() == expected


def test_a_large_sum_is_divided_before_it_is_narrowed():
    kv_sum = torch.full((1, 1, 2, 2), 1e5, dtype=torch.float32)  # beyond float16
    q = torch.ones(1, 1, 1, 2, dtype=torch.float16)
    out = ops.linear_attention(q, kv_sum, torch.full((1, 1), 100.0))
    assert out.flatten().tolist() == [2000.0, 2000.0]
