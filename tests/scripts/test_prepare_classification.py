"""Proves that prepare_classification.py makes exact data, repeatably, which a model learns.

It is trained on the data of prepare_lm.py, fine-tuned and asked, by fairseq's tools and ``from_pretrained``.
"""

import json
import random
import re

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary, data_utils

from fairseq_flash.models.flash_masked_lm import FlashMaskedLM
from support import tools

WORDS = {"good": ["fine", "lovely", "bright", "glad"], "bad": ["poor", "dreary", "dull", "sorry"]}
SIZES = (
    *("--arch", "flash_masked_lm_tiny", "--embed-dim", "32", "--layers", "2", "--attention-dim", "16"),
    *("--chunk-size", "8", *tools.QUICK, *tools.ADAM, "--user-dir", tools.USER_DIR),
)


def sentences(label, count, seed=0):
    chooser = random.Random(f"{label} {seed}")
    return [
        f"it is a {chooser.choice(WORDS[label])} and {chooser.choice(WORDS[label])} thing to see"
        for _ in range(count)
    ]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prepare(*arguments, expect=0, script="prepare_classification") -> str:
    done = tools.run("python", tools.REPOSITORY / "scripts" / f"{script}.py", *arguments)
    assert done.returncode == expect, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two labels in three splits; empty lines, odd spaces and a line of unknown signs among them."""
    folder = tmp_path_factory.mktemp("text")
    for split, count in (("train", 40), ("valid", 12), ("test", 6)):
        for label in WORDS:
            write(folder / split / f"{label}-{split}.txt", sentences(label, count, split))
    write(folder / "train" / "bad.more.txt", ["", "a  dull   thing", "", "☃ ☃"])
    return folder


@pytest.fixture(scope="module")
def vocabulary(text):
    """The data of a language model on the same text."""
    folder = text.parent / "lm"
    source = ("--text", text / "train", "--output", folder, "--vocab-size", "288", "--workers", "1")
    prepare(*source, script="prepare_lm")
    return folder


@pytest.fixture(scope="module")
def data(text, vocabulary):
    folder = text.parent / "data"
    printed = prepare("--text", text, "--data", vocabulary, "--output", folder, "--workers", "1")
    assert "prepared" in printed
    assert "train with --num-classes 2 --init-token 0" in printed
    return folder


def read(data, split, part="input0") -> list:
    dictionary = Dictionary.load(str(data / part / "dict.txt"))
    rows = data_utils.load_indexed_dataset(str(data / part / split), dictionary)
    assert all(row[-1] == dictionary.eos() for row in rows)
    return [[dictionary[token] for token in row[:-1]] for row in rows]


def content(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_data_hold_every_line_with_its_label(text, vocabulary, data):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / "sentencepiece.bpe.model"))
    for split in ("train", "valid", "test"):
        expected = [
            (label, " ".join(line.split()))
            for label in sorted(WORDS)
            for path in sorted((text / split).glob(f"{label}*"))
            for line in path.read_text().splitlines()
            if line
        ]
        labels = [label for (label,) in read(data, split, "label")]
        found = list(zip(labels, map(processor.decode, read(data, split)), strict=True))
        assert found == expected
    assert (data / "input0" / "dict.txt").read_bytes() == (vocabulary / "dict.txt").read_bytes()
    assert (data / "label" / "dict.txt").read_text() == "bad 1\ngood 1\n"


def test_the_record_counts_what_the_data_hold(data):
    record = json.loads((data / "prepare.json").read_text())
    assert record["options"]["labels"] == ["bad", "good"]
    for split, counts in record["splits"].items():
        rows = read(data, split)
        assert counts["examples"] == len(rows) == sum(counts["labels"].values())
        assert counts["tokens"] == sum(len(row) + 1 for row in rows)
        assert counts["longest"] == max(len(row) + 1 for row in rows)


def test_a_second_run_does_nothing_and_another_place_gives_the_same_bytes(text, vocabulary, data, tmp_path):
    before = content(data)
    arguments = ("--text", text, "--data", vocabulary, "--output")
    assert "already prepared" in prepare(*arguments, data)
    assert content(data) == before
    prepare(*arguments, tmp_path / "again", "--workers", "2")
    assert content(tmp_path / "again") == before
    message = prepare(*arguments, data, "--balance", expect=2)
    assert "holds another text or was made with other options" in message
    assert content(data) == before


def test_a_table_cuts_files_into_passages_that_lose_and_share_nothing(text, vocabulary, tmp_path):
    for label in WORDS:
        write(tmp_path / f"{label}.txt", sentences(label, 70 if label == "bad" else 50))
    rows = [f"train,{label},{label}.txt" for label in WORDS]
    rows += [f"valid,{label},{text}/valid/{label}-valid.txt" for label in WORDS]
    write(tmp_path / "table.csv", ["split,label,file", *rows])
    arguments = ("--text", tmp_path, "--table", tmp_path / "table.csv", "--data", vocabulary)
    prepare(*arguments, "--output", tmp_path / "data", "--passage", "34", "--workers", "1")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "sentencepiece.bpe.model"))
    labels, passages = read(tmp_path / "data", "train", "label"), read(tmp_path / "data", "train")
    assert {len(passage) for passage in passages} == {32}
    for label in WORDS:
        lines = (tmp_path / f"{label}.txt").read_text().splitlines()
        tokens = [token for line in lines for token in (*processor.encode(line, out_type=str), "</s>")]
        own = [passage for of, passage in zip(labels, passages, strict=True) if of == [label]]
        assert [token for passage in own for token in passage] == tokens[: len(tokens) // 32 * 32]
    counts = {label: labels.count([label]) for label in WORDS}
    assert counts["bad"] > counts["good"]
    fewer = ("--passage", "34", "--skip", "1", "--balance", "--workers", "1")
    prepare(*arguments, "--output", tmp_path / "balanced", *fewer)
    balanced, rows = read(tmp_path / "balanced", "train", "label"), read(tmp_path / "balanced", "train")
    assert [balanced.count([label]) for label in WORDS] == 2 * [counts["good"] - 1]
    assert all(row in passages for row in rows)
    firsts = [passages[labels.index([label])] for label in WORDS]
    assert not any(row in firsts for row in rows)
    assert len(set(map(tuple, rows))) == len(rows)


def test_a_line_of_any_length_is_one_example(text, vocabulary, tmp_path):
    for split in ("train", "valid"):
        write(tmp_path / "text" / split / "long.txt", [" ".join(["lovely"] * 20000)])
        write(tmp_path / "text" / split / "short.txt", ["a lovely thing"])
    prepare("--text", tmp_path / "text", "--data", vocabulary, "--output", tmp_path / "data")
    lengths = [len(row) for row in read(tmp_path / "data", "train")]
    assert len(lengths) == 2
    assert max(lengths) >= 20000


MISTAKES = {
    "no vocabulary": (("--data", "{text}"), "has no dict.txt: give a folder from prepare_lm.py"),
    "no such folder": (("--text", "{text}/nowhere"), "nowhere/train: no such file or folder"),
    "a short passage": (("--passage", "3"), "--passage 3 is not allowed; allowed: 8 or more"),
    "a negative skip": (("--skip", "-1"), "--skip -1 is not allowed"),
    "a passage that nothing fills": (("--passage", "9999"), "there is no passage of 9999 tokens in it"),
    "everything skipped": (("--skip", "500"), "there is no line in it behind --skip 500"),
    "a foreign folder": (("--output", "{text}"), "was not made by this script"),
}
TABLES = {
    "columns": (["a,b,c"], "first line must be split,label,file"),
    "split": (["split,label,file", "dev,good,train/good-train.txt"], "line 2: split 'dev' is unknown"),
    "file": (["split,label,file", "train,good,nowhere.txt"], "line 2: there is no file .*nowhere.txt"),
    "twice": (["split,label,file", *2 * ["train,good,train/good-train.txt"]], "line 3: .*stands there twice"),
    "one label": (
        ["split,label,file", "train,good,train/good-train.txt", "valid,good,valid/good-valid.txt"],
        "only label is 'good'; at least two",
    ),
    "no valid": (["split,label,file", "train,good,train/good-train.txt"], "no file in the split 'valid'"),
    "other labels": (
        ["split,label,file", "train,good,train/good-train.txt", "valid,bad,valid/bad-valid.txt"],
        "files of the same labels; only one has: bad, good",
    ),
    "two words": (
        [
            *("split,label,file", "train,a b,train/good-train.txt", "valid,a b,valid/good-valid.txt"),
            *("train,c,train/bad-train.txt", "valid,c,valid/bad-valid.txt"),
        ],
        "label 'a b' is not allowed; allowed: one word",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(text, vocabulary, tmp_path, name):
    words, message = MISTAKES[name]
    arguments = ("--text", text, "--data", vocabulary, "--output", tmp_path / "data", "--workers", "1")
    printed = prepare(*arguments, *(word.format(text=text) for word in words), expect=2)
    assert re.search(message, printed), printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", TABLES)
def test_a_mistake_in_a_table_is_named_with_its_line(text, vocabulary, tmp_path, name):
    lines, message = TABLES[name]
    write(tmp_path / "table.csv", lines)
    options = tools.load_script("prepare_classification")
    arguments = ["--text", text, "--data", vocabulary, "--output", tmp_path / "data"]
    parsed = options._parser().parse_args([*map(str, arguments), "--table", str(tmp_path / "table.csv")])
    with pytest.raises(ValueError, match=message):
        options.prepare(parsed)
    assert not (tmp_path / "data").exists()


def test_a_model_of_the_same_vocabulary_learns_the_labels_and_tells_them(vocabulary, data, tmp_path):
    masked = ("--task", "masked_lm", "--criterion", "masked_lm", "--tokens-per-sample", "32")
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    tools.call("train", vocabulary, *SIZES, *masked, "--save-dir", pretrained, "--max-update", 5)
    classes = (
        *("--task", "sentence_prediction", "--criterion", "sentence_prediction", "--num-classes", "2"),
        *("--init-token", "0", "--max-positions", "64", "--classification-head-name", "mood"),
        *("--restore-file", pretrained / "checkpoint_last.pt"),
        *("--reset-optimizer", "--reset-dataloader", "--reset-meters"),
    )
    printed = tools.call("train", data, *SIZES, *classes, "--save-dir", tuned, "--max-update", 80)
    assert float(re.findall(r'"valid_accuracy": "([\d.]+)"', printed)[-1]) > 90
    hub = FlashMaskedLM.from_pretrained(str(tuned), "checkpoint_last.pt", str(data))
    labels = hub.task.label_dictionary
    for sentence, expected in (("it is a lovely and glad thing", "good"), ("a poor and dull thing", "bad")):
        with torch.no_grad():
            best = int(hub.predict("mood", hub.encode(sentence)).argmax())
        assert labels[best + labels.nspecial] == expected
        assert hub.decode(hub.encode(sentence)) == sentence
    for filled, _, word in hub.fill_mask("it is a <mask> thing", topk=4):
        assert filled in (f"it is a {word} thing", f"it is a{word} thing")
    assert hub.decode(hub.encode("it is a <mask> thing")) == "it is a <mask> thing"
