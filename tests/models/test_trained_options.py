"""Proves that a checkpoint read with other options than it was trained with is refused or warned of.

Every option of every model is changed beside trained weights: what is computed stays the same, or the change
is refused by name, or, if asked for, warned of. So it is on resuming, on fine-tuning and by overrides.

Float64, as implementations differ by rounding: measured up to 1e-13 of the largest; an option taken silently
makes 1e-3 and more.
"""

import argparse
import dataclasses
import logging

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary

from fairseq_flash.models import _trained
from fairseq_flash.models.flash_lm import FlashLanguageModel, FlashLanguageModelConfig
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM, FlashMaskedLMConfig
from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq, FlashSeq2SeqConfig
from support import tools

WORDS = 30
TOLERANCE = 1e5 * torch.finfo(torch.float64).eps
SMALL = dict(embed_dim=8, attention_dim=4, chunk_size=4)
KINDS = {
    "gau": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=1)),
    "quadratic": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=1, attention="quadratic")),
    "transformer": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=1, block="transformer")),
    "tables": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=1, relative_bias="toeplitz")),
    "masked": (FlashMaskedLM, FlashMaskedLMConfig, dict(layers=1)),
    "seq2seq": (FlashSeq2Seq, FlashSeq2SeqConfig, dict(encoder_layers=1, decoder_layers=1)),
}
#: Another value of options whose default is no boolean; the others are turned round.
OTHER = dict(
    embed_dim=16,
    layers=2,
    encoder_layers=2,
    decoder_layers=2,
    expansion_factor=3,
    attention_dim=2,
    chunk_size=3,
    attention="local",
    block="transformer",
    linear_norm="chunk",
    norm="rmsnorm",
    relative_bias="toeplitz",
    init="paper",
    n_ref=7,
    dropout=0.3,
    attention_dropout=0.2,
    ffn_embed_dim=20,
    diagnostics_interval=3,
    backend="reference",
    adaptive_input_factor=2,
    adaptive_input_cutoff="10",
    adaptive_softmax_cutoff="10",
    adaptive_softmax_dropout=0.2,
    adaptive_softmax_factor=2,
    pooler_dropout=0.2,
    vocabulary_loss="chunked",
    max_positions=99,
)
#: Compiling is proven elsewhere, and slow.
SKIPPED = {"_name", "compile"}
CASES = [
    (kind, option.name)
    for kind, (_, config, _) in KINDS.items()
    for option in dataclasses.fields(config)
    if option.name not in SKIPPED
]


def dictionary(prefix=""):
    words = Dictionary()
    for word in range(WORDS - len(words)):
        words.add_symbol(prefix + str(word))
    return words


def build(kind, prefix="", **changes):
    model, config, options = KINDS[kind]
    words = dictionary(prefix)
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
    torch.manual_seed(0)
    built = model.build_model(config(**{**SMALL, **options, **changes}), task).double().eval()
    return built


