"""Proves that a checkpoint read with other options than it was trained with is refused or warned of.

Every option of every model is changed beside trained weights, on resuming, on fine-tuning and by overrides,
through the functions of fairseq's tools: what is computed stays the same, or the change is refused by name
with both values, or, if asked for, warned of once.

Float64, as implementations differ by rounding: measured up to 1e-13 of the largest; an option taken silently
makes 1e-3 and more.
"""

import argparse
import copy
import dataclasses
import logging
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import omegaconf
import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq import options as fairseq_options
from fairseq.criterions.adaptive_loss import AdaptiveLossConfig
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from fairseq_flash.models import _option_checks, _trained
from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq
from support import tools

WORDS = 30
TOLERANCE = 1e5 * torch.finfo(torch.float64).eps
SMALL = dict(embed_dim=8, attention_dim=4, chunk_size=4)
ADAPTIVE = dict(adaptive_input=True, adaptive_input_cutoff="10", adaptive_softmax_cutoff="20")
CONFIGS = _trained.CONFIGS
LM, MASKED, SEQ2SEQ = CONFIGS
#: Systems whose options have another effect: by name, the model and its options.
KINDS = {
    "gau": (LM, dict(layers=1)),
    "shifted": (LM, dict(layers=1, shift_keys=True, linear_norm="fading")),
    "quadratic": (LM, dict(layers=1, attention="quadratic")),
    "transformer": (LM, dict(layers=1, block="transformer")),
    "tables": (LM, dict(layers=1, relative_bias="toeplitz")),
    "adaptive": (LM, dict(layers=1, **ADAPTIVE)),
    "masked": (MASKED, dict(layers=1)),
    "seq2seq": (SEQ2SEQ, dict(encoder_layers=1, decoder_layers=1)),
}
#: For every option a value that is neither its default nor that of a kind, or two where one is.
OTHER = dict(
    embed_dim=[16],
    layers=[2],
    encoder_layers=[2],
    decoder_layers=[2],
    expansion_factor=[3],
    attention_dim=[2],
    chunk_size=[3],
    attention=["local", "global", "quadratic", "mixed_chunk"],
    block=["transformer", "gau"],
    linear_norm=["chunk", "fading"],
    shift_keys=[True, False],
    norm=["rmsnorm", "scalenorm"],
    relative_bias=["toeplitz", "rotary"],
    init=["paper"],
    scaled_sin=[True],
    n_ref=[7],
    dropout=[0.3],
    attention_dropout=[0.2],
    ffn_embed_dim=[20],
    glu=[True],
    checkpoint_activations=[True],
    offload_activations=[True],
    diagnostics_interval=[3],
    backend=["reference", "recomputed"],
    share_decoder_input_output_embed=[True],
    share_all_embeddings=[True],
    adaptive_input=[True, False],
    adaptive_input_factor=[2],
    adaptive_input_cutoff=["15"],
    adaptive_softmax_cutoff=["10"],
    adaptive_softmax_dropout=[0.2],
    adaptive_softmax_factor=[2],
    tie_adaptive_weights=[True],
    tie_adaptive_proj=[True],
    untie_weights_roberta=[True],
    pooling=["mean", "attention"],
    pooler_dropout=[0.2],
    load_checkpoint_heads=[True],
    max_positions=[99],
    vocabulary_loss=["chunked"],
    no_graph=[True],
    change_trained_options=[True],
)
#: What no name or number stands for.
DEFAULTS = dict(relative_bias="rotary", n_ref=32, ffn_embed_dim=32)
#: Compiling is proven elsewhere, and slow.
SKIPPED = {"_name", "compile"}
#: Options that may change nothing of what is computed. Any other is refused wherever it has an effect.
FREE = {
    *("init", "dropout", "attention_dropout", "adaptive_softmax_dropout", "pooler_dropout"),
    *("checkpoint_activations", "offload_activations", "backend", "diagnostics_interval", "no_graph"),
    *("load_checkpoint_heads", "max_positions", "vocabulary_loss", "change_trained_options"),
    "pooling",  # without a head; with one, see test_tools_flash_masked_lm.py
}
#: What has no effect beside the other options of a kind, is not refused for it, and changes nothing.
WITHOUT_EFFECT = {("quadratic", "chunk_size"), ("quadratic", "linear_norm")} | {
    (kind, f"adaptive_{side}_factor")
    for kind in ("gau", "shifted", "quadratic", "transformer")
    for side in ("input", "softmax")
}
DOORS = ("resume", "fine-tune", "override")


