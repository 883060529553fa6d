"""Proves that from_pretrained writes into its own folder only, and opens only what its caller names."""

import argparse
import io
import pathlib
import re
import shutil
import tarfile

import numpy
import pytest
import sentencepiece
import torch
from fairseq import checkpoint_utils, file_utils

from fairseq_flash._compat import room
from fairseq_flash.models.flash_lm import FlashLanguageModel
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM
from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq
from support import hostile, tools

CLASSES = {"flash_lm": FlashLanguageModel, "flash_masked_lm": FlashMaskedLM, "flash_seq2seq": FlashSeq2Seq}
ADDRESS = "http://127.0.0.1:9/model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(file_utils, "PYTORCH_FAIRSEQ_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Addresses that anybody asks for; nothing is fetched."""
    asked = []

    def fetch(address, cache_dir=None):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(file_utils, "get_from_cache", fetch)
    return asked


def pack(path, files, folder="model/", mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, source in files.items():
            archive.add(source, folder + name)
    return path


def files_of(model, trained, data_bin, parallel):
    data = parallel if model == "flash_seq2seq" else data_bin
    dictionaries = {path.name: path for path in data.glob("dict.*txt")}
    return {"checkpoint_last.pt": trained[model], **dictionaries}


def load(model, path, **options):
    if model == "flash_masked_lm":
        options = {"bpe": None, **options}
    return CLASSES[model].from_pretrained(str(path), "checkpoint_last.pt", **options)


#: Debian 12's Python 3.11.2, for one, has no filters.
unpacks = pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python unpacks nothing safely")


def test_a_python_without_filters_is_told(monkeypatch, tmp_path):
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("dict.txt"))
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(
        ValueError, match=r"Python 3\S+ cannot look at .*; allowed: Python 3.11.4 or newer, or"
    ):
        load("flash_lm", tmp_path / "model.tar")


@unpacks
@pytest.mark.parametrize("folder", ["model/", ""])
@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tgz", "tar"])
@pytest.mark.parametrize("model", CLASSES)
def test_an_archive_loads_and_stays(model, ending, folder, trained, data_bin, parallel, tmp_path):
    mode = {"tar": "w", "tar.bz2": "w:bz2"}.get(ending, "w:gz")
    path = pack(tmp_path / f"model.{ending}", files_of(model, trained, data_bin, parallel), folder, mode)
    before = path.read_bytes()
    for _ in range(2):
        interface = load(model, path)
        weights = interface.model if model == "flash_masked_lm" else interface.models[0]
        good = torch.load(trained[model])["model"]
        assert all(torch.equal(weights.state_dict()[name], weight) for name, weight in good.items())
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", path.name]
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 1


def member(name, content=b"written", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def link(name, target, kind=tarfile.SYMTYPE):
    return member(name, b"", type=kind, linkname=str(target))


def escapes(target):
    """By name: members that try to write ``target``, which lies beside the cache."""
    deep = "/".join(["d" * 200] * 20)
    return {
        "absolute": [member(str(target))],
        "above": [member("../" * 12 + str(target)[1:])],
        "above later": [member("model/../../" + "../" * 12 + str(target)[1:])],
        "through a link": [link("model/out", target.parent), member(f"model/out/{target.name}")],
        "through a hard link": [link("model/out", target, tarfile.LNKTYPE), member("model/out")],
        "a link alone": [link("model/checkpoint_last.pt", target)],
        "a link to a long way": [link(deep, "../" * 10), member(f"{deep}/{target.name}")],
        "a device": [member("model/device", b"", type=tarfile.CHRTYPE)],
        "a pipe": [member("model/pipe", b"", type=tarfile.FIFOTYPE)],
    }


@pytest.mark.parametrize("name", escapes(pathlib.Path("/x")))
def test_an_archive_that_writes_elsewhere_is_refused(name, tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(*member("model/first"))
        for info, content in escapes(target)[name]:
            archive.addfile(info, content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"model\.tar\.gz' was refused and nothing of it unpacked"):
        load("flash_lm", path)
    assert target.read_text() == "mine"
    assert path.read_bytes() == before
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_a_small_archive_of_gigabytes_is_refused(tmp_path):
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(*member("model/zeros", bytes(2**27)))
    with pytest.raises(ValueError, match="far more than it has bytes"):
        load("flash_lm", path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08" + bytes(40)])
def test_what_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "model.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.tar\.gz' is neither a folder nor a whole tar archive"):
        load("flash_lm", tmp_path / "model.tar.gz")
    assert (tmp_path / "model.tar.gz").read_bytes() == content


def test_a_cut_archive_is_named(trained, data_bin, parallel, tmp_path):
    path = pack(tmp_path / "model.tar.gz", files_of("flash_lm", trained, data_bin, parallel))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="neither a folder nor a whole tar archive"):
        load("flash_lm", path)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist; allowed: a folder, a tar archive"):
        load("flash_lm", tmp_path / "nowhere")


CHOICES = {
    "sentencepiece": {"_name": "sentencepiece", "sentencepiece_model": ADDRESS},
    "gpt2 by its own addresses": {"_name": "gpt2"},
    "gpt2 by name": "gpt2",
    "gpt2": {"_name": "gpt2", "gpt2_encoder_json": ADDRESS, "gpt2_vocab_bpe": "s3://bucket/key"},
    "fastbpe": {"_name": "fastbpe", "bpe_codes": ADDRESS},
    "subword_nmt": {"_name": "subword_nmt", "bpe_codes": ADDRESS},
    "hf_byte_bpe": {"_name": "hf_byte_bpe", "bpe_vocab": ADDRESS, "bpe_merges": ADDRESS},
    "byte_bpe": {"_name": "byte_bpe", "sentencepiece_model_path": ADDRESS},
    "bert": {"_name": "bert"},
}


def folder_with(choice, kind, model, trained, data_bin, parallel, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, source in files_of(model, trained, data_bin, parallel).items():
        shutil.copy(source, folder / name)
    good = trained[model]
    hostile.changed(good, folder / good.name, lambda state: state["cfg"].update({kind: choice}))
    return folder


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", CLASSES)
def test_a_checkpoint_that_names_an_address_is_refused(
    choice, model, trained, data_bin, parallel, tmp_path, opened
):
    if model == "flash_masked_lm" and choice == "gpt2 by name":
        pytest.skip("the bpe=None that is given takes its place")
    folder = folder_with(CHOICES[choice], "bpe", model, trained, data_bin, parallel, tmp_path)
    with pytest.raises(ValueError, match="the checkpoint's own bpe would fetch"):
        load(model, folder)
    assert opened == []


def test_a_tokenizer_of_a_checkpoint_is_looked_at_as_well(trained, data_bin, parallel, tmp_path, opened):
    choice = {"_name": "moses", "source_lang": ADDRESS}
    folder = folder_with(choice, "tokenizer", "flash_lm", trained, data_bin, parallel, tmp_path)
    with pytest.raises(ValueError, match="the checkpoint's own tokenizer would fetch"):
        load("flash_lm", folder)
    assert opened == []


def test_an_address_that_the_caller_names_is_fetched(trained, data_bin, parallel, tmp_path, opened):
    folder = folder_with(None, "bpe", "flash_lm", trained, data_bin, parallel, tmp_path)
    with pytest.raises(OSError, match="no network"):
        load("flash_lm", folder, bpe="gpt2")
    assert len(opened) == 1
    with pytest.raises(OSError, match="no network"):
        load("flash_lm", folder, bpe="sentencepiece", sentencepiece_model=ADDRESS)
    assert opened[1] == ADDRESS


@unpacks
def test_an_archive_of_a_masked_model_is_looked_into_for_its_pieces(trained, data_bin, parallel, tmp_path):
    files = files_of("flash_masked_lm", trained, data_bin, parallel)
    path = pack(tmp_path / "model.tar.gz", files)
    with pytest.raises(ValueError, match=r"no sentencepiece.bpe.model in .*unpacked"):
        FlashMaskedLM.from_pretrained(str(path), "checkpoint_last.pt")
    text = tmp_path / "text"
    text.write_text("\n".join(tools.real_lines()[:200]))
    options = dict(input=str(text), model_prefix=str(tmp_path / "pieces"), vocab_size=100, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(**options)
    path = pack(tmp_path / "whole.tar.gz", {**files, "sentencepiece.bpe.model": tmp_path / "pieces.model"})
    assert FlashMaskedLM.from_pretrained(str(path), "checkpoint_last.pt").encode("the").numel() > 2


#: By model, options that ask for far more than its weights have.
HUGE = {
    "flash_lm": [
        dict(embed_dim=2**20),
        dict(embed_dim=2**40),
        dict(layers=2**40),
        dict(expansion_factor=2**30),
        dict(block="transformer", attention="quadratic", ffn_embed_dim=2**40),
        dict(relative_bias="toeplitz", chunk_size=2**40),
        dict(attention="quadratic", relative_bias="toeplitz", n_ref=2**50),
        dict(adaptive_input=True, adaptive_input_cutoff="10", embed_dim=2**20),
    ],
    "flash_masked_lm": [dict(embed_dim=2**20), dict(layers=2**40), dict(attention_dim=2**40)],
    "flash_seq2seq": [dict(embed_dim=2**20), dict(encoder_layers=2**40), dict(decoder_layers=2**40)],
}


@pytest.mark.parametrize(
    ("model", "options", "form"),
    [(model, case, "cfg") for model in HUGE for case in HUGE[model]]
    + [(model, HUGE[model][0], "args") for model in HUGE],
)
def test_a_small_file_builds_no_huge_model(
    model, options, form, trained, data_bin, parallel, tmp_path, robustness
):
    def ask(state):
        state["cfg"]["model"].update(options)
        if form == "args":
            words = {**state["cfg"]["task"], **state["cfg"]["model"], "arch": model}
            state["args"] = argparse.Namespace(**words, task=state["cfg"]["task"]["_name"])

    path = hostile.changed(trained[model], tmp_path / "checkpoint_last.pt", ask)
    data = parallel if model == "flash_seq2seq" else data_bin
    asked = r"checkpoint .*checkpoint_last.pt' is refused: its options ask for a model of"
    attempt, refused = (
        robustness.attempt("small files of huge models"),
        pytest.raises(ValueError, match=asked),
    )
    with attempt, hostile.little_memory(), refused:
        load(model, tmp_path, data_name_or_path=str(data))
    if form == "cfg":
        with hostile.little_memory(), pytest.raises(ValueError, match=asked):
            checkpoint_utils.load_model_ensemble([str(path)], arg_overrides={"data": str(data)})


@pytest.mark.parametrize("model", CLASSES)
def test_counting_leaves_random_numbers_alone(model, trained, data_bin, parallel, tmp_path, monkeypatch):
    data = parallel if model == "flash_seq2seq" else data_bin

    def drawn():
        torch.manual_seed(3)
        checkpoint_utils.load_model_ensemble([str(trained[model])], arg_overrides={"data": str(data)})
        return torch.rand(3)

    found = drawn()
    monkeypatch.setattr(room, "_asked", lambda *unused: None)
    assert torch.equal(found, drawn())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("layers", value) for value in ("x", 2.5, float("nan"), [1], True, "${oc.env:HOME}")),
        *(("dropout", "x"), ("scaled_sin", 3), ("chunk_size", "8")),
    ],
)
def test_an_option_of_another_type_is_refused_by_name(option, value, trained, data_bin, tmp_path):
    def change(state):
        state["cfg"]["model"][option] = value

    hostile.changed(trained["flash_lm"], tmp_path / "checkpoint_last.pt", change)
    with pytest.raises(ValueError, match=f"last.pt' is refused: its --{option.replace('_', '-')} is"):
        load("flash_lm", tmp_path, data_name_or_path=str(data_bin))


@pytest.mark.parametrize("model", ["missing", None, "flash_lm", 3])
def test_a_configuration_without_a_model_is_refused(model, trained, data_bin, tmp_path):
    def change(state):
        state["cfg"]["model"] = model
        if model == "missing":
            del state["cfg"]["model"]

    hostile.changed(trained["flash_lm"], tmp_path / "checkpoint_last.pt", change)
    with pytest.raises(ValueError, match=r"cannot be read: its configuration holds no options"):
        load("flash_lm", tmp_path, data_name_or_path=str(data_bin))


def interface_of(model, trained, data_bin, parallel):
    data = parallel if model == "flash_seq2seq" else data_bin
    return load(model, trained[model].parent, data_name_or_path=str(data))


@pytest.mark.parametrize("texts", ["", "  ", "\n", ["the of", ""], ["the", "\u2003"]])
@pytest.mark.parametrize("lines", [False, True])
def test_a_text_without_a_word_has_no_score(texts, lines, trained, data_bin, parallel):
    interface = interface_of("flash_lm", trained, data_bin, parallel)
    with pytest.raises(ValueError, match=r"sentences=.* has a text without a word, which has no score"):
        interface.score(texts, replace_newline_with_eos=lines)


@pytest.mark.parametrize("rows", [[2], [2, 2], []])
def test_a_row_without_a_word_has_no_score(rows, trained, data_bin, parallel):
    interface = interface_of("flash_lm", trained, data_bin, parallel)
    tokens = torch.tensor(rows, dtype=torch.long)
    with pytest.raises(ValueError, match="has a row without a word, which has no score"):
        interface.generate([torch.tensor([4, 2]), tokens], score_reference=True)


def test_a_translation_has_no_score(trained, data_bin, parallel):
    interface = interface_of("flash_seq2seq", trained, data_bin, parallel)
    with pytest.raises(ValueError, match=r"score\(\) is not allowed with --task translation; allowed: "):
        interface.score("the of")


@pytest.mark.parametrize("text", ["", "  ", ["the", ""]])
@pytest.mark.parametrize("model", ["flash_lm", "flash_seq2seq"])
def test_a_text_without_a_word_is_continued(model, text, trained, data_bin, parallel):
    interface = interface_of(model, trained, data_bin, parallel)
    alone, found = interface.sample("", max_len_b=4), interface.sample(text, max_len_b=4)
    assert (found if isinstance(text, str) else found[-1]) == alone


ROWS = {
    "none": [],
    "a text": "the of",
    "lists": [[4, 5, 2]],
    "floats": [torch.tensor([4.0, 2.0])],
    "truths": [torch.tensor([True, False])],
    "a number": torch.tensor(4),
    "two dimensions each": [torch.tensor([[4, 2]])],
    "a stranger": [torch.tensor([4, 5000, 2])],
    "below zero": torch.tensor([4, -5, 2]),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", ["flash_lm", "flash_seq2seq"])
def test_rows_that_are_none_are_refused_by_name(model, rows, trained, data_bin, parallel):
    interface = interface_of(model, trained, data_bin, parallel)
    with pytest.raises(ValueError, match=r"tokenized_sentences.* allowed: .*indices, as encode"):
        interface.generate(ROWS[rows], max_len_b=4)


@pytest.mark.parametrize(
    "option",
    [
        *({"beam": value} for value in (1.5, "2", True, None, [2])),
        *({"max_len_b": 4.5}, {"sampling": "yes"}, {"temperature": "hot"}, {"min_len": "1"}),
    ],
)
def test_an_option_of_generation_of_another_type_is_refused_by_name(option, trained, data_bin, parallel):
    interface = interface_of("flash_lm", trained, data_bin, parallel)
    ((name, value),) = option.items()
    told = rf"{name}={re.escape(repr(value))} is not allowed; allowed: "
    with pytest.raises(ValueError, match=told):
        interface.sample("the", **option)
    assert interface.sample("the", beam=numpy.int64(2), max_len_b=4, lenpen=0.6, temperature=numpy.float32(1))


def test_a_prompt_as_long_as_what_may_be_generated_is_told(trained, data_bin, parallel, caplog):
    interface = interface_of("flash_lm", trained, data_bin, parallel)
    interface.sample(["the of a to", "the"], max_len_b=5)
    assert "prompts" not in caplog.text
    assert len(interface.sample(["the of a to in", "the"], max_len_b=4)[0].split()) == 4
    told = "1 of 2 prompts has 4 tokens or more, all that --max-len-b 4 and the model allow: nothing follows"
    assert [record.message for record in caplog.records if "prompts" in record.message] == [told]


@pytest.mark.parametrize("tokens", [[0, 5000, 2], [0, -5, 2], [0.0, 5.0, 2.0], [True, False]])
def test_tokens_that_are_none_have_no_text(tokens, trained, data_bin, parallel):
    interface = interface_of("flash_masked_lm", trained, data_bin, parallel)
    with pytest.raises(ValueError, match=r"tokens is no row; allowed: .*201 words' indices"):
        interface.decode(torch.tensor(tokens))
