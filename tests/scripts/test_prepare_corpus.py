"""Proves that prepare_corpus.py makes exact data without leaks or repeats, and cut_corpus.py a part."""

import json
import random
import tarfile
from itertools import chain

import numpy
import pytest
import sentencepiece
from fairseq.data import Dictionary, data_utils

import cut_corpus
import prepare_corpus
from text.documents import Repeats, paragraphs_of_book, shingles

WORDS = [
    a + b + c for a in ("ri", "sto", "wal", "un") for b in ("ver", "ne", "king") for c in ("", "der", "lé")
]
HEADER = "The Project Gutenberg EBook of {0}\n\n*** START OF THIS PROJECT GUTENBERG EBOOK {0} ***\n\n\n"
FOOTER = "\n\nEnd of the Project Gutenberg EBook\n\n*** END OF THIS PROJECT GUTENBERG EBOOK ***\n\nlicence\n"


def paragraphs(seed, count=40):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(8, 30))) for _ in range(count)]


def book(title, text):
    """A file as Gutenberg has it: paragraphs over several lines, an empty line behind it, and \\r\\n."""
    broken = [paragraph.replace(" ", "\n", 3) for paragraph in text]
    return (HEADER.format(title) + "\n\n".join(broken) + FOOTER).replace("\n", "\r\n")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Nine authors of three books; 0 also has a repeat of one of 1, and 8 of one that is to be excluded."""
    folder = tmp_path_factory.mktemp("books")
    texts = {f"A{a}/b{b}.txt": paragraphs(10 * a + b) for a in range(9) for b in range(3)}
    texts["A0/again.txt"] = ["A new title page", *texts["A1/b0.txt"]]
    texts["A8/under another name.txt"] = texts["A7/b2.txt"][:30] + paragraphs("other", 10)
    texts["A3/large.txt"] = paragraphs("large", 300)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(book(name, text), encoding="utf-8", newline="")
    (folder / "readme.md").write_text("no book")
    exclude = folder.parent / "exclude.txt"
    exclude.write_text("# why\nA7/b2.txt\t12/13\n")
    return folder, exclude, texts


def call(kind, *arguments):
    words = (kind, "--vocab-size", 300, "--held-out-groups", 2, "--workers", 1, *arguments)
    prepare_corpus.main([*map(str, words)])


@pytest.fixture(scope="module")
def data(books, tmp_path_factory):
    folder, exclude, _ = books
    output = tmp_path_factory.mktemp("prepared") / "data"
    call("gutenberg", "--text", folder, "--exclude", exclude, "--output", output)
    return output


def decoded(data, split):
    """The documents of a split as lists of lines, read with fairseq's and sentencepiece's classes alone."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    items = data_utils.load_indexed_dataset(str(data / split), dictionary)
    tokens = numpy.concatenate([items[i].numpy() for i in range(len(items))])
    assert tokens.min() >= dictionary.eos()
    assert not (tokens == dictionary.unk()).any()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / "sentencepiece.bpe.model"))
    documents, line = [[]], []
    for token in tokens.tolist():
        if token != dictionary.eos():
            line.append(dictionary[token])
        elif line:
            documents[-1].append(processor.decode(line))
            line = []
        else:
            documents.append([])
    assert not line
    return documents, tokens


def record(data):
    return json.loads((data / "prepare.json").read_text())


def test_the_data_hold_whole_paragraphs_of_each_author_in_one_split_and_nothing_twice(books, data):
    _, _, texts = books
    found = {split: decoded(data, split)[0] for split in ("train", "valid", "test")}
    groups = record(data)["groups"]
    assert len(groups["valid"]) == len(groups["test"]) == 2
    assert sorted(chain(*groups.values())) == sorted({name.split("/")[0] for name in texts})
    gone = {"A7/b2.txt", "A8/under another name.txt"}
    twins = {"A0/again.txt", "A1/b0.txt"}
    for split, documents in found.items():
        own = [text for name, text in texts.items() if name.split("/")[0] in groups[split]]
        assert all(document in own for document in documents)
    everything = list(chain(*found.values()))
    assert len(everything) == len(texts) - len(gone) - 1
    for name, text in texts.items():
        assert (text in everything) or name in gone | twins
    assert sum(texts[name] in everything for name in twins) == 1
    assert not any(texts[name] in everything for name in gone)


def test_the_record_counts_what_the_data_hold(data):
    for split, counts in record(data)["splits"].items():
        documents, tokens = decoded(data, split)
        lines = [line for document in documents for line in document]
        assert counts["documents"] == len(documents)
        assert counts["lines"] == len(lines) + len(documents) - 1 == int((tokens == 2).sum())
        assert counts["words"] == sum(len(line.split()) for line in lines)
        assert counts["bytes"] == sum(len(line.encode()) + 1 for line in lines) + len(documents) - 1
        assert counts["tokens"] == len(tokens) == (data / f"{split}.bin").stat().st_size // 2


def test_the_same_text_gives_the_same_bytes_and_a_second_run_does_nothing(books, data, tmp_path, capsys):
    folder, exclude, _ = books
    words = ("gutenberg", "--text", folder, "--exclude", exclude, "--output")
    call(*words, data)
    assert "already prepared" in capsys.readouterr().out
    call(*words, tmp_path / "again", "--workers", 3)
    for path in data.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert len(record(data)["digest"]) == 64