def options_of(kind):
    return [option for option in dataclasses.fields(CONFIGS[KINDS[kind][0]]) if option.name not in SKIPPED]


def options_of_kind(kind):
    """What a checkpoint of the kind was trained with."""
    return {**{option.name: option.default for option in options_of(kind)}, **SMALL, **KINDS[kind][1]}


CASES = [
    (kind, option.name, value)
    for kind in KINDS
    for option in options_of(kind)
    if kind != "tables" or option.name == "relative_bias"
    for value in OTHER.get(option.name, ())
    if value != options_of_kind(kind)[option.name]
    # No name is the rotary one.
    and (option.name, value, options_of_kind(kind)[option.name]) != ("relative_bias", "rotary", None)
]


def dictionary(prefix=""):
    words = Dictionary()
    for word in range(WORDS - len(words)):
        words.add_symbol(prefix + str(word))
    return words


def build(kind, prefix="", **changes):
    model, options = KINDS[kind]
    words = dictionary(prefix)
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
    torch.manual_seed(0)
    cfg = CONFIGS[model](**{**SMALL, **options, **changes})
    return MODEL_REGISTRY[model].build_model(cfg, task).double().eval()


def output(model):
    tokens = torch.randint(4, WORDS, (2, 11), generator=torch.Generator().manual_seed(0))
    model = model.double().eval()
    with torch.no_grad():
        out = model(tokens, None, tokens.flip(1)) if isinstance(model, FlashSeq2Seq) else model(tokens)
        return model.get_normalized_probs(out, log_probs=True, sample={"target": tokens})


def noisy(model):
    """Other weights than any start, so that nothing is equal by chance."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise))
    return model


class Trained(NamedTuple):
    cfg: omegaconf.DictConfig
    task: FairseqTask
    path: Path
    output: torch.Tensor


@pytest.fixture(scope="module")
def trained_kinds(words_of_training, tmp_path_factory):
    """Of each kind a checkpoint as fairseq-train saves it, what it computes, and the training's own task."""
    made, parsed = {}, {}
    for model in CONFIGS:
        words, parser = map(str, words_of_training[model]), fairseq_options.get_training_parser()
        parsed[model] = convert_namespace_to_omegaconf(
            fairseq_options.parse_args_and_arch(parser, list(words))
        )
    for kind, (model, options) in KINDS.items():
        folder, cfg = tmp_path_factory.mktemp(kind), copy.deepcopy(parsed[model])
        if kind == "adaptive":
            cfg.criterion = AdaptiveLossConfig(_name="adaptive_loss", ddp_backend="legacy_ddp")
        for name, value in {**SMALL, **options}.items():
            cfg.model[name] = value
        task = tasks.setup_task(cfg.task)
        trainer = trainer_of(cfg, task)
        noisy(trainer.get_model())
        path = folder / "checkpoint.pt"
        state = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None}
        trainer.consolidate_optimizer()
        trainer.save_checkpoint(str(path), state)
        content = torch.load(path)
        # Most of the time of reading goes into options of the tools, which a model does not ask for.
        content["cfg"] = {name: content["cfg"][name] for name in ("_name", "model", "task", "criterion")}
        torch.save(content, path)
        made[kind] = Trained(cfg, task, path, output(trainer.get_model()))
    return made


def trainer_of(cfg, task):
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def read(trained, door, folder, changes):
    """The model that comes out of a door, as the tools of fairseq go through it."""
    if door == "override":
        return checkpoint_utils.load_model_ensemble([str(trained.path)], arg_overrides=changes)[0][0]
    option = "restore_file" if door == "resume" else "finetune_from_model"
    cfg = copy.copy(trained.cfg)
    cfg.model = {**cfg.model, **changes}
    cfg.checkpoint = {**cfg.checkpoint, "save_dir": str(folder), option: str(trained.path)}
    trainer = trainer_of(cfg, trained.task)
    checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
    return trainer.get_model()


