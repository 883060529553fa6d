"""Proves that every architecture has the size of the Transformer of fairseq that it is compared with."""

import argparse

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY

from fairseq_flash.models._presets import SIZES, SYSTEMS
from fairseq_flash.models.flash_lm import PRESETS, FlashLanguageModel, FlashLanguageModelConfig
from support import tools

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
def task():
    """As much of a task as a model is built from."""
    dictionary = Dictionary()
    for word in range(WORDS - len(dictionary)):
        dictionary.add_symbol(str(word))
    return argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def ours(arch, task, tied):
    """Parameters of an architecture, without memory for them."""
    config = FlashLanguageModelConfig(**PRESETS[arch], share_decoder_input_output_embed=tied)
    with torch.device("meta"):
        return size_of(FlashLanguageModel.build_model(config, task))


def theirs(tied, *arch_and_options):
    """Parameters of fairseq's own, by its command line."""
    shared = ["--share-decoder-input-output-embed"] if tied else []
    with torch.device("meta"):
        return size_of(tools.load_script("health").build(["--arch", *arch_and_options, *shared], WORDS))


def test_every_system_of_the_paper_has_every_size():
    systems = {
        *("flash_lm", "flash2_lm", "flash_quad_lm", "flash_local_lm", "flash_global_lm"),
        *("transformer_plus_lm", "transformer_pp_lm", "mc_transformer_pp_lm"),
    }
    names = {f"{system}{size}" for system in systems for size in ("", "_tiny", "_gpt", "_big")}
    assert set(PRESETS) == {*names, "flash_lm_paper"}
    assert names <= set(ARCH_MODEL_REGISTRY)


@pytest.mark.parametrize(("size", "tied"), [*((size, True) for size in SIZES), ("", False)])
def test_parameters_are_those_of_fairseqs_transformer_within_five_percent(task, size, tied):
    expected = theirs(tied, *THEIRS[size])
    for system in SYSTEMS:
        found = ours(f"{system}{size}", task, tied)
        assert abs(found / expected - 1) <= 0.05, f"{system}{size}: {found} and {expected}"


@pytest.mark.parametrize("size", SIZES)
def test_flash2_has_the_parameters_of_flash_and_no_others(task, size):
    assert ours(f"flash2_lm{size}", task, True) == ours(f"flash_lm{size}", task, True)


def test_the_papers_settings_change_the_size_by_their_positions_alone(task):
    scaled_sin, tables, rotary_biases = 1, 12 * (2 * 256 - 1), 12 * 2 * 128
    found = ours("flash_lm_paper", task, True)
    assert found == ours("flash_lm", task, True) + scaled_sin + tables - rotary_biases
