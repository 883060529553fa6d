"""Proves that ``--optimizer fused_adam`` is Adam, by fairseq's own, through fairseq's own trainer."""

import copy

import pytest
import torch
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin

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


@pytest.mark.parametrize("flat", [False, True])
def test_weights_of_16_bits_and_their_copies_are_fairseqs_to_the_bit(flat, monkeypatch):
    def updated(healed):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((5, 3), (7,), (2, 2, 2))]
        weights[1].requires_grad_(flat)
        optimizer = _FP16OptimizerMixin()
        optimizer.fp16_params = weights
        wide = [torch.nn.Parameter(p.data.float()) for p in weights]
        if flat:
            wide = {None: torch.nn.Parameter(torch.cat([p.data.flatten() for p in wide]))}
        optimizer.fp32_params = wide
        for copied in wide.values() if flat else wide:
            copied.grad = torch.full_like(copied, 7.0)
        for p in weights:
            p.grad = torch.randn(p.shape).bfloat16() if p.requires_grad else None
        optimizer._needs_sync, seen = True, []
        for name in ("_sync_fp16_grads_to_fp32", "_sync_fp32_params_to_fp16"):
            sync = getattr(_FP16OptimizerMixin, name)
            (sync if healed else sync.__wrapped__)(optimizer)
            for copied in wide.values() if flat else wide:
                seen.append(copied.grad.clone())
                with torch.no_grad():
                    copied.add_(copied.grad, alpha=0.1)
        assert not optimizer._needs_sync
        blank = _FP16OptimizerMixin.zero_grad
        optimizer.scaler, optimizer._needs_sync = None, True
        (blank if healed else blank.__wrapped__)(optimizer)
        assert not optimizer._needs_sync
        assert all(p.grad is None for p in weights)
        assert optimizer.fp32_params is wide
        seen += [copied.grad for copied in (wide.values() if flat else wide)]
        return [*seen, *(p.data for p in weights)]

    expected = updated(healed=False)
    calls = []
    at_once = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: (calls.append(1), at_once(*lists)))
    found = updated(healed=True)
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
