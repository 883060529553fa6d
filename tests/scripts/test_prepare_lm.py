"""Proves that prepare_lm.py turns any text into exact fairseq data, repeatably, and spoils no folder."""

import gzip
import importlib
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import sentencepiece

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ENDS = ("", "der", "lé")
WORDS = [a + b + c for a in ("ri", "sto", "wal", "un") for b in ("ver", "ne", "king") for c in ENDS]


def run(*arguments, expect=0):
    """Runs the script; returns what it wrote."""
    command = [sys.executable, SCRIPTS / "prepare_lm.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def sentences(count, seed=0):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(4, 12))) + "." for _ in range(count)]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(data, split):
    """The text of a split, read back from the binary data with fairseq's own classes."""
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(data / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(data / split), dictionary)
    assert not any((line == dictionary.unk()).any() for line in dataset)
    assert all(line[-1] == dictionary.eos() for line in dataset)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / "sentencepiece.bpe.model"))
    return [processor.decode([dictionary[i] for i in line[:-1]]) for line in dataset]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of 400 lines, and the data made from it."""
    folder = tmp_path_factory.mktemp("a corpus")
    lines = ["a rare ☃ and a tab\there and   spaces \u3000 ﬁne… <pad> </s> <unk>", *sentences(399)]
    text = folder / "my text.txt"
    text.write_text("\n\n".join(lines), encoding="utf-8")
    run("--text", text, "--output", folder / "data", "--vocab-size", 320, "--workers", 1)
    return text, folder / "data", lines


def test_the_data_hold_the_text_and_nothing_else(corpus):
    _, data, lines = corpus
    back = {split: decoded(data, split) for split in ("train", "valid", "test")}
    assert back["train"] + back["valid"] + back["test"] == [" ".join(line.split()) for line in lines]
    assert [len(back[split]) for split in ("train", "valid", "test")] == [360, 20, 20]
    assert set(content(data)) == {
        *("dict.txt", "prepare.json", "sentencepiece.bpe.model"),
        *(f"{split}.{end}" for split in ("train", "valid", "test") for end in ("bin", "idx")),
    }


def test_the_record_counts_what_the_data_hold(corpus):
    _, data, _ = corpus
    splits = json.loads((data / "prepare.json").read_text())["splits"]
    for split, counts in splits.items():
        lines = decoded(data, split)
        assert counts["lines"] == len(lines)
        assert counts["words"] == sum(len(line.split()) for line in lines)
        assert counts["bytes"] == sum(len(line.encode()) + 1 for line in lines)
        assert counts["tokens"] == (data / f"{split}.bin").stat().st_size // 2
        assert counts["documents"] == 1


def test_new_text_never_needs_an_unknown_symbol(corpus):
    from fairseq.data import Dictionary

    _, data, _ = corpus
    dictionary = Dictionary.load(str(data / "dict.txt"))
    assert len(dictionary) == 320
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / "sentencepiece.bpe.model"))
    pieces = processor.encode("Ωmega 漢字 \x00 \x85 \u2028 <s> <pad> </s> <unk> ☃ ▁", out_type=str)
    encoded = dictionary.encode_line(" ".join(pieces), add_if_not_exist=False, append_eos=False)
    assert not (encoded <= dictionary.unk()).any()  # 0 to 3 are <s>, <pad>, </s>, <unk>


def test_the_same_text_gives_the_same_bytes_with_any_number_of_workers(corpus, tmp_path):
    text, data, _ = corpus
    run("--text", text, "--output", tmp_path / "again", "--vocab-size", 320, "--workers", 3)
    assert content(tmp_path / "again") == content(data)


def test_the_vocabulary_of_a_sample_is_another_and_the_text_stays_whole(corpus, tmp_path):
    text, data, _ = corpus
    small = ("--vocab-size", 320, "--sample-bytes", 12_000)
    run("--text", text, "--output", tmp_path / "data", *small)
    records = [json.loads((folder / "prepare.json").read_text()) for folder in (data, tmp_path / "data")]
    assert (data / "dict.txt").read_bytes() != (tmp_path / "data" / "dict.txt").read_bytes()
    assert len({record["splits"]["train"]["bytes"] for record in records}) == 1
    assert [record["options"].get("sample_bytes") for record in records] == [None, 12_000]
    assert "already prepared" in run("--text", text, "--output", tmp_path / "data", *small)


def test_a_second_run_reuses_the_data(corpus):
    text, data, _ = corpus
    before = (data / "train.bin").stat().st_mtime_ns
    assert "already prepared" in run("--text", text, "--output", data, "--vocab-size", 320)
    assert (data / "train.bin").stat().st_mtime_ns == before


def test_other_data_are_never_overwritten_unasked(corpus, tmp_path):
    text, data, _ = corpus
    before = content(data)
    message = run("--text", text, "--output", data, "--vocab-size", 330, expect=2)
    assert "--overwrite" in message
    assert content(data) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        assert "--output" in run("--text", text, "--output", mine, "--vocab-size", 320, *more, expect=2)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_data_but_no_file_from_elsewhere(corpus, tmp_path):
    text, original, _ = corpus
    other = tmp_path / "other.txt"
    other.write_text("\n".join(sentences(300, seed=5)))
    data = shutil.copytree(original, tmp_path / "data")
    run("--text", other, "--output", data, "--vocab-size", 300, "--overwrite")
    assert len((data / "dict.txt").read_text().splitlines()) == 296
    (data / "checkpoint_best.pt").write_text("trained for days")
    message = run("--text", text, "--output", data, "--vocab-size", 320, "--overwrite", expect=2)
    assert "checkpoint_best.pt" in message
    assert (data / "checkpoint_best.pt").exists()


def test_damaged_data_are_not_reused(corpus, tmp_path):
    text, data, _ = corpus
    shutil.copytree(data, tmp_path / "data")
    with (tmp_path / "data" / "train.bin").open("r+b") as stream:
        stream.truncate(100)
    assert "damaged" in run("--text", text, "--output", tmp_path / "data", "--vocab-size", 320, expect=2)


@pytest.mark.parametrize(
    "name", ["t.txt", "t.gz", "t.xz", "t.tar", "t.tar.gz", "t.tgz", "t.tar.xz", "folder"]
)
def test_every_kind_of_file_gives_the_same_lines(tmp_path, read_text, name):
    raw, path = "\ufeffone\r\n\n two\t words \nlast".encode(), tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "text.txt").write_bytes(raw)
        (path / ".hidden").write_bytes(b"\xff")
    elif name.startswith(("t.tar", "t.tgz")):
        kind = {".tar": "", ".gz": "gz", ".tgz": "gz", ".xz": "xz"}[path.suffix]
        with tarfile.open(path, f"w:{kind}") as archive:
            _add(archive, "text.txt", raw)
            _add(archive, "._text.txt", b"\xff")
            archive.addfile(_link("link.txt", "/etc/passwd"))
    else:
        path.write_bytes({"t.gz": gzip.compress, "t.xz": lzma.compress, "t.txt": bytes}[name](raw))
    (file,) = read_text.find_text_files([path], "--text")
    found = [list(lines) for _, lines in read_text.read_documents(file)]
    assert found == [["one", "two words", "last"]]


@pytest.fixture
def read_text(monkeypatch):
    """The script's module that reads."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("text.read")


