"""Proves that shifted keys are the definition's: whole, in pieces, and in every second copy alone."""

import pytest
import torch

from fairseq_flash import ops
from support import oracle


def expected(z, before=None):
    """One row (n, s), number by number."""
    s, found = z.shape[1], z.clone()
    for i in range(len(z)):
        earlier = z[i - 1] if i else torch.zeros(s) if before is None else before
        for x in range(s):
            if x % (s // 2) % 2:
                found[i, x] = earlier[x]
    return found


@pytest.mark.parametrize("s", [2, 4, 6, 8, 10])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_second_rotated_pair_is_of_the_token_before(n, s):
    z, before = torch.randn(2, n, s), torch.randn(2, 1, s)
    for row in range(2):
        assert torch.equal(ops.shifted(z)[row], expected(z[row]))
        assert torch.equal(ops.shifted(z, before)[row], expected(z[row], before[row, 0]))


def test_a_pair_that_is_rotated_together_is_shifted_together():
    s, z = 8, torch.ones(1, 1, 8)
    moved = (ops.shifted(z) == 0)[0, 0]
    assert torch.equal(moved[: s // 2], moved[s // 2 :])
    assert moved.sum() == s // 2


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_pieces_give_the_whole_with_the_last_token_of_the_piece_before(cut):
    z = torch.randn(2, 7, 6)
    first, second = z.split([cut, 7 - cut], dim=1)
    pieces = ops.shifted(first), ops.shifted(second, first[:, -1:])
    assert torch.equal(torch.cat(pieces, dim=1), ops.shifted(z))


def test_no_token_gives_none_and_a_narrower_row_keeps_its_dtype():
    assert ops.shifted(torch.randn(2, 0, 4), torch.randn(2, 1, 4)[:, :0]).shape == (2, 0, 4)
    assert ops.shifted(torch.randn(1, 3, 4).bfloat16(), torch.randn(1, 1, 4)).dtype == torch.bfloat16


def test_shifting_passes_gradcheck_also_to_the_token_before():
    z, before = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    assert torch.autograd.gradcheck(ops.shifted, (z, before))
    assert torch.autograd.gradcheck(ops.shifted, (z,))


@pytest.mark.parametrize("h", [2, 4])
def test_every_second_copy_is_of_the_keys(h):
    n, s = 5, 6
    z, keys = torch.randn(2, 2, n, s)
    gamma, beta = torch.randn(2, h, s)
    copies = ops.offset_scale(z, gamma, beta, keys)
    cos, sin = ops.rotary_angles(torch.arange(n), s, torch.float64)
    rotated = ops.rotated_copies(z, gamma, beta, cos, sin, keys)
    for index in range(h):
        base = keys if index % 2 else z
        assert torch.equal(copies[index], base * gamma[index] + beta[index])
        for row in range(2):
            want = torch.stack([oracle.rotary(copies[index, row, i], i) for i in range(n)])
            torch.testing.assert_close(rotated[index, row], want, rtol=0, atol=1e-14)
    assert torch.equal(ops.offset_scale(z, gamma, beta, z), ops.offset_scale(z, gamma, beta))
