"""Proves the unit that reads a source: the definition's numbers, whatever lies in the source's padding."""

import pytest
import torch

from fairseq_flash.modules import GatedCrossAttention
from support import as_oracle, oracle
from support.pieces import error

TOLERANCE = 256 * torch.finfo(torch.float64).eps  # relative; measured: 8 eps
D, M, N = 8, 9, 5


def build(**options):
    layer = GatedCrossAttention(D, attention_dim=6, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer


@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "rmsnorm"])
def test_it_is_the_oracle_of_each_row_whatever_lies_in_the_padding(norm):
    layer = build(norm=norm)
    x, source = torch.randn(3, N, D), torch.randn(3, M, D)
    mask = torch.zeros(3, M, dtype=torch.bool)
    mask[0, :4] = mask[1, 6:] = mask[1, 0] = True
    function = as_oracle.cross_unit(layer)
    expected = [function(x[row], oracle.valid_rows(source[row], mask[row])) for row in range(3)]
    for content in (0.0, 1e30, float("nan")):
        memory = layer.read(source.masked_fill(mask.unsqueeze(-1), content), mask)
        assert error(layer(x, memory), torch.stack(expected)) <= TOLERANCE


def test_gradients_are_the_oracles():
    layer = build()
    x, source = torch.randn(1, N, D, requires_grad=True), torch.randn(1, M, D, requires_grad=True)
    weights = torch.randn(N, D)
    leaves = {"x": x, "source": source, **dict(layer.named_parameters())}
    ours = torch.autograd.grad((layer(x, layer.read(source))[0] * weights).sum(), list(leaves.values()))
    expected = (as_oracle.cross_unit(layer)(x[0], source[0]) * weights).sum()
    for name, a, b in zip(leaves, ours, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        assert error(a, b) <= 8 * TOLERANCE, name


def test_a_source_of_padding_gives_finite_numbers_and_gradients():
    layer = build()
    x, source = torch.randn(2, N, D), torch.full((2, M, D), torch.nan)
    source[0] = torch.randn(M, D)
    source.requires_grad_()
    mask = torch.tensor([[False] * M, [True] * M])
    out = layer(x, layer.read(source, mask))
    out.square().sum().backward()
    assert torch.equal(out[1], x[1] + layer.out.bias)
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert (source.grad[1] == 0).all()


def test_each_token_and_each_row_stands_alone():
    layer = build()
    x, source = torch.randn(2, N, D), torch.randn(2, M, D)
    whole = layer(x, layer.read(source))
    for row in range(2):
        memory = layer.read(source[row : row + 1])
        for token in range(N):
            one = layer(x[row : row + 1, token : token + 1], memory)
            assert error(one, whole[row : row + 1, token : token + 1]) <= TOLERANCE


def test_gammas_start_at_one_so_that_scores_are_not_dead():
    for init in ("fan_in", "paper"):
        layer = GatedCrossAttention(D, attention_dim=6, init=init)
        for scale in (layer.q_scale, layer.k_scale):
            assert (scale.gamma == 1).all()
            assert (scale.beta == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_dim=0), "attention_dim=0 is not allowed; allowed: 1 or more"),
        (dict(expansion_factor=0), "expansion_factor=0 is not allowed"),
        (dict(norm="batchnorm"), "norm='batchnorm' is unknown; allowed: layernorm"),
        (dict(init="zeros"), "init='zeros' is unknown; allowed: fan_in, paper"),
        (dict(dropout=1.0), "dropout=1.0 is not allowed; allowed: 0 to below 1"),
        (dict(backend="cuda"), "backend='cuda' is unknown; allowed: auto, .*reference"),
    ],
)
def test_a_bad_argument_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GatedCrossAttention(**(dict(embed_dim=D) | options))
