"""Proves that a pooled row is the mean of its real tokens under the formula's weights."""

import math

import pytest
import torch

from fairseq_flash.modules import Pooling

FEATURES = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
#: No padding, leading, trailing, and nothing else.
PADDING = torch.tensor([[0] * 7, [1] * 3 + [0] * 4, [0] * 1 + [1] * 6, [1] * 7]).bool()


def pooling(kind):
    module = Pooling(kind, 6).double()
    if kind == "attention":
        torch.nn.init.normal_(module.query, std=2, generator=torch.Generator().manual_seed(2))
    return module


@pytest.mark.parametrize("kind", ["first", "mean", "attention"])
def test_a_row_is_the_weighted_mean_of_its_real_tokens(kind):
    module = pooling(kind)
    out = module(FEATURES, PADDING)
    assert out.shape == (4, 1, 6)
    for row, padding, found in zip(FEATURES[:3], PADDING, out[:, 0], strict=False):
        real = [x.tolist() for x, gone in zip(row, padding.tolist(), strict=True) if not gone]
        weights = [1.0, *[0.0] * (len(real) - 1)] if kind == "first" else [1.0] * len(real)
        if kind == "attention":
            query = module.query.tolist()
            weights = [math.exp(sum(a * b for a, b in zip(x, query, strict=True)) / 6**0.5) for x in real]
        for place in range(6):
            mean = sum(w * x[place] for w, x in zip(weights, real, strict=True)) / sum(weights)
            assert found[place].item() == pytest.approx(mean, rel=1e-12)
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", ["first", "mean", "attention"])
def test_padding_is_inert_and_half_precision_is_narrowed_once(kind):
    module, other = pooling(kind), FEATURES.masked_fill(PADDING.unsqueeze(-1), 1e9)
    assert torch.equal(module(FEATURES, PADDING)[:3], module(other, PADDING)[:3])
    half = module.half()(FEATURES.half(), PADDING)
    assert half.dtype == torch.float16
    exact = module.double()(FEATURES.half().double(), PADDING)
    assert (half.double() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


def test_attention_begins_as_the_mean_and_learns():
    module = Pooling("attention", 6).double()
    torch.testing.assert_close(module(FEATURES, PADDING), Pooling("mean", 6)(FEATURES, PADDING))
    torch.nn.init.normal_(module.query)
    assert torch.autograd.gradcheck(lambda x: module(x, PADDING[:3]), FEATURES[:3].clone().requires_grad_())
    module(FEATURES, PADDING).square().sum().backward()
    assert module.query.grad.abs().min() > 0


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"pooling.*last.*first, mean, attention"):
        Pooling("last", 6)