def _add(archive, name, raw):
    member = tarfile.TarInfo(name)
    member.size = len(raw)
    archive.addfile(member, io.BytesIO(raw))


def _link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_an_archive_writes_nothing_to_disk(tmp_path, read_text):
    path = tmp_path / "inner" / "evil.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        _add(archive, "../escaped.txt", b"some text")
    (found,) = [list(lines) for _, lines in read_text.read_documents(read_text.TextFile(path, "evil.tar"))]
    assert found == ["some text"]
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_folders_named_after_splits_are_the_splits(tmp_path):
    for split, seed in (("train", 1), ("val", 2), ("test", 3)):
        for number in range(2):
            path = tmp_path / "books" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([f"Part {split}.", *sentences(150, seed + number)]))
    run("--text", tmp_path / "books", "--output", tmp_path / "data", "--vocab-size", 300)
    for split in ("train", "valid", "test"):
        lines = decoded(tmp_path / "data", split)
        name = {"valid": "val"}.get(split, split)
        assert [line for line in lines if line.startswith("Part")] == [f"Part {name}."] * 2
        assert lines[151] == ""  # fairseq's mark between two documents
    message = run("--text", tmp_path / "books", "--output", tmp_path / "x", "--valid-fraction", 0.1, expect=2)
    assert "--valid-fraction 0.1" in message


def test_whole_documents_are_held_out_where_there_are_many(tmp_path):
    for number in range(40):
        path = tmp_path / "books" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([f"Book {number}.", *sentences(20, number)]))
    run("--text", tmp_path / "books", "--output", tmp_path / "data", "--vocab-size", 310)
    titles = {}
    for split in ("train", "valid", "test"):
        lines = decoded(tmp_path / "data", split)
        titles[split] = [line for line in lines if line.startswith("Book")]
        assert len(lines) == 22 * len(titles[split]) - 1
    assert [len(titles[split]) for split in ("train", "valid", "test")] == [36, 2, 2]
    assert len({*titles["train"], *titles["valid"], *titles["test"]}) == 40


