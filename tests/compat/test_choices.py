"""Proves that a name that nobody knows, and a criterion or task of another model, are refused by name."""

import argparse
import re

import numpy
import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import encoders

from fairseq_flash.models.flash_lm import FlashLanguageModel
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM
from support import hostile, tools

LANGUAGES = ("--source-lang", "here", "--target-lang", "there")
TASKS = {"flash_lm": "language_modeling", "flash_masked_lm": "masked_lm", "flash_seq2seq": "translation"}
NEXT_WORD = {"cross_entropy", "label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_rdrop"}
#: By model, the task by which fairseq measures speed, and its options.
MADE_UP = {
    **dict.fromkeys(("flash_lm", "transformer_pp_lm"), ("dummy_lm", "--tokens-per-sample", 16)),
    "flash_masked_lm": ("dummy_masked_lm", "--tokens-per-sample", 16, "--criterion", "masked_lm"),
    "flash_seq2seq": ("dummy_mt", "--src-len", 16, "--tgt-len", 16),
}
TRAIN = {"flash_lm": NEXT_WORD, "flash_masked_lm": {"masked_lm"}, "flash_seq2seq": NEXT_WORD}
#: What the parser refuses to go on without.
REQUIRED = {"composite_loss": ("--underlying-criterion", "cross_entropy")}


@pytest.mark.parametrize("criterion", sorted(CRITERION_REGISTRY))
@pytest.mark.parametrize("model", TRAIN)
def test_each_criterion_of_fairseq_trains_or_is_refused_by_name(
    words_of_training, tmp_path, robustness, model, criterion
):
    words = (*words_of_training[model], "--save-dir", tmp_path / "save", "--max-update", 1)
    words = (*words, "--criterion", criterion, "--ddp-backend", "legacy_ddp", *REQUIRED.get(criterion, ()))
    with robustness.attempt("criterions of fairseq with every model"):
        if criterion in TRAIN[model]:
            assert tools.losses(tools.call("train", *words))
            return
        with pytest.raises(ValueError, match=f"--criterion {criterion} is not allowed with .*; allowed: .*"):
            tools.call("train", *words)
        assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("model", "task"),
    [("flash_lm", "masked_lm"), ("flash_lm", "denoising"), ("flash_masked_lm", "language_modeling")],
)
def test_a_task_of_another_model_is_refused_by_name(words_of_training, tmp_path, model, task):
    words = (*words_of_training[model], "--save-dir", tmp_path / "save", "--max-update", 1, "--task", task)
    with pytest.raises(ValueError, match=f"--task {task} is not allowed with this model; allowed: .*"):
        tools.call("train", *words)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("model", MADE_UP)
def test_tasks_that_measure_speed_train_each_model(model):
    layers = ("--encoder-layers", 1, "--decoder-layers", 1) if model == "flash_seq2seq" else ("--layers", 1)
    words = ("--user-dir", tools.USER_DIR, "--arch", model, "--embed-dim", 16, "--attention-dim", 8, *layers)
    words = (*words, *tools.QUICK, *tools.ADAM, "--no-save", "--disable-validation", "--max-update", 2)
    rows = ("--dict-size", 40, "--dataset-size", 20, "--task", *MADE_UP[model])
    assert len(tools.losses(tools.call("train", *words, *rows))) == 2


def validate(data, path, model, *arguments):
    words = ("--user-dir", tools.USER_DIR, "--cpu", "--path", path, "--task", TASKS[model])
    languages = LANGUAGES if model == "flash_seq2seq" else ()
    return tools.call("validate", data, *words, *languages, "--batch-size", 4, *arguments)


@pytest.mark.parametrize(
    ("model", "own"), [("flash_lm", "cross_entropy"), ("flash_seq2seq", "label_smoothed_cross_entropy")]
)
def test_validation_with_another_criterion_is_refused_by_name(data_bin, parallel, trained, model, own):
    data = parallel if model == "flash_seq2seq" else data_bin
    told = (
        f"--criterion masked_lm is not allowed with .*--criterion {own}, which fairseq.*; allowed: that one"
    )
    with pytest.raises(ValueError, match=told):
        validate(data, trained[model], model, "--criterion", "masked_lm")
    found = (validate(data, trained[model], model, *given) for given in ((), ("--criterion", own)))
    one, other = (re.search(r"loss [\d.]+ .*", output)[0] for output in found)
    assert one == other