def test_c_files_of_an_archive_are_documents_split_by_directory(tmp_path):
    sources = {f"linux/drivers/d{d}/f{f}.c": paragraphs(f"{d} {f}", 12) for d in range(8) for f in range(3)}
    for name, lines in {**sources, "linux/drivers/d0/doc.rst": ["no code"]}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n\n\t".join(lines))
    with tarfile.open(tmp_path / "linux.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "linux", "linux")
    call("linux", "--text", tmp_path / "linux.tar.xz", "--output", tmp_path / "data")
    found = [decoded(tmp_path / "data", split)[0] for split in ("train", "valid", "test")]
    assert sorted(chain(*found)) == sorted(sources.values())
    groups = record(tmp_path / "data")["groups"]
    assert sorted(chain(*groups.values())) == [f"linux/drivers/d{d}" for d in range(8)]


def test_a_book_is_what_lies_between_the_last_header_and_the_footer():
    lines = ["intro", "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN*Ver.04*END*", "", "one", "two", "", "three"]
    assert list(paragraphs_of_book(lines)) == ["one two", "three"]
    lines = ["***START OF THE PROJECT GUTENBERG EBOOK X***", "Project Gutenberg thanks", "", "text", "",
             "End of Project Gutenberg's X, by Y", "", "licence"]  # fmt: skip
    assert list(paragraphs_of_book(lines)) == ["text"]
    assert list(paragraphs_of_book(["plain", "", "", "text"])) == ["plain", "text"]


def test_a_sample_of_pieces_is_that_of_the_words_wherever_they_stand():
    words = " ".join(paragraphs("a", 400))
    inside = shingles("other words before " + words.replace(" ", "\n") + " and behind")
    assert set(shingles(words).tolist()) <= set(inside.tolist())
    count = len(words.split()) - 11
    assert 0.7 * count / 32 < len(shingles(words)) < 1.3 * count / 32
    assert not len(shingles("too short"))


def test_repeats_are_half_of_a_document_in_its_split_and_little_in_another():
    repeats, pieces = Repeats(leak=0.1), numpy.arange(100, dtype=numpy.uint64)
    assert repeats.is_new("train", b"1", pieces)
    assert repeats.is_new("train", b"2", pieces + numpy.uint64(50))
    assert not repeats.is_new("train", b"3", pieces + numpy.uint64(49 - 50 + 2))
    assert not repeats.is_new("valid", b"5", pieces + numpy.uint64(139))
    assert repeats.is_new("valid", b"4", pieces + numpy.uint64(140))  # ten of them
    assert not repeats.is_new("valid", b"1", pieces[:0])
    assert repeats.is_new("valid", b"6", pieces[:3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--held-out-groups", 5), "allowed: 1 to 4"),
        (("--held-out-groups", 0), "--held-out-groups 0 must be at least 1"),
        (("--endings", ".gz"), "no text in files that end with .gz"),
        (("--exclude", "nothing.txt"), "there is no document A7/none.txt"),
        (("--vocab-size", 100), "--vocab-size 100 is too small"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(books, tmp_path, capsys, words, message):
    folder, _, _ = books
    (tmp_path / "nothing.txt").write_text("A7/none.txt\n")
    words = [str(tmp_path / word) if word == "nothing.txt" else str(word) for word in words]
    common = ["gutenberg", "--text", str(folder), "--output", str(tmp_path / "data")]
    with pytest.raises(SystemExit, match="2"):
        prepare_corpus.main([*common, "--held-out-groups", "2", "--vocab-size", "300", *words])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_cut_has_the_beginning_of_many_documents_and_the_same_words(data, tmp_path):
    words = ["--data", str(data), "--train-tokens", "4000", "--held-out-tokens", "1200", "--output"]
    cut_corpus.main([*words, str(tmp_path / "small")])
    for split, counts in record(tmp_path / "small")["splits"].items():
        whole, _ = decoded(data, split)
        part, tokens = decoded(tmp_path / "small", split)
        assert counts["documents"] == len(part)
        assert counts["tokens"] == len(tokens)
        assert counts["words"] == sum(len(line.split()) for document in part for line in document)
        # What follows another in the cut does in the whole, too; each is the beginning of its document.
        places = [next(i for i, d in enumerate(whole) if d[: len(p) - 1] == p[:-1]) for p in part]
        assert places == sorted(set(places))
        budget = 4000 if split == "train" else 1200
        assert len(tokens) <= budget
        assert len(part) >= min(12, len(whole))
    again = tmp_path / "again"
    cut_corpus.main([*words, str(again)])
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in again.iterdir())


def test_a_cut_that_is_large_enough_is_the_whole(data, tmp_path):
    words = [
        "--data",
        data,
        "--train-tokens",
        10**7,
        "--held-out-tokens",
        10**7,
        "--output",
        tmp_path / "all",
    ]
    cut_corpus.main([*map(str, words)])
    for name in ("train.bin", "train.idx", "valid.bin", "test.bin", "dict.txt"):
        assert (data / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert record(data)["splits"] == record(tmp_path / "all")["splits"]