def test_given_files_are_the_splits(tmp_path):
    for name, seed in (("text", 1), ("valid", 2), ("test", 3)):
        (tmp_path / name).write_text("\n".join(sentences(200, seed)))
    options = ["--valid", tmp_path / "valid", "--test", tmp_path / "test", "--vocab-size", 300]
    run("--text", tmp_path / "text", "--output", tmp_path / "data", *options)
    assert decoded(tmp_path / "data", "train") == sentences(200, 1)
    assert decoded(tmp_path / "data", "valid") == sentences(200, 2)
    assert decoded(tmp_path / "data", "test") == sentences(200, 3)


def test_a_long_line_is_cut_at_a_space_and_never_inside_a_character(tmp_path, monkeypatch, read_text):
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 64)
    text = " ".join(sentences(20)) + "\n" + "é" * 101 + "漢" * 77
    (tmp_path / "text").write_text(text, encoding="utf-8")
    documents = read_text.read_documents(read_text.TextFile(tmp_path / "text", "text"))
    pieces = [line for _, lines in documents for line in lines]
    assert max(len(piece.encode()) for piece in pieces) <= 2 * 64
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert " ".join(pieces).startswith(" ".join(sentences(20)) + " é")


BAD = {
    "a path that is missing": (["--text", "nowhere.txt"], "nowhere.txt"),
    "an empty file": (["--text", "empty.txt"], "no text"),
    "an empty folder": (["--text", "nothing"], "no file"),
    "a text that is not UTF-8": (["--text", "latin.txt"], "byte 406"),
    "a UTF-16 text": (["--text", "utf16.txt"], "iconv"),
    "a damaged archive": (["--text", "cut.tar.gz"], "cut.tar.gz"),
    "a file that is no archive": (["--text", "fake.xz"], "fake.xz"),
    "a tiny text": (["--text", "tiny.txt"], "'valid'"),
    "a vocabulary too large": (["--text", "good.txt", "--vocab-size", "8000"], "at most"),
    "a vocabulary too small": (["--text", "good.txt", "--vocab-size", "100"], "at least"),
    "no workers": (["--text", "good.txt", "--workers", "-1"], "--workers -1"),
    "no sample": (["--text", "good.txt", "--sample-bytes", "0"], "--sample-bytes 0 must be positive"),
    "no vocabulary": (["--text", "good.txt", "--vocab-size", "0"], "--vocab-size 0"),
    "a fraction of one": (["--text", "good.txt", "--valid-fraction", "1"], "--valid-fraction 1.0"),
    "a negative fraction": (["--text", "good.txt", "--test-fraction", "-0.1"], "--test-fraction -0.1"),
    "fractions of everything": (["--text", "good.txt", "--test-fraction", "0.96"], "sum"),
    "two sources": (["--text", "good.txt", "--valid", "a", "--valid-fraction", "0.1"], "not allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_gets_one_clear_sentence(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    good = "\n".join(sentences(200)).encode()
    Path("nothing").mkdir()
    Path("empty.txt").write_text(" \n\n \t\n")
    Path("latin.txt").write_bytes(b"a" * 400 + b"\n12345\xe9\n")
    Path("utf16.txt").write_text("some text", encoding="utf-16")
    Path("tiny.txt").write_text("one line\ntwo lines\n")
    Path("good.txt").write_bytes(good)
    Path("fake.xz").write_bytes(good)
    with tarfile.open("whole.tar.gz", "w:gz") as archive:
        _add(archive, "text.txt", os.urandom(5000).hex().encode())
    Path("cut.tar.gz").write_bytes(Path("whole.tar.gz").read_bytes()[:3000])
    arguments, expected = BAD[case]
    assert expected in run(*arguments, "--output", "data", expect=2)
    assert not Path("data").exists()
    assert not Path("data.partial").exists()


def test_a_killed_run_leaves_nothing_that_looks_finished(corpus, tmp_path):
    text, data, _ = corpus
    output = tmp_path / "data"
    command = [sys.executable, SCRIPTS / "prepare_lm.py"]
    command += ["--text", text, "--output", output, "--vocab-size", "320"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = output.with_name("data.partial")
    while not (partial / "log").exists():
        assert process.poll() is None
        time.sleep(0.01)
    # while the first works, which is held so that it does, a second one must not disturb it
    process.send_signal(signal.SIGSTOP)
    assert "another run" in run("--text", text, "--output", output, "--vocab-size", 320, expect=2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    while "another run" in _try(command):  # the killed run's fairseq-preprocess still holds the folder
        time.sleep(0.5)
    assert content(output) == content(data)
    assert not partial.exists()


def _try(command):
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a line\n")
    assert "caf\\xe9.txt': the name is not UTF-8" in run(
        "--text", folder, "--output", tmp_path / "x", expect=2
    )
