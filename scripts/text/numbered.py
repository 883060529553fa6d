"""Data of numbered pieces whose items are whole documents: written as they are cut, and read again."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy
import sentencepiece
import torch
from fairseq.data import data_utils, indexed_dataset
from tqdm import tqdm

from text.folder import RECORD
from text.pieces import MODEL
from text.split import SPLITS

__all__ = [
    "EOS",
    "LM_FILES",
    "DocumentWriter",
    "documents_of",
    "encode_documents",
    "lines_of",
    "tokens_of",
]

#: The files of a folder of data for language modeling.
LM_FILES = {"dict.txt", MODEL, RECORD, *(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx"))}

#: The index of ``</s>``, and of the first piece, in both sentencepiece's model and fairseq's dictionary.
EOS, FIRST_PIECE = 2, 4
#: Lines that sentencepiece cuts at a time.
AT_ONCE = 1000


class DocumentWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx``: an item a document, and between two the item ``</s>``.

    As prepare_lm.py's data, but that an item is a document and not a line: the size of an index, and the
    memory for making one, come from the number of items.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._data = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=vocab_size)
        self.tokens = 0

    def add(self, document: numpy.ndarray) -> None:
        """Adds a document, whose lines end with ``</s>``."""
        for item in ([EOS], document) if self.tokens else (document,):
            self._data.add_item(torch.as_tensor(item, dtype=torch.int32))
            self.tokens += len(item)

    def close(self) -> None:
        """Writes the index."""
        self._data.finalize(f"{self._prefix}.idx")


def encode_documents(model: Path, text: Path, prefix: Path, total: int, workers: int) -> int:
    """Cuts a text into numbered pieces, and deletes it.

    Args:
        model: Of :func:`text.pieces.learn_pieces`, whose numbers are those of the dictionary beside it.
        text: File of lines, with an empty one between documents.
        prefix: Of the data.
        total: Lines, for the progress bar.
        workers: Threads.

    Returns:
        Tokens, an ``</s>`` a line among them.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    writer, open_document = DocumentWriter(prefix, processor.get_piece_size()), []
    bar = tqdm(total=total, desc=f"encoding {text.name}", unit="line", disable=None)
    with text.open(encoding="utf-8", newline="\n") as source, bar:
        while lines := [line.rstrip("\n") for line in islice(source, AT_ONCE)]:
            for pieces in processor.encode(lines, num_threads=workers):
                if pieces:
                    open_document.append([*pieces, EOS])
                else:
                    writer.add(_joined(open_document))
                    open_document = []
            bar.update(len(lines))
    writer.add(_joined(open_document))
    writer.close()
    text.unlink()
    return writer.tokens


def _joined(lines: list[list[int]]) -> numpy.ndarray:
    tokens = numpy.fromiter(chain.from_iterable(lines), numpy.int32)
    if tokens.min() < EOS or ((tokens > EOS) & (tokens < FIRST_PIECE)).any():
        raise RuntimeError("sentencepiece gave a piece that fairseq's dictionary has no word for")
    return tokens


def documents_of(data: Path, split: str) -> tuple[Any, numpy.ndarray]:
    """The documents of a split, whether an item is a line or a document.

    Returns:
        The indexed items, and for each document where its items begin and end, (documents, 2); the ``</s>``
        between documents is in none.

    Raises:
        ValueError: there is no such split.
    """
    items = data_utils.load_indexed_dataset(str(data / split), None)
    if items is None:
        raise ValueError(f"--data {data} has no split {split!r}")
    between = [i for i in numpy.flatnonzero(items.sizes == 1).tolist() if items[i][0] == EOS]
    borders = numpy.array([[0, *(i + 1 for i in between)], [*between, len(items)]]).T
    return items, borders[borders[:, 0] < borders[:, 1]]


def tokens_of(items: Any, borders: numpy.ndarray) -> numpy.ndarray:
    """The tokens of one document, by its row of :func:`documents_of`."""
    return numpy.concatenate([items[index].numpy() for index in range(*borders)])


def lines_of(document: numpy.ndarray) -> Iterator[list[int]]:
    """The pieces of each line of a document, without ``</s>``."""
    ends = numpy.flatnonzero(document == EOS)
    yield from (part[part != EOS].tolist() for part in numpy.split(document, ends + 1) if len(part))