@pytest.mark.parametrize("tool", ["generate", "validate"])
def test_a_task_in_the_overrides_is_refused_as_such(data_bin, trained, tool):
    words = ("--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_lm"], "--batch-size", 2)
    words = (*words, "--task", "language_modeling", "--model-overrides", "{'task': 'masked_lm'}")
    told = "--task masked_lm is not allowed with .*--task language_modeling.* --model-overrides.*; allowed: "
    with pytest.raises(ValueError, match=told):
        tools.call(tool, data_bin, *words)


def renamed(good, target, part, name):
    def change(state):
        state["cfg"][part]["_name"] = name

    return hostile.changed(good, target, change)


def tool(name, data, path, *arguments):
    return tools.call(name, data, "--user-dir", tools.USER_DIR, "--cpu", "--path", path, *arguments)


@pytest.mark.parametrize("name", ["none_such", "", None, 5, "x" * 300])
@pytest.mark.parametrize("part", ["task", "model", "criterion"])
def test_a_checkpoint_of_what_is_unknown_is_named(data_bin, trained, tmp_path, part, name):
    path = renamed(trained["flash_lm"], tmp_path / "renamed.pt", part, name)
    doors = {"validate": lambda: validate(data_bin, path, "flash_lm")}
    if part == "model":  # the task is given to these, and the criterion to none
        lm = ("--task", "language_modeling", "--gen-subset", "test", "--batch-size", 2)
        doors["eval-lm"] = lambda: tool("eval-lm", data_bin, path, *lm)
        doors["generate"] = lambda: tool("generate", data_bin, path, *lm)
    if part != "criterion":
        doors["hub"] = lambda: FlashLanguageModel.from_pretrained(str(tmp_path), path.name, str(data_bin))
    for door in doors.values():
        with pytest.raises(ValueError, match=rf"renamed\.pt'.* {part} .*allowed") as caught:
            door()
        assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("kind", ["bpe", "tokenizer"])
def test_subwords_that_are_unknown_are_named(data_bin, trained, kind):
    path = trained["flash_lm"]
    with pytest.raises(ValueError, match=f"{kind} 'none_such' is unknown; allowed: .*"):
        FlashLanguageModel.from_pretrained(str(path.parent), path.name, str(data_bin), **{kind: "none_such"})
    build = getattr(encoders, f"build_{kind}")
    with pytest.raises(ValueError, match=f"{kind} 'x' is unknown; allowed: .*, .*"):
        build(argparse.Namespace(**{kind: "x"}))
    assert build(None) is None


PLACES = {
    "a folder that is none": {"model_name_or_path": "/none/such"},
    "no folder": {"model_name_or_path": None},
    "a number": {"model_name_or_path": 3},
    "a file that is none": {"checkpoint_file": "none.pt"},
    "no file": {"checkpoint_file": None},
    "no name": {"checkpoint_file": ""},
    "no data": {"data_name_or_path": None},
    "data that is none": {"data_name_or_path": "/none/such"},
    "data below that is none": {"data_name_or_path": "./none/such"},
    "a number for data": {"data_name_or_path": 4},
}


@pytest.mark.parametrize("model", [FlashLanguageModel, FlashMaskedLM])
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_is_none_is_named_by_its_argument(data_bin, trained, model, place):
    path = trained["flash_lm" if model is FlashLanguageModel else "flash_masked_lm"]
    good = dict(
        model_name_or_path=str(path.parent), checkpoint_file=path.name, data_name_or_path=str(data_bin)
    )
    (argument, value), *_ = PLACES[place].items()
    with pytest.raises((ValueError, FileNotFoundError), match=f"{argument}=.*; allowed: ") as caught:
        model.from_pretrained(**{**good, argument: value}, bpe=None)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("model", [FlashLanguageModel, FlashMaskedLM])
def test_places_may_be_paths(data_bin, trained, model):
    path = trained["flash_lm" if model is FlashLanguageModel else "flash_masked_lm"]
    interface = model.from_pretrained(path.parent, path.name, data_bin, bpe=None)
    assert all(torch.isfinite(weight).all() for weight in interface.parameters())


def test_dropout_cannot_be_retained(parallel, trained):
    words = (parallel, "--user-dir", tools.USER_DIR, "--cpu", "--path", trained["flash_seq2seq"], *LANGUAGES)
    with pytest.raises(ValueError, match=r"--retain-dropout is not allowed: .*; allowed: without"):
        tools.call("generate", *words, "--retain-dropout")


