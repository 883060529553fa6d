"""Proves that what is done once around an update is what fairseq does for each weight, to the bit."""

import pytest
import torch
from fairseq import utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim.fp16_optimizer import FP16Optimizer
from omegaconf import OmegaConf

from fairseq_flash.optim import FusedAdamConfig


def optimizer_of(weights, dtype, flat):
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common.bf16, cfg.common.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    cfg.common.fp16_no_flatten_grads = not flat
    cfg.optimizer = OmegaConf.structured(FusedAdamConfig(lr=[0.1]))
    cfg.optimizer._name = "fused_adam"
    cfg.optimization.lr = [0.1]
    return FP16Optimizer.build_optimizer(cfg, weights)


@pytest.mark.parametrize(
    ("dtype", "flat"), [(torch.bfloat16, False), (torch.float16, False), (torch.float16, True)], ids=str
)
def test_gradients_are_widened_and_weights_narrowed(dtype, flat):
    if flat and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    device = "cuda" if flat else "cpu"
    sizes = ((3, 2), (5,), (1,))
    weights = [torch.nn.Parameter(torch.randn(size, dtype=dtype, device=device)) for size in sizes]
    start = [weight.detach().float() for weight in weights]
    optimizer = optimizer_of(weights, dtype, flat)
    grads = [torch.randn_like(weight) for weight in weights]
    for _ in range(2):
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer._needs_sync = True
        optimizer._sync_fp16_grads_to_fp32()
        wide = optimizer.fp32_params
        found = [p.grad for p in (wide.values() if flat else wide)]
        assert torch.equal(
            torch.cat([x.flatten() for x in found]), torch.cat([x.flatten() for x in grads]).float()
        )
        optimizer.zero_grad()
        assert not any(x.any() for x in found)
        assert all(weight.grad is None for weight in weights)
    with torch.no_grad():
        for p in wide.values() if flat else wide:
            p.add_(1 / 3)
    optimizer._sync_fp32_params_to_fp16()
    for weight, before in zip(weights, start, strict=True):
        assert torch.equal(weight, (before + 1 / 3).to(dtype))


def test_seeds_draw_what_torch_draws_and_give_the_state_back():
    torch.manual_seed(3)
    expected, state = torch.rand(4), torch.get_rng_state()
    with utils.set_torch_seed(3):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), state)
