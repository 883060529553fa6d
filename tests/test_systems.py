"""Proves that every architecture has the size of the Transformer of fairseq that it is compared with."""

import pytest
import tools
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from fairseq_flash.models._systems import SIZES, SYSTEMS
from fairseq_flash.models.flash_lm import PRESETS

WORDS = 8000
#: fairseq has no tiny size.
TINY = (
    *("--decoder-layers", "4", "--decoder-embed-dim", "256", "--decoder-input-dim", "256"),
    *("--decoder-output-dim", "256", "--decoder-ffn-embed-dim", "1152", "--decoder-attention-heads", "4"),
)
THEIRS = {
    "": ("transformer_lm",),
    "_tiny": ("transformer_lm", *TINY),
    "_gpt": ("transformer_lm_gpt",),
    "_big": ("transformer_lm_big",),
}


@pytest.fixture(scope="module")
def parameters():
    """Counts the parameters of an architecture, with tied embeddings or not, without memory for them."""
    build = tools.load_script("health").build

    def count(arch, *options, tied):
        shared = ["--share-decoder-input-output-embed"] if tied else []
        with torch.device("meta"):
            model = build(["--arch", arch, *options, *shared], WORDS)
        return sum(parameter.numel() for parameter in model.parameters())

    return count


def test_every_system_of_the_paper_has_every_size():
    systems = {
        *("flash_lm", "flash_quad_lm", "flash_local_lm", "flash_global_lm"),
        *("transformer_plus_lm", "transformer_pp_lm", "mc_transformer_pp_lm"),
    }
    names = {f"{system}{size}" for system in systems for size in ("", "_tiny", "_gpt", "_big")}
    assert set(PRESETS) == {*names, "flash_lm_paper"}
    assert names <= set(ARCH_MODEL_REGISTRY)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_those_of_fairseqs_transformer_within_five_percent(parameters, size, tied):
    theirs = parameters(*THEIRS[size], tied=tied)
    for system in SYSTEMS:
        ours = parameters(f"{system}{size}", tied=tied)
        assert abs(ours / theirs - 1) <= 0.05, f"{system}{size}: {ours} and {theirs}"


def test_the_papers_settings_change_no_size(parameters):
    added = 1  # the factor of the scaled sinusoids
    assert parameters("flash_lm_paper", tied=True) == parameters("flash_lm", tied=True) + added