@pytest.mark.parametrize(
    ("model", "held"), [(FlashMaskedLM, "flash_lm"), (FlashLanguageModel, "flash_seq2seq")]
)
def test_a_checkpoint_of_another_class_is_refused_by_name(data_bin, parallel, trained, model, held):
    path, data = trained[held], data_bin if held == "flash_lm" else parallel
    told = rf"{path.name}.* holds a Flash\w+, not a {model.__name__}; allowed: Flash\w+\.from_pretrained"
    with pytest.raises(ValueError, match=told):
        model.from_pretrained(str(path.parent), path.name, str(data), bpe=None)


@pytest.mark.parametrize(
    "sentences", [None, 5, [], [None], ["the", 3], b"the", torch.ones(2), torch.tensor(3)]
)
@pytest.mark.parametrize("use", ["sample", "score"])
def test_what_is_no_text_is_refused_by_the_hub(data_bin, trained, use, sentences):
    path = trained["flash_lm"]
    interface = FlashLanguageModel.from_pretrained(str(path.parent), path.name, str(data_bin))
    with pytest.raises(ValueError, match=r"sentences=.* is not allowed; allowed: a text, or a list of texts"):
        getattr(interface, use)(sentences)
    for text in ("the", ["the"], ("the", "a")):
        getattr(interface, use)(text)
    for texts in (numpy.array(["the", "a"]), {"the": 1, "a": 2}, (word for word in ("the", "a"))):
        assert len(getattr(interface, use)(texts)) == 2


def test_an_option_of_generation_that_is_unknown_is_refused_by_the_hub(data_bin, trained):
    path = trained["flash_lm"]
    interface = FlashLanguageModel.from_pretrained(str(path.parent), path.name, str(data_bin))
    with pytest.raises(ValueError, match=r"samplng=True is unknown; allowed: sampling"):
        interface.sample("the", samplng=True)
    assert interface.sample("the", sampling=True, max_len_b=2, temperature=0.5)


def test_arguments_of_the_masked_interface_are_refused_by_name(data_bin, trained):
    path = trained["flash_masked_lm"]
    interface = FlashMaskedLM.from_pretrained(str(path.parent), path.name, str(data_bin), bpe=None)
    for told, call in {
        "sentence=None": lambda: interface.encode(None),
        "sentence=3": lambda: interface.encode("the", 3),
        "masked_input=None": lambda: interface.fill_mask(None),
        "topk=3": lambda: interface.fill_mask("a <mask>", topk="3"),
        "topk=True": lambda: interface.fill_mask("a <mask>", topk=True),
        "tokens is a list": lambda: interface.extract_features([1, 2]),
        "tokens is a tuple": lambda: interface.decode((1, 2)),
        "name='a.b'": lambda: interface.register_classification_head("a.b", num_classes=2),
        "name=''": lambda: interface.register_classification_head("", num_classes=2),
        "num_classes=2.5": lambda: interface.register_classification_head("x", num_classes=2.5),
        "num_classes=True": lambda: interface.register_classification_head("x", num_classes=True),
        "inner_dim=0": lambda: interface.register_classification_head("x", 2, inner_dim=numpy.int64(0)),
    }.items():
        with pytest.raises(ValueError, match=f"{told}.*; allowed: "):
            call()


@pytest.mark.parametrize("kind", [numpy.int64, numpy.uint8, torch.tensor])
def test_numbers_of_other_kinds_are_numbers_to_the_masked_interface(data_bin, trained, kind):
    path = trained["flash_masked_lm"]
    interface = FlashMaskedLM.from_pretrained(str(path.parent), path.name, str(data_bin), bpe=None)
    assert len(interface.fill_mask("a <mask>", topk=kind(3))) == 3
    interface.register_classification_head("x", num_classes=kind(2), inner_dim=kind(7))
    assert interface.predict("x", interface.encode("the")).shape == (1, 2)


@pytest.mark.parametrize("model", [FlashLanguageModel, FlashMaskedLM])
@pytest.mark.parametrize("with_options", [False, True])
def test_a_name_that_a_subclass_registers_is_found(data_bin, trained, monkeypatch, model, with_options):
    path = trained["flash_lm" if model is FlashLanguageModel else "flash_masked_lm"]
    held = {"path": str(path.parent), "checkpoint_file": path.name, "data_buffer_size": 7}
    known = {"small": held if with_options else held["path"], "text": str(data_bin)}
    monkeypatch.setattr(model, "hub_models", classmethod(lambda cls: known))
    files = () if with_options else (path.name,)
    interface = model.from_pretrained("small", *files, data_name_or_path="text", bpe=None)
    assert interface.cfg.dataset.data_buffer_size == (7 if with_options else 10)
    with pytest.raises(FileNotFoundError, match="model_name_or_path='large' does not exist; allowed: "):
        model.from_pretrained("large", path.name, str(data_bin), bpe=None)
