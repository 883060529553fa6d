"""Proves that damaged data is refused by its file and row, and that fairseq's own slips lose no row."""

import shutil
import struct

import numpy
import pytest
import torch
from fairseq.data import Dictionary, TokenBlockDataset, data_utils, indexed_dataset

from support import tools

EVALUATION = ("--user-dir", tools.USER_DIR, "--cpu", "--task", "language_modeling")
HEADER = struct.calcsize("<9sQBQ")


def write_data(path, rows, dtype=numpy.uint16):
    """Writes rows of ids as fairseq-preprocess does."""
    builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for row in rows:
        builder.add_item(torch.tensor(row))
    builder.finalize(f"{path}.idx")
    return str(path)


def dictionary(words=10):
    words_and_specials = Dictionary()
    for number in range(words - len(words_and_specials)):
        words_and_specials.add_symbol(f"word{number}")
    return words_and_specials


def change(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("wrong", [10, 4000, -1])
def test_an_id_that_is_not_in_the_dictionary_is_named_with_file_and_row(tmp_path, wrong):
    path = write_data(tmp_path / "train", [[4, 5, 2], [6, wrong, 2]], numpy.int32)
    rows = data_utils.load_indexed_dataset(path, dictionary(10), "mmap")
    assert rows[0].tolist() == [4, 5, 2]
    with pytest.raises(ValueError, match=rf"train\.bin, row 1: id {wrong} .*10 words; allowed: 0 to 9"):
        rows[1]


def test_a_word_that_is_added_to_the_dictionary_later_is_allowed(tmp_path):
    words = dictionary(10)
    rows = data_utils.load_indexed_dataset(write_data(tmp_path / "train", [[10]]), words, "mmap")
    words.add_symbol("<mask>")
    assert rows[0].tolist() == [10]


def test_the_parts_of_a_split_are_named_apart(tmp_path):
    write_data(tmp_path / "train", [[4]])
    path = write_data(tmp_path / "train1", [[5], [77]]).removesuffix("1")
    rows = data_utils.load_indexed_dataset(path, dictionary(10), "mmap", combine=True)
    assert [rows[0].tolist(), rows[1].tolist()] == [[4], [5]]
    with pytest.raises(ValueError, match=r"train1\.bin, row 1: id 77"):
        rows[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_names_the_row(data_bin, tmp_path, workers):
    shutil.copytree(data_bin, tmp_path / "bin")
    change(tmp_path / "bin" / "train.bin", 10, b"\xff\xff")
    with pytest.raises(ValueError, match=r"train\.bin, row 0: id 65535 is not in the dictionary"):
        tools.train(tmp_path / "bin", tmp_path / "save", "--num-workers", workers, updates=200)


def spoiled_indexes(path):
    """By name: what to write where in the index of three rows of two ids, or how many bytes to leave."""
    return {
        "negative size": (HEADER + 4, struct.pack("<i", -2)),
        "larger size": (HEADER + 4, struct.pack("<i", 5)),
        "smaller size": (HEADER + 8, struct.pack("<i", 1)),
        "place beyond the end": (HEADER + 12 + 16, struct.pack("<q", 10**6)),
        "negative place": (HEADER + 12, struct.pack("<q", -4)),
        "overlap": (HEADER + 12 + 8, struct.pack("<q", 0)),
        "more rows": (HEADER - 8, struct.pack("<Q", 4)),
        "fewer rows": (HEADER - 8, struct.pack("<Q", 2)),
        "very many rows": (HEADER - 8, struct.pack("<Q", 2**60)),
        "another type": (HEADER - 9, b"\x05"),
        "no type": (HEADER - 9, b"\x63"),
        "another version": (9, b"\x02"),
        "cut": HEADER + 20,
        "cut in its header": 12,
    }


@pytest.mark.parametrize("name", spoiled_indexes(None))
def test_an_index_that_does_not_fit_its_data_is_refused(tmp_path, name):
    path = write_data(tmp_path / "train", [[4, 5], [6, 7], [8, 9]])
    spoil = spoiled_indexes(path)[name]
    if isinstance(spoil, tuple):
        change(f"{path}.idx", *spoil)
    else:
        with open(f"{path}.idx", "r+b") as file:
            file.truncate(spoil)
    with pytest.raises(ValueError, match=r"train\.idx is damaged, or not the index of .*train\.bin"):
        data_utils.load_indexed_dataset(path, dictionary(), "mmap")


@pytest.mark.parametrize("tail", [-2, 2])
def test_data_that_is_cut_or_longer_than_its_index_is_refused(tmp_path, tail):
    path = write_data(tmp_path / "train", [[4, 5], [6, 7]])
    with open(f"{path}.bin", "r+b") as file:
        file.truncate(8 + tail)
    with pytest.raises(ValueError, match=rf"2 rows end at byte 8, and the data at {8 + tail}"):
        data_utils.load_indexed_dataset(path, dictionary(), "mmap")


@pytest.mark.parametrize("arguments", [(), ("--carry-state",)])
def test_evaluation_refuses_a_damaged_index(data_bin, checkpoint, tmp_path, arguments):
    shutil.copytree(data_bin, tmp_path / "bin")
    change(tmp_path / "bin" / "test.idx", HEADER + 8, struct.pack("<i", -3))
    task = ("--task", "flash_language_modeling", *arguments)
    base = (tmp_path / "bin", "--user-dir", tools.USER_DIR, "--path", checkpoint, "--cpu", "--batch-size", 2)
    with pytest.raises(ValueError, match=r"test\.idx is damaged.*row 2 has -3 tokens"):
        tools.call("eval-lm", *base, *task, "--gen-subset", "test")


def test_an_index_of_parts_of_more_than_two_gigabytes_is_right(tmp_path):
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=numpy.uint16)
    # As merge_file_ leaves them.
    builder._sizes = list(numpy.array([2**30, 2**30, 7], dtype=numpy.int32))
    builder.finalize(str(tmp_path / "x.idx"))
    places = numpy.fromfile(tmp_path / "x.idx", "<i8", offset=HEADER + 12)
    assert places.tolist() == [0, 2**31, 2**32]


@pytest.mark.parametrize("mode", ["eos", "complete", "none"])
def test_a_block_knows_its_length_however_long_it_is(mode):
    lines = [torch.full((length,), 4) for length in (70_000, 3)]
    blocks = TokenBlockDataset(
        lines, [70_000, 3], block_size=50_000, pad=1, eos=2, break_mode=mode, include_targets=False
    )
    assert [len(blocks[number]) for number in range(len(blocks))] == blocks.sizes.tolist()


@pytest.mark.parametrize("content", [b"", b"XXXX", b"once upon a time\n" * 9])
def test_an_index_of_another_kind_is_named(data_bin, checkpoint, tmp_path, content):
    shutil.copytree(data_bin, tmp_path / "bin")
    (tmp_path / "bin" / "test.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"bin/test\.idx is damaged, or no index"):
        tools.call("eval-lm", tmp_path / "bin", *EVALUATION, "--path", checkpoint, "--gen-subset", "test")


@pytest.mark.parametrize("line", ["the", "the 1\nthe 2", "the one", "a b c"])
def test_a_dictionary_that_is_none_is_named(data_bin, checkpoint, tmp_path, line):
    shutil.copytree(data_bin, tmp_path / "bin")
    (tmp_path / "bin" / "dict.txt").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"bin/dict\.txt is no dictionary: [^\n]*; allowed: a word and its"):
        tools.call("eval-lm", tmp_path / "bin", *EVALUATION, "--path", checkpoint, "--gen-subset", "test")
