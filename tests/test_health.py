"""Proves that the default start keeps every branch and every parameter in the band of the contract."""

import pytest
import tools
import torch

DEPTHS = {"flash_lm": 12, "flash_lm_tiny": 8, "flash_lm_gpt": 24, "flash_lm_big": 24}
TIED = ["--share-decoder-input-output-embed"]
SLOW = ("flash_lm_gpt", "flash_lm_big")


@pytest.fixture(scope="module")
def health():
    return tools.load_script("health")


def measure(health, *options):
    torch.manual_seed(1)
    model = health.build(list(options), 1000)
    return health.measure(model, health.zipf_tokens(1000, 2, 600))


@pytest.mark.parametrize("attention", ["mixed_chunk", "local"])
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.long) if arch in SLOW else arch for arch in DEPTHS]
)
def test_the_default_start_is_healthy(health, arch, attention):
    found = measure(health, "--arch", arch, "--attention", attention, *TIED)
    assert len({place for ratio, place, _ in found if ratio == "branch/residual"}) == DEPTHS[arch]
    assert [m for m in found if not m.healthy] == []


def test_the_papers_start_is_reported_outside_the_band(health):
    options = ["--arch", "flash_lm_tiny", "--scaled-sin", "--init", "paper", "--linear-norm", "chunk"]
    outside = {m.ratio for m in measure(health, *options) if not m.healthy}
    assert {"branch/residual", "linear/quadratic"} <= outside


def test_the_branches_of_a_layer_add_up(health):
    torch.manual_seed(1)
    model = health.build(["--arch", "flash_lm_tiny", "--layers", "1"], 100).double().eval()
    block, x = model.decoder.stack.blocks[0], torch.randn(1, 400, 256, dtype=torch.float64)
    with torch.no_grad():
        parts = [health.only(block, branch)(x)[0] - x for branch in ("local", "global")]
        whole = block(x)[0] - x
    assert (whole - sum(parts)).abs().max() <= 1e-12 * whole.abs().max()
