"""Proves that the loss over the vocabulary is fairseq's, however it is computed."""

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch.nn import functional

from fairseq_flash.models._loss import LazyLogits
from support import tools

B, N, D, V, PAD = 3, 5, 8, 11, 1
#: Relative; measured: 2e-15 in float64.
TOLERANCE = 256 * torch.finfo(torch.float64).eps


def draw():
    features = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    target = torch.randint(2, V, (B, N))
    target[0, 3:] = PAD
    return features, weight, target.view(-1)


def log_probs_of(features, weight):
    return torch.log_softmax(functional.linear(features, weight), dim=-1)


@pytest.mark.parametrize("loss", ["compiled", "chunked"])
def test_the_loss_and_its_gradients_are_fairseqs(loss, monkeypatch):
    if loss == "chunked" and not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    features, weight, target = draw()
    options = dict(ignore_index=PAD, reduction="sum")
    want = functional.nll_loss(log_probs_of(features, weight).view(-1, V), target, **options)
    monkeypatch.setattr(LazyLogits, "computed", lambda lazy: pytest.fail("the logits were made"))
    lazy = LazyLogits(features, weight, loss).normalized()
    found = functional.nll_loss(lazy.view(-1, lazy.size(-1)), target, **options)
    assert type(found) is torch.Tensor
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, (features, weight))),
        (want, *torch.autograd.grad(want, (features, weight))),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_every_other_use_computes_the_tensor_that_it_stands_for():
    features, weight, target = draw()
    want = log_probs_of(features, weight)
    lazy = LazyLogits(features, weight, "compiled").normalized()
    assert (lazy.shape, lazy.dtype, lazy.dim(), len(lazy)) == (want.shape, want.dtype, 3, B)
    for ours, theirs in (
        (lazy * 2, want * 2),
        (-lazy[0, :2], -want[0, :2]),
        (lazy.gather(-1, target.view(B, N, 1)), want.gather(-1, target.view(B, N, 1))),
        (lazy.view(B * N * V), want.view(B * N * V)),
        (torch.logsumexp(lazy, dim=1), torch.logsumexp(want, dim=1)),
        (
            functional.nll_loss(lazy.view(-1, V), target, reduction="none"),
            functional.nll_loss(want.view(-1, V), target, reduction="none"),
        ),
        (LazyLogits(features, weight, "compiled").float(), functional.linear(features, weight).float()),
    ):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, theirs)


def test_label_smoothing_reads_it_as_any_tensor():
    features, weight, target = draw()
    flat = log_probs_of(features, weight).view(-1, V)
    lazy = LazyLogits(features, weight, "compiled").normalized().view(-1, V)
    want = label_smoothed_nll_loss(flat, target, 0.1, ignore_index=PAD)
    found = label_smoothed_nll_loss(lazy, target, 0.1, ignore_index=PAD)
    assert [float(x) for x in found] == [float(x) for x in want]


@pytest.mark.parametrize("loss", ["compiled", "chunked"])
def test_a_training_with_another_loss_has_the_losses_of_the_plain_one(loss, data_bin, tmp_path, monkeypatch):
    if loss == "chunked" and not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    words = ("--arch", "flash_lm_tiny", *tools.SMALL)
    plain = tools.losses(tools.train(data_bin, tmp_path / "plain", *words, updates=6))
    monkeypatch.setattr(LazyLogits, "computed", lambda lazy: pytest.fail("the logits were made"))
    other = tools.losses(tools.train(data_bin, tmp_path / loss, *words, "--vocabulary-loss", loss, updates=6))
    assert len(plain) == len(other) > 0
    for (_, ours), (_, theirs) in zip(other, plain, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=2e-3)


def test_a_loss_without_effect_is_refused_by_name(data_bin, tmp_path):
    words = ("--arch", "flash_lm_tiny", *tools.SMALL, "--adaptive-softmax-cutoff", "8")
    with pytest.raises(ValueError, match="--vocabulary-loss chunked has no effect with --adaptive-softmax"):
        tools.train(data_bin, tmp_path, *words, "--vocabulary-loss", "chunked", updates=1)
