"""Proves that a command line of fairseq-train trains, or is refused by name before training begins."""

import dataclasses
import math
import re

import pytest
from hydra.errors import ConfigCompositionException

from fairseq_flash.models._loss import LOSSES
from fairseq_flash.models._options import FlashLanguageModelConfig, FlashMaskedLMConfig, FlashSeq2SeqConfig
from fairseq_flash.modules import ATTENTIONS, BACKENDS, INITS, LINEAR_NORMS, NORMS, POOLINGS, RELATIVE_BIASES
from support import tools
from support.fuzz import fuzzed, try_out

SIZES = ("--attention-dim", "4", "--chunk-size", "8", "--embed-dim", "8")
ONE_LAYER = ("--layers", "1")
#: By model: its options, the words that it trains with, and words that place its small data.
MODELS = {
    "flash_lm": (FlashLanguageModelConfig, (*tools.RECIPE, *ONE_LAYER)),
    "flash_masked_lm": (
        FlashMaskedLMConfig,
        (
            *(*tools.QUICK, *ONE_LAYER, "--task", "masked_lm", "--criterion", "masked_lm"),
            *("--tokens-per-sample", "32"),
        ),
    ),
    "flash_seq2seq": (
        FlashSeq2SeqConfig,
        (
            *(*tools.QUICK, "--task", "translation", "--source-lang", "here", "--target-lang", "there"),
            *("--encoder-layers", "1", "--decoder-layers", "1"),
        ),
    ),
}
NO_NUMBERS = ["", "x", "1,5", "None", "0x10", "--"]
SIZE = (["1", "2", "5"], [*NO_NUMBERS, "0", "-1", "8.0", "nan"])
RATE = (["0", "0.1", "0.99"], [*NO_NUMBERS, "1", "-0.1", "1.5", "nan", "inf", "-inf"])
FACTOR = (["1", "2", "4.0"], [*NO_NUMBERS, "0", "-1", "0.5", "nan", "inf"])
CUTOFFS = (
    ["20", "20,50", "[20, 50]"],
    ["", "x", "0", "-1,5", "50,20", "20,20", "20,100000", "1.5", "nan", "20,"],
)
SWITCH = ([None], ["maybe"])


def choice(*allowed):
    return [*allowed], ["", "x", allowed[0].upper() + "_", "None", "0"]


#: For each option the values that are allowed somewhere, and those that never are. A switch has no value.
OPTIONS = {
    "embed_dim": (["2", "8", "12"], [*SIZE[1], "3", "7"]),
    "expansion_factor": SIZE,
    "attention_dim": (["2", "4", "8"], [*SIZE[1], "3", "7"]),
    "attention": choice(*ATTENTIONS),
    "chunk_size": (["1", "5", "8", "64"], SIZE[1]),
    "linear_norm": choice(*LINEAR_NORMS),
    "shift_keys": SWITCH,
    "norm": choice(*NORMS),
    "relative_bias": choice(*RELATIVE_BIASES),
    "init": choice(*INITS),
    "scaled_sin": SWITCH,
    "n_ref": (["32", "300"], SIZE[1]),
    "dropout": RATE,
    "checkpoint_activations": SWITCH,
    "offload_activations": SWITCH,
    "change_trained_options": SWITCH,
    "backend": choice(*BACKENDS[:1], "reference"),
    "block": choice("gau", "transformer"),
    "layers": (["1", "2"], SIZE[1]),
    "encoder_layers": (["1", "2"], SIZE[1]),
    "decoder_layers": (["1", "2"], SIZE[1]),
    "ffn_embed_dim": (["1", "16"], SIZE[1]),
    "glu": SWITCH,
    "attention_dropout": RATE,
    "diagnostics_interval": (["0", "1", "2"], [*NO_NUMBERS, "-1", "1.5"]),
    "share_decoder_input_output_embed": SWITCH,
    "share_all_embeddings": SWITCH,
    "adaptive_input": SWITCH,
    "adaptive_input_factor": FACTOR,
    "adaptive_input_cutoff": CUTOFFS,
    "adaptive_softmax_cutoff": CUTOFFS,
    "adaptive_softmax_dropout": RATE,
    "adaptive_softmax_factor": FACTOR,
    "tie_adaptive_weights": SWITCH,
    "tie_adaptive_proj": SWITCH,
    "vocabulary_loss": (["plain", "chunked"], choice(*LOSSES)[1]),
    "no_graph": SWITCH,
    "untie_weights_roberta": SWITCH,
    "pooler_dropout": RATE,
    "pooling": choice(*POOLINGS),
    "load_checkpoint_heads": SWITCH,
    "max_positions": (["64", "512"], SIZE[1]),
}
#: Compiles for a minute; tests of its own.
ELSEWHERE = {"compile"}
#: What may be refused beside other values, though allowed beside some.
COMBINED = {
    *("block", "attention", "n_ref", "relative_bias", "ffn_embed_dim", "glu", "attention_dropout"),
    *("linear_norm", "shift_keys"),
    *(
        "expansion_factor",
        "attention_dim",
        "embed_dim",
        "vocabulary_loss",
        "share_decoder_input_output_embed",
    ),
    *(name for name in OPTIONS if "adaptive" in name),
}