def test_every_option_has_another_value_to_be_tried():
    names = {option.name for config in CONFIGS.values() for option in dataclasses.fields(config)}
    assert names - SKIPPED == OTHER.keys()
    tried = {(KINDS[kind][0], option) for kind, option, _ in CASES}
    assert tried == {(KINDS[kind][0], option.name) for kind in KINDS for option in options_of(kind)}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_option_that_differs_from_training_is_the_same_refused_or_warned_of(
    trained_kinds, tmp_path, door, kind, robustness
):
    wrong, cases = {}, [case for case in CASES if case[0] == kind]
    for case in cases:
        try:
            judge(trained_kinds[kind], door, tmp_path, *case)
        except AssertionError as error:
            wrong[case] = str(error).partition("\n")[0]
    robustness.count("options that differ from those of training", len(cases), len(cases) - len(wrong))
    assert wrong == {}


def attempt(*arguments):
    """What the model computes that comes out of a door; or None, and why it was refused."""
    try:
        return output(read(*arguments)), ""
    except ValueError as error:
        return None, str(error)


def judge(trained, door, folder, kind, option, value):
    """Raises AssertionError where a change is taken in silence, or refused without its name."""
    found, said = attempt(trained, door, folder, {option: value})
    if found is not None:
        assert option in FREE or (kind, option) in WITHOUT_EFFECT, "taken in silence"
        difference = (found - trained.output).abs().max() / trained.output.abs().max()
        assert difference <= TOLERANCE, f"silently another function, by {difference}"
        return
    own = f"--{option.replace('_', '-')}"
    assert own in said or f"{option}=" in said, f"refused without its name: {said}"
    # Where it has no effect beside the other options, or cannot be, training is refused as well.
    causes = ("has no effect", "have no effect", "is not allowed", "is unknown", "needs")
    alone = any(cause in said for cause in causes)
    before = options_of_kind(kind)[option]
    before = DEFAULTS.get(option) if before is None else before
    assert alone or (str(value) in said and str(before) in said), f"refused without both values: {said}"
    if alone or door == "fine-tune":  # which warns as resuming does
        return
    _option_checks.warn_once.cache_clear()
    with mock.patch.object(_option_checks.logger, "warning") as warning:
        found, said = attempt(trained, door, folder, {option: value, "change_trained_options": True})
    warnings = [str(call.args[0]) for call in warning.call_args_list]
    if found is None:
        # Weights that do not fit, or options that can never be.
        causes = ("does not fit", "--reset-optimizer", own, f"{option}=")
        assert any(cause in said for cause in causes), f"refused without a cause: {said}"
    else:
        assert [own in text for text in warnings] == [True], f"warned: {warnings}"


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("gau", "chunk_size", 3),
        ("gau", "linear_norm", "chunk"),
        ("gau", "linear_norm", "fading"),
        ("gau", "shift_keys", True),
        ("shifted", "shift_keys", False),
        ("transformer", "attention_dim", 2),
        ("masked", "linear_norm", "chunk"),
        ("seq2seq", "chunk_size", 3),
        ("gau", "share_decoder_input_output_embed", True),
    ],
)
def test_who_means_it_is_warned(kind, option, value, caplog):
    _option_checks.warn_once.cache_clear()
    trained = noisy(build(kind))
    other = build(kind, **{option: value}, change_trained_options=True)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(trained.state_dict())
        other.load_state_dict(trained.state_dict())
    assert [option.replace("_", "-") in record.message for record in caplog.records] == [True]
    assert str(value) in caplog.text
    assert not torch.equal(output(other), output(trained))


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("quadratic", "linear_norm", "chunk"),
        ("gau", "adaptive_input_factor", 2),
        ("gau", "adaptive_softmax_factor", 2),
        ("gau", "adaptive_softmax_dropout", 0.2),
    ],
)
def test_an_option_without_effect_is_warned_of_once(kind, option, value, caplog):
    _option_checks.warn_once.cache_clear()
    trained = build(kind, **{option: value})
    build(kind, **{option: value})
    own = f"--{option.replace('_', '-')} {value} has no effect; allowed: with --"
    assert [own in record.message for record in caplog.records] == [True]
    build(kind, **{option: value}).load_state_dict(trained.state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "masked",
            dict(linear_norm="fading"),
            "--linear-norm fading is not allowed in a bidirectional stack",
        ),
        (
            "seq2seq",
            dict(linear_norm="fading"),
            "--linear-norm fading is not allowed in a bidirectional stack",
        ),
        ("quadratic", dict(shift_keys=True), "--shift-keys is not allowed with --block gau --attention quad"),
        ("transformer", dict(shift_keys=True), "--shift-keys is not allowed with --block transformer"),
        ("masked", dict(shift_keys=True, attention="quadratic"), "--shift-keys is not allowed with"),
        ("seq2seq", dict(shift_keys=True, attention="quadratic"), "--shift-keys is not allowed with"),
    ],
)
def test_what_cannot_shift_or_fade_is_refused_by_name(kind, options, message):
    with pytest.raises(ValueError, match=f"{message}.*; allowed: "):
        build(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_model_is_warned_of_by_itself(kind, caplog):
    _option_checks.warn_once.cache_clear()
    build(kind)
    assert not caplog.records


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


def without(state, option):
    """Weights whose record is of before there was an option."""
    record = _trained._decode(state["_extra_state"])
    del record["options"][option]
    return state | {"_extra_state": _trained._encode(record)}


def test_a_record_of_before_shifted_keys_is_of_a_model_without():
    trained = noisy(build("gau"))
    other = build("gau")
    other.load_state_dict(without(trained.state_dict(), "shift_keys"))
    assert torch.equal(output(other), output(trained))
    with pytest.raises(ValueError, match=r"--shift-keys True \(trained with False\)"):
        build("gau", shift_keys=True).load_state_dict(without(trained.state_dict(), "shift_keys"))


def test_other_words_in_as_large_a_dictionary_are_warned_of(caplog):
    _option_checks.warn_once.cache_clear()
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


@pytest.mark.parametrize("record", ["[1]", "3", '{"options": 3}', "null", "{"])
def test_a_record_that_cannot_be_read_is_warned_of(record, caplog):
    state = build("gau").state_dict()
    state["_extra_state"] = torch.tensor(list(record.encode()), dtype=torch.float64)
    build("gau").load_state_dict(state)
    assert "record of its options is not readable" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int8])
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(dtype):
    state = build("gau").state_dict()
    state["decoder.stack.final_norm.weight"] = torch.ones(8, dtype=dtype)
    with pytest.raises(ValueError, match=f"final_norm.weight is {dtype}; allowed: floating point"):
        build("gau").load_state_dict(state)


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
    _option_checks.warn_once.cache_clear()
    with pytest.raises(ValueError, match=r"--chunk-size 4 \(trained with 8\)"):
        checkpoint_utils.load_model_ensemble([str(saved)], arg_overrides={"chunk_size": 4})
    meant = {"chunk_size": 4, "change_trained_options": True}
    checkpoint_utils.load_model_ensemble([str(saved)], arg_overrides=meant)
    assert "--chunk-size 4 (trained with 8)" in caplog.text


