"""Proves that the norms are the oracle's, in the dtype of their input."""

import pytest
import torch

from fairseq_flash.modules import NORMS, build_norm
from support import as_oracle, oracle

TOLERANCE = 16 * torch.finfo(torch.float64).eps  # measured: 2 eps


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_is_the_oracles(norm):
    module = build_norm(norm, 6)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = 10 * torch.randn(2, 3, 6)
    kind, parameters = as_oracle.norm(module)
    expected = torch.stack([oracle.NORMS[kind](row, **parameters) for row in x.flatten(0, 1)]).view_as(x)
    assert (module(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("norm", NORMS)
def test_a_large_half_precision_input_does_not_overflow(norm):
    x = torch.full((1, 6), 3e4, dtype=torch.float16)
    x[0, 0] = -3e4
    out = build_norm(norm, 6).half()(x)
    assert out.dtype == torch.float16
    assert torch.isfinite(out).all()