def options_of(config):
    return [field.name for field in dataclasses.fields(config) if field.name != "_name"]


@pytest.mark.parametrize("model", MODELS)
def test_every_option_is_tried(model):
    assert set(options_of(MODELS[model][0])) - ELSEWHERE <= OPTIONS.keys()


@pytest.fixture(scope="module")
def data(data_bin, tmp_path_factory):
    """By model, where its data is: text, and a translation backwards."""
    folder = tmp_path_factory.mktemp("parallel")
    lines = tools.real_lines()
    texts = {"train": lines[:60], "valid": lines[60:66]}
    backwards = {name: [" ".join(line.split()[::-1]) for line in text] for name, text in texts.items()}
    tools.write_texts(folder, **{f"{name}.here": text for name, text in texts.items()})
    tools.write_texts(folder, **{f"{name}.there": text for name, text in backwards.items()})
    words = ("--source-lang", "here", "--target-lang", "there", "--joined-dictionary", "--nwordssrc", "200")
    places = ("--trainpref", folder / "train", "--validpref", folder / "valid", "--destdir", folder / "bin")
    tools.call("preprocess", *words, *places, "--workers", "1")
    return {"flash_lm": data_bin, "flash_masked_lm": data_bin, "flash_seq2seq": folder / "bin"}


def words_of(name, value):
    option = f"--{name.replace('_', '-')}"
    return option if value is None else f"{option}={value}"


def outcome(capsys, *words):
    """What a training printed; and if it was refused, the last line of its error."""
    capsys.readouterr()
    try:
        return tools.call("train", *words), None
    except SystemExit:
        return "", capsys.readouterr().err.strip().splitlines()[-1]
    except (ValueError, ConfigCompositionException) as error:
        return "", f"{error} {error.__cause__ or ''}"


@fuzzed(8, 160)
def test_command_lines(tries, robustness, data, tmp_path, capsys):
    def case(draw):
        model = draw(MODELS, "model")
        config, recipe = MODELS[model]
        names = {draw(set(options_of(config)) - ELSEWHERE, "option") for _ in range(draw([1, 2, 3, 4]))}
        spoilt = {draw(sorted(names), "spoilt")} if draw([True, False]) else set()
        chosen = {name: draw(OPTIONS[name][name in spoilt], name) for name in sorted(names)}
        words = [words_of(name, value) for name, value in chosen.items()]
        if model == "flash_lm":
            words += (
                ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"]
                if "adaptive_softmax_cutoff" in names
                else []
            )
        base = (
            data[model],
            "--user-dir",
            tools.USER_DIR,
            "--arch",
            model,
            "--no-save",
            "--disable-validation",
        )
        run = (*base, "--save-dir", tmp_path, *recipe, *tools.ADAM, *SIZES, "--max-update", 2, *words)
        output, refusal = outcome(capsys, *run)
        if refusal is None:
            losses = tools.losses(output)
            assert not spoilt, f"{words} trained"
            assert [int(update) for update, _ in losses] == [1, 2]
            assert all(math.isfinite(float(loss)) for _, loss in losses)
            return
        assert spoilt or names & COMBINED, f"{words}: {refusal}"
        named = "|".join(name.replace("_", "[-_]") for name in names)
        assert re.search(rf"({named})\b", refusal), f"{words}: {refusal}"
        assert re.search(
            "allowed|choose from|invalid|ignored|expected|needs|could not be converted", refusal
        ), f"{words}: {refusal}"

    try_out(tries, robustness, "command lines of fairseq-train", case)
