"""Proves that ``--optimizer fused_adam`` is Adam, by fairseq's own, through fairseq's own trainer."""

import copy

import pytest
import torch
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig

from fairseq_flash.optim import FusedAdam, FusedAdamConfig
from support import tools

RATE, EPS = 3e-3, 1e-12


def build(kind, cfg, parameters, betas="(0.9, 0.98)"):
    cfg.lr, cfg.adam_betas, cfg.adam_eps, cfg.weight_decay = [RATE], betas, EPS, 0.1
    return kind(cfg, parameters)


def draw():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (7,), ())]


def test_updates_and_clipping_are_fairseqs():
    ours = draw()
    theirs = copy.deepcopy(ours)
    fused = build(FusedAdam, FusedAdamConfig(), ours)
    plain = build(FairseqAdam, FairseqAdamConfig(tpu=False), theirs)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * (step + 1)
            b.grad = a.grad.clone()
        if step == 2:
            ours[1].grad = theirs[1].grad = None
        norms = [float(x.clip_grad_norm(2.5)) for x in (fused, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        for optimizer in (fused, plain):
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)  # measured: 2e-7


def test_it_goes_on_where_a_checkpoint_ends(data_bin, tmp_path):
    words = (*tools.TINY, "--optimizer", "fused_adam", "--clip-norm", "0.5")
    whole = tools.losses(tools.train(data_bin, tmp_path / "whole", *words, updates=6, recipe=tools.RECIPE))
    tools.train(data_bin, tmp_path / "parts", *words, updates=3, recipe=tools.RECIPE)
    rest = tools.losses(tools.train(data_bin, tmp_path / "parts", *words, updates=6, recipe=tools.RECIPE))
    assert rest == whole[-len(rest) :]
    assert float(whole[-1][1]) < float(whole[0][1])


@pytest.mark.parametrize("betas", ["(0.9,)", "0.9", "(0.9, 1.5)", "__import__('os').getcwd()", "(0.9, 'x')"])
def test_betas_that_are_none_are_refused_by_name(betas):
    with pytest.raises(ValueError, match=r"--adam-betas .*allowed: two numbers"):
        build(FusedAdam, FusedAdamConfig(), draw(), betas)
