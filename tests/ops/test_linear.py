"""Proves that sums over earlier chunks are the definition's, without a trace of the chunk itself."""

import pytest
import torch

from fairseq_flash import ops
from support import oracle

TOLERANCE = 64 * torch.finfo(torch.float64).eps  # relative; measured: 6 eps


def recurrence(kv, initial, kept):
    """The sums (b, g + 1, s, e) one after the other; ``kept`` of each column, (e,)."""
    sums = [initial]
    for g in range(kv.shape[1]):
        sums.append(kept * sums[-1] + kv[:, g])
    return torch.stack(sums, dim=1)


def fading(e):
    """What of each column is kept, (e,), by the oracle's half-lives."""
    return 0.5 ** (1 / oracle.fading_half_lives(e))


@pytest.mark.parametrize("e", [1, 2, 3, 4, 6, 16, 24, 32])
def test_what_is_kept_is_the_definitions(e):
    kept = ops.kept_of_chunks("fading", e, torch.device("cpu"))
    found = kept.repeat_interleave(e // len(kept))
    torch.testing.assert_close(found, fading(e), rtol=0, atol=TOLERANCE)
    assert (found < 1).all()
    assert (found > 0).all()
    assert ops.kept_of_chunks("mean", e, torch.device("cpu")) is None


#: Sums of one block of 64 and of several, with a rest and without, and of blocks of blocks.
@pytest.mark.parametrize("g", [1, 2, 63, 64, 65, 127, 128, 129, 200, 64 * 64 + 70])
def test_a_fading_sum_is_its_recurrence_and_so_are_its_gradients(g):
    b, s, e = (1, 1, 4) if g > 200 else (2, 3, 8)
    kv, initial = torch.randn(b, g - 1, s, e), torch.randn(b, s, e)
    kept, leaves = ops.kept_of_chunks("fading", e, kv.device), [kv, initial][g == 1 :]
    for leaf in leaves:
        leaf.requires_grad_()
    ours, expected = ops.exclusive_sum(kv, initial, kept), recurrence(kv, initial, fading(e))
    assert ours.shape == (b, g, s, e)
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()
    weights = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()


def test_in_float32_a_fading_sum_is_no_worse_than_its_recurrence():
    kv, initial = torch.randn(1, 300, 4, 16), torch.randn(1, 4, 16)
    kept, exact = ops.kept_of_chunks("fading", 16, kv.device), recurrence(kv, initial, fading(16))
    ours = ops.exclusive_sum(kv.float(), initial.float(), kept)
    assert ours.dtype == torch.float32
    plain = recurrence(kv.float(), initial.float(), fading(16).float())
    error, theirs = ((found.double() - exact).norm() for found in (ours, plain))
    assert error <= 2 * theirs


@pytest.mark.parametrize("norm", ["mean", "fading"])
def test_a_trace_is_for_rows_of_any_number_of_chunks(norm):
    kept = ops.kept_of_chunks(norm, 4, torch.device("cpu"))
    rows = [(torch.randn(2, g, 3, 4), torch.randn(2, 3, 4)) for g in (2, 70)]
    traced = torch.jit.trace(lambda kv, initial: ops.exclusive_sum(kv, initial, kept), rows[0])
    for row in rows:
        torch.testing.assert_close(traced(*row), ops.exclusive_sum(*row, kept), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["mean", "fading"])
def test_the_exclusive_sum_is_a_shift_and_leaks_nothing(norm):
    kept = ops.kept_of_chunks(norm, 4, torch.device("cpu"))
    kv = torch.randn(2, 6, 3, 4).float() * torch.logspace(0, 6, 6, dtype=torch.float32).view(1, 6, 1, 1)
    initial = torch.randn(2, 3, 4).float()
    plain = ops.exclusive_sum(kv, initial, kept)
    for g in range(6):
        changed = kv.clone()
        changed[:, g:] += 1e6
        assert torch.equal(ops.exclusive_sum(changed, initial, kept)[:, : g + 1], plain[:, : g + 1])
    assert torch.equal(plain[:, 0], initial)
    if norm == "mean":
        assert torch.allclose(plain[:, -1], initial + kv.sum(1))


@pytest.mark.parametrize("norm", ["chunk", "mean"])
def test_the_denominator_is_never_zero(norm):
    count = torch.tensor([[0, 4, 8]])
    expected = {"chunk": [[[4.0]] * 3], "mean": [[[1.0], [4.0], [8.0]]]}[norm]
    assert ops.linear_denominator(norm, 4, count, 6, torch.float64).tolist() == expected


@pytest.mark.parametrize("e", [1, 2, 6, 32])
def test_the_denominator_of_a_fading_mean_is_the_sum_of_its_weights(e):
    chunks = torch.tensor([0, 1, 2, 77, 5000])
    found = ops.linear_denominator("fading", 4, 4 * chunks, e, torch.float64)
    weights = [sum(4 * fading(e) ** p for p in range(g)) + torch.zeros(e) for g in chunks]
    expected = torch.stack(weights).clamp(min=1)
    assert found.shape == (5, e)
    assert (found / expected - 1).abs().max() <= 1e-12  # plain sums of 5000 numbers are rounded


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="linear_norm='sum' is unknown; allowed: chunk, mean, fading"):
        ops.linear_denominator("sum", 4, torch.tensor([0]), 6, torch.float64)


def test_a_large_sum_is_divided_before_it_is_narrowed():
    kv_sum = torch.full((1, 1, 2, 2), 1e5, dtype=torch.float32)  # beyond float16
    q = torch.ones(1, 1, 1, 2, dtype=torch.float16)
    out = ops.linear_attention(q, kv_sum, torch.full((1, 1), 100.0))
    assert out.flatten().tolist() == [2000.0, 2000.0]
