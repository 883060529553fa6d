"""Divides the documents of a corpus into train, valid and test, and writes each split as text."""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from text.read import TextFile, read_documents

__all__ = [
    "HELD_OUT",
    "SPLITS",
    "SplitWriter",
    "check_fractions",
    "held_out_fractions",
    "read_all",
    "write_splits",
]

SPLITS = ("train", "valid", "test")
HELD_OUT = 0.05
MANY_DOCUMENTS = 20  # so many that a twentieth is at least one

FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}


@dataclass
class Document:
    """What is known of a document after the first reading.

    ``role`` is the option it came from; ``split`` is None while it is to be chosen. A document that ends up
    in no split as a whole gives valid its lines from ``valid_from`` on, and test those from ``test_from`` on.
    """

    name: str
    role: str
    split: str | None
    lines: int = 0
    size: int = 0
    valid_from: int = 0
    test_from: int = 0

    def split_at(self, line: int) -> str:
        """The split of the line with that number."""
        if self.split:
            return self.split
        return "train" if line < self.valid_from else "valid" if line < self.test_from else "test"


class SplitWriter:
    """Writes one split as text, with an empty line between documents, and counts."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._document = None
        self.counts = {"documents": 0, "lines": 0, "tokens": 0, "words": 0, "bytes": 0}

    def write(self, line: str, document: object) -> None:
        """Adds a line of the document, which is told by what it is, not by what it equals."""
        if document is not self._document:
            if self._document is not None:
                self._add("")
            self._document = document
            self.counts["documents"] += 1
        self._add(line)

    def _add(self, line: str) -> None:
        self.counts["lines"] += 1
        self.counts["words"] += line.count(" ") + bool(line)
        self.counts["bytes"] += self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Closes the file; the counts stay."""
        self._file.close()


def check_fractions(options: argparse.Namespace) -> None:
    """Raises a ValueError if the fractions to hold out make no sense."""
    for name in ("valid_fraction", "test_fraction"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must lie between 0 and 1, both excluded")
    if sum(held_out_fractions(options).values()) >= 1:
        raise ValueError("--valid-fraction and --test-fraction leave no text to train on: sum below 1 needed")


def held_out_fractions(options: argparse.Namespace) -> dict[str, float]:
    """What part of the text valid and test get where nothing else is said."""
    return {split: getattr(options, f"{split}_fraction") or HELD_OUT for split in ("valid", "test")}


def write_splits(
    inputs: dict[str, list[TextFile]], options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, int]]:
    """Writes the files ``train``, ``valid`` and ``test`` into ``folder``, a paragraph a line.

    Args:
        inputs: The files under ``text``, ``valid`` and ``test``.
        options: ``valid``, ``test``, ``valid_fraction``, ``test_fraction`` (None: not given) and ``seed``.
        folder: An existing folder.

    Returns:
        For each split the number of documents, lines, words and bytes; tokens are counted later.

    Raises:
        ValueError: a split would be empty, or is named twice; or the text cannot be read.
    """
    documents = _survey(inputs)
    _refuse_two_sources(documents, options)
    _hold_out(documents, held_out_fractions(options), options.seed)
    writers = {split: SplitWriter(folder / split) for split in SPLITS}
    found = read_all(inputs, "splitting the text")
    for document, (_, _, lines) in zip(documents, found, strict=True):
        for number, line in enumerate(lines):
            writers[document.split_at(number)].write(line, document)
    for split, writer in writers.items():
        writer.close()
        if not writer.counts["lines"]:
            remedy = "" if split == "train" else f", or give --{split} FILE or a larger --{split}-fraction"
            raise ValueError(f"--text: nothing is left for the split {split!r}: give more text{remedy}")
    return {split: writer.counts for split, writer in writers.items()}


def read_all(
    inputs: dict[str, list[TextFile]], title: str, *, empty: bool = False
) -> Iterator[tuple[str, str, Iterator[str]]]:
    """Every document of the files by what they are for: ``(role, name, lines)``, behind a progress bar.

    Args:
        inputs: The files of each role.
        title: Of the bar.
        empty: Whether to keep empty lines.
    """
    files = [(role, file) for role in inputs for file in inputs[role]]
    total = sum(file.path.stat().st_size for _, file in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for role, file in files:
            for name, lines in read_documents(file, bar.update, empty=empty):
                yield role, name, lines


def _survey(inputs: dict[str, list[TextFile]]) -> list[Document]:
    documents = []
    for role, name, lines in read_all(inputs, "reading the text"):
        document = Document(name, role, _split_of_folder(name) if role == "text" else role)
        for line in lines:
            document.lines += 1
            document.size += len(line)
        documents.append(document)
    if not any(document.lines for document in documents if document.role == "text"):
        raise ValueError("--text: there is no text in it")
    if not any(document.split == "train" for document in documents):
        # a folder that happens to be called "test" means nothing where no "train" stands beside it
        for document in documents:
            document.split = None if document.role == "text" else document.role
    return documents


def _split_of_folder(name: str) -> str | None:
    splits = (FOLDERS.get(part) for part in Path(name).parts[:-1])
    return next((split for split in splits if split), None)


def _refuse_two_sources(documents: list[Document], options: argparse.Namespace) -> None:
    for split in ("valid", "test"):
        if not any(document.split == split and document.role == "text" for document in documents):
            continue
        for name in (split, f"{split}-fraction"):
            value = getattr(options, name.replace("-", "_"))
            if value is not None:
                raise ValueError(f"--{name} {value}: the text already has a folder for the split {split!r}")


def _hold_out(documents: list[Document], fractions: dict[str, float], seed: int) -> None:
    """Gives every document its split, or where there are few, the lines at which valid and test begin."""
    named = {document.split for document in documents}
    shares = {split: share for split, share in fractions.items() if split not in named}
    candidates = [document for document in documents if document.split in (None, "train") and document.lines]
    chosen = _choose_documents(candidates, shares, seed)
    for document in candidates:
        document.split = "train" if chosen or not shares else None
        document.test_from = document.lines - round(document.lines * shares.get("test", 0))
        document.valid_from = document.test_from - round(document.lines * shares.get("valid", 0))
    for split, members in chosen.items():
        for document in members:
            document.split = split


def _choose_documents(
    documents: list[Document], shares: dict[str, float], seed: int
) -> dict[str, list[Document]]:
    """Whole documents for each held-out split; nothing if there are too few, or they are too unequal."""
    if len(documents) < MANY_DOCUMENTS:
        return {}
    total = sum(document.size for document in documents)
    ranked = sorted(documents, key=lambda d: hashlib.sha256(f"{seed}\0{d.name}".encode()).digest())
    chosen: dict[str, list[Document]] = {}
    for split, share in shares.items():
        size, members, others = 0, [], []
        for document in ranked:
            fits = size < share * total and size + document.size <= 1.5 * share * total
            (members if fits else others).append(document)
            size += document.size if fits else 0
        ranked, chosen[split] = others, members
    return chosen if ranked and all(chosen.values()) else {}