def output(model):
    tokens = torch.randint(4, WORDS, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(tokens, None, tokens.flip(1)) if isinstance(model, FlashSeq2Seq) else model(tokens)
    return out[0]


def noisy(model):
    """Other weights than any start, so that nothing is equal by chance."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise))
    return model


def changed(kind, option):
    _, config, options = KINDS[kind]
    default = {**{field.name: field.default for field in dataclasses.fields(config)}, **SMALL, **options}[
        option
    ]
    value = OTHER.get(option, not default)
    return "rotary" if value == default == "toeplitz" else "mixed_chunk" if value == default else value


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_an_option_changed_beside_the_weights_is_the_same_or_refused_by_name(kind, option):
    trained = noisy(build(kind))
    refused = ""
    try:
        other = build(kind, **{option: changed(kind, option)})
        other.load_state_dict(trained.state_dict())
    except ValueError as error:
        refused = str(error).replace("_", "-")
    if refused:
        # The width of a feed-forward network is told by the shape of its weights.
        names = (option.replace("_", "-"), "ffn-in.weight" if option == "ffn_embed_dim" else "--" + option)
        assert any(name in refused for name in names)
        return
    found, expected = output(other), output(trained)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max(), "silently another function"


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("gau", "chunk_size", 3),
        ("gau", "linear_norm", "chunk"),
        ("transformer", "attention_dim", 2),
        ("masked", "linear_norm", "chunk"),
        ("seq2seq", "chunk_size", 3),
        ("gau", "share_decoder_input_output_embed", True),
    ],
)
def test_who_means_it_is_warned(kind, option, value, caplog):
    _trained._warn_once.cache_clear()
    trained = noisy(build(kind))
    other = build(kind, **{option: value}, change_trained_options=True)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(trained.state_dict())
        other.load_state_dict(trained.state_dict())
    assert [option.replace("_", "-") in record.message for record in caplog.records] == [True]
    assert str(value) in caplog.text
    assert not torch.equal(output(other), output(trained))


def test_a_transformers_attention_is_refused_with_both_values():
    trained = build("transformer", attention="quadratic")
    with pytest.raises(ValueError, match=r"--attention local \(trained with quadratic\)"):
        build("transformer", attention="local").load_state_dict(trained.state_dict())


def test_a_state_dict_without_a_record_loads():
    trained = noisy(build("gau"))
    state = trained.state_dict()
    del state["_extra_state"]
    other = build("gau")
    other.load_state_dict(state)
    assert torch.equal(output(other), output(trained))


def test_other_words_in_as_large_a_dictionary_are_warned_of(caplog):
    _trained._warn_once.cache_clear()
    state = build("gau").state_dict()
    build("gau").load_state_dict(dict(state))
    assert not caplog.records
    build("gau", prefix="x").load_state_dict(dict(state))
    assert "the dictionary has other words" in caplog.text


def test_averages_and_noise_leave_the_record_as_it_is():
    state = build("gau").state_dict()
    state["_extra_state"] = (state["_extra_state"] * 3 / 3).float() + 0.2
    build("gau").load_state_dict(dict(state))
    with pytest.raises(ValueError, match=r"--chunk-size 5 \(trained with 4\)"):
        build("gau", chunk_size=5).load_state_dict(dict(state))


@pytest.fixture(scope="module", params=["new", "old"])
def saved(request, checkpoint, tmp_path_factory):
    """A checkpoint of today, and one that has no record but its configuration."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    content = torch.load(checkpoint)
    if request.param == "old":
        del content["model"]["_extra_state"], content["cfg"]["model"]["change_trained_options"]
    torch.save(content, path)
    return path


def test_overrides_are_refused_or_warned_of(saved, caplog):
    _trained._warn_once.cache_clear()
    with pytest.raises(ValueError, match=r"--chunk-size 4 \(trained with 8\)"):
        checkpoint_utils.load_model_ensemble([str(saved)], arg_overrides={"chunk_size": 4})
    meant = {"chunk_size": 4, "change_trained_options": True}
    checkpoint_utils.load_model_ensemble([str(saved)], arg_overrides=meant)
    assert "--chunk-size 4 (trained with 8)" in caplog.text


@pytest.mark.parametrize("door", ["--restore-file", "--finetune-from-model"])
def test_training_goes_on_as_it_began_or_says_so(saved, data_bin, tmp_path, door):
    _trained._warn_once.cache_clear()
    change = (door, saved, "--linear-norm", "chunk")
    with pytest.raises(ValueError, match=r"--linear-norm chunk \(trained with mean\)"):
        tools.train(data_bin, tmp_path, *change)
    output = tools.train(data_bin, tmp_path, *change, "--change-trained-options", updates=6)
    assert "--linear-norm chunk (trained with mean)" in output
    tools.train(data_bin, tmp_path / "same", door, saved, updates=6)


def test_a_checkpoint_that_does_not_fit_says_why_in_the_last_line(checkpoint, data_bin, tmp_path):
    with pytest.raises(ValueError, match=r"--layers 3 \(trained with 2\)"):
        tools.train(data_bin, tmp_path, "--restore-file", checkpoint, "--layers", "3")


@pytest.mark.parametrize("attention", ["mixed_chunk", "quadratic"])
def test_an_average_is_stored_and_begins_where_a_run_without_one_ended(data_bin, tmp_path, attention):
    options = ("--attention", attention)
    tools.train(data_bin, tmp_path, *options)
    begun = torch.load(tmp_path / "checkpoint_last.pt")["model"]
    tools.train(data_bin, tmp_path, *options, "--store-ema", "--ema-decay", "1.0", updates=6)
    content = torch.load(tmp_path / "checkpoint_last.pt")
    average = content["extra_state"]["ema"]
    assert average.keys() == begun.keys()
    assert all(torch.equal(average[name], weight) for name, weight in begun.items())
    assert not torch.equal(
        content["model"]["decoder.stack.final_norm.weight"], begun["decoder.stack.final_norm.weight"]
    )
    tools.train(data_bin, tmp_path, *options, "--store-ema", updates=8)


def test_a_dictionary_of_another_size_is_named(checkpoint, data_bin, tmp_path):
    for path in data_bin.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "dict.txt").open("a") as words:
        words.write("never-there-before 1\n")
    with pytest.raises(ValueError, match=r"the dictionary has \d+ words; allowed: \d+, those that"):
        tools.train(tmp_path, tmp_path / "saved", "--restore-file", checkpoint)
