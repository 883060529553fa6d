"""Proves that every architecture starts with every branch and every parameter in the band of the contract."""

import re

import pytest
import torch

from fairseq_flash.models import flash_lm, flash_masked_lm, flash_seq2seq
from fairseq_flash.modules import GatedAttentionUnit, GatedCrossAttention, TransformerBlock
from support import tools

TIED = ["--share-decoder-input-output-embed"]


@pytest.fixture(scope="module")
def health():
    return tools.load_script("health")


def measure(health, *options):
    torch.manual_seed(1)
    model = health.build(list(options), 1000)
    return health.measure(model, health.zipf_tokens(1000, 2, 1024))


def held():
    """Every architecture but the paper's own start; the larger ones take a while."""
    for arch in (*flash_lm.PRESETS, *flash_masked_lm.PRESETS, *flash_seq2seq.PRESETS):
        if arch != "flash_lm_paper":
            marks = [] if arch.endswith("_tiny") else [pytest.mark.long]
            yield pytest.param(arch, marks=marks)


@pytest.mark.parametrize("arch", held())
def test_the_default_start_is_healthy(health, arch):
    found = measure(health, "--arch", arch, *([] if arch in flash_masked_lm.PRESETS else TIED))
    kinds = (GatedAttentionUnit, GatedCrossAttention, TransformerBlock)
    layers = [layer for layer in health.build(["--arch", arch], 100).modules() if isinstance(layer, kinds)]
    assert len([m for m in found if m.ratio == "branch/residual"]) >= len(layers)
    assert ("linear/quadratic" in {m.ratio for m in found}) == (layers[0].attention == "mixed_chunk")
    assert [m for m in found if not m.healthy] == []


def test_the_papers_start_is_reported_outside_the_band(health):
    options = ["--arch", "flash_lm_paper", "--embed-dim", "256", "--layers", "8", "--chunk-size", "128"]
    outside = {m.ratio for m in measure(health, *options) if not m.healthy}
    assert {"branch/residual", "linear/quadratic"} <= outside


@pytest.mark.parametrize("arch", ["flash_lm_tiny", "mc_transformer_pp_lm_tiny"])
def test_the_branches_of_a_layer_add_up(health, arch):
    torch.manual_seed(1)
    model = health.build(["--arch", arch, "--layers", "1"], 100).double().eval()
    block, x = model.decoder.stack.blocks[0], torch.randn(1, 400, 256, dtype=torch.float64)
    with torch.no_grad():
        parts = [health.attended(health.only(block, branch), x) for branch in ("quad", "lin")]
        whole = health.attended(block, x)
    assert all(part.abs().max() > 0 for part in parts)
    assert (whole - sum(parts)).abs().max() <= 1e-12 * whole.abs().max()


def test_the_command_prints_every_ratio_and_warns_outside_the_band(health, monkeypatch, capsys):
    small = ["--embed-dim", "32", "--layers", "2", "--attention-dim", "16", "--chunk-size", "8"]
    own = ["--vocabulary", "100", "--length", "40"]
    for arch, warns in (("mc_transformer_pp_lm_tiny", False), ("flash_lm_paper", True)):
        width = ["--ffn-embed-dim", "48"] if "transformer" in arch else []
        monkeypatch.setattr(health.sys, "argv", ["health.py", "--arch", arch, *small, *width, *own])
        health.main()
        printed, summary = capsys.readouterr()
        assert ("WARNING: outside 0.01 to 1" in printed) == warns
        assert {line.split()[0] for line in printed.splitlines()} == set(health.BANDS)
        assert all(re.search(r" (in|outside) [\d.e+-]+ to [\d.e+-]+$", line) for line in printed.splitlines())
        assert f" of {len(printed.splitlines())} in the band" in summary


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--layers", "1"], "--arch is missing; allowed: "),
        (["--arch", "flash_lm_tiny", "--length", "0"], "--length 0 is not allowed; allowed: 1 or more"),
        (
            ["--arch", "flash_lm_tiny", "--vocabulary", "3"],
            "--vocabulary 3 is not allowed; allowed: 5 or more",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(health, monkeypatch, capsys, words, told):
    monkeypatch.setattr(health.sys, "argv", ["health.py", *words])
    with pytest.raises(SystemExit):
        health.main()
    assert told in capsys.readouterr().err