def test_an_override_of_what_an_older_configuration_lacks_is_not_dropped(checkpoint, tmp_path):
    content = torch.load(checkpoint)
    del content["cfg"]["model"]["backend"]
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        checkpoint_utils.load_model_ensemble([str(tmp_path / "old.pt")], arg_overrides={"backend": "fast"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chunksize": 4}, "override 'chunksize' is no option .* did you mean 'chunk_size'"),
        ({"chunk-size": 4}, "did you mean 'chunk_size'"),
        ({"arch": "flash_quad_lm"}, "override 'arch' is no option"),
        ({"model": "flash_quad_lm"}, "override 'model' is no option"),
        ({"tokens_per_sample": 16, "chunk_size": 8, "sentencepiece_model": "x", "bpe": "characters"}, ""),
    ],
)
def test_an_override_that_would_be_dropped_is_warned_of(checkpoint, caplog, given, said):
    _option_checks.warn_once.cache_clear()
    checkpoint_utils.load_model_ensemble([str(checkpoint)], arg_overrides=given)
    found = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [bool(said and re.search(said, text)) for text in found] == [True] * bool(said)


@pytest.mark.parametrize("text", ["[1]", "{chunk_size: 4}", "chunk_size=4", "'chunk_size'", ""])
@pytest.mark.parametrize("tool", ["eval-lm", "generate", "interactive"])
def test_overrides_that_are_no_dictionary_are_refused(checkpoint, data_bin, capsys, tool, text):
    words = (data_bin, "--user-dir", tools.USER_DIR, "--task", "language_modeling", "--path", checkpoint)
    with pytest.raises(SystemExit):
        tools.call(tool, *words, "--model-overrides", text)
    assert f"--model-overrides {text!r} is not allowed; allowed" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["--restore-file", "--finetune-from-model"])
def test_training_goes_on_as_it_began_or_says_so(saved, data_bin, tmp_path, door):
    _option_checks.warn_once.cache_clear()
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
