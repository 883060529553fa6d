"""Turns a large collection into fairseq data for language modeling, split by author or by directory.

    python scripts/prepare_corpus.py gutenberg --text Gutenberg_Text/ --output data-bin/gutenberg
    python scripts/prepare_corpus.py linux --text linux-source-6.1.tar.xz --output data-bin/linux
    python scripts/prepare_corpus.py text --text my-folder/ --output data-bin/mine

``gutenberg`` takes a folder of Project Gutenberg's books, a folder an author, such as a clone of the
repository rcdm-uga/Gutenberg_Text: headers and footers are taken off, and a paragraph is a line. ``linux``
takes the C files of Linux's source, a file a document, as it is in Debian's package:

    apt-get download linux-source-6.1
    dpkg-deb --fsys-tarfile linux-source-6.1_*.deb |
        tar -xO ./usr/src/linux-source-6.1.tar.xz > linux-source-6.1.tar.xz

``text`` takes any folder or archive of text. All are read as streams.

Validation and test get whole groups (folders, ``--group-depth`` deep) that training has nothing of: each
``--held-out-groups`` of those that are no larger than the average. Repeats are removed, by samples of pieces
of 12 words: a document of which more than half is in others, and from training what repeats held-out text
(from 2 % of it on, of code 50 %). ``--exclude`` names documents, a line each as PATH or PATH<tab>anything,
that are left out together with their repeats, so that a model may be tested on them.

The output is that of prepare_lm.py, with two differences: an item of the data is a whole document, which
keeps the index small (lines still end with ``</s>``, and between documents there is still the item
``</s>``); and ``prepare.json`` lists the groups and has a digest of the data. The same text and options give
the same bytes; a second run does nothing.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy

from runs.command_line import command_line
from text.documents import KINDS, Repeats, shingles
from text.folder import (
    add_shared,
    digest_of,
    fingerprint,
    is_prepared,
    print_counts,
    publish,
    run_prepare,
    work_folder,
)
from text.numbered import LM_FILES, encode_documents
from text.pieces import MODEL, learn_pieces
from text.read import TextFile, find_text_files
from text.split import SPLITS, SplitWriter, read_all

__all__ = ["main", "prepare"]

#: In this order, what repeats an earlier one goes.
ORDER = ("excluded", "test", "valid", "train")


#: Options whose default depends on the kind.
USUAL = ("vocab_size", "endings", "group_depth")


class Document(NamedTuple):
    """What is known of a document after the first reading."""

    name: str
    group: str
    size: int
    digest: bytes
    sample: numpy.ndarray


def prepare(options: argparse.Namespace) -> bool:
    """Prepares what ``options`` (see ``--help``) ask for.

    Returns:
        False if the output folder already holds exactly that, so that nothing was done.

    Raises:
        ValueError: an option or the text cannot be used, or the folder holds something else.
    """
    _complete(options)
    files = find_text_files(options.text, "--text")
    excluded = _read_excluded(options.exclude) if options.exclude else set()
    names = ("kind", "vocab_size", "endings", "group_depth", "held_out_groups", "seed")
    recorded = {**{name: getattr(options, name) for name in names}, "excluded": sorted(excluded)}
    identity, output = fingerprint({"text": files}, recorded), options.output.resolve()
    if is_prepared(output, identity, options.overwrite, LM_FILES.__contains__):
        return False
    with work_folder(output) as (work, _):
        documents = [
            Document(name, _group(name, options.group_depth), len(text), _digest(text), shingles(text))
            for name, text in _read(files, options, "reading the text")
        ]
        splits = _choose(documents, excluded, options)
        counts = _write(files, list(zip(documents, splits, strict=True)), options, work)
        data, dictionary = work / "data", work / "data" / "dict.txt"
        data.mkdir()
        learn_pieces([work / "train"], options.vocab_size, options.seed, data / MODEL, dictionary)
        for split in SPLITS:
            counts[split]["tokens"] = encode_documents(
                data / MODEL, work / split, data / split, counts[split]["lines"], options.workers
            )
        record = {"options": recorded, "splits": counts, "digest": digest_of(data)}
        groups = {split: _groups(documents, splits, split) for split in SPLITS}
        publish(work, output, {"fingerprint": identity, **record, "groups": groups})
    return True


def _complete(options: argparse.Namespace) -> None:
    """Fills in what is usual for the kind of corpus."""
    for name in USUAL:
        if getattr(options, name) is None:
            setattr(options, name, getattr(KINDS[options.kind], name))
    for name in ("workers", "vocab_size", "group_depth", "held_out_groups"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")


def _read(files: list[TextFile], options: argparse.Namespace, title: str) -> Iterator[tuple[str, str]]:
    """The documents of the right endings that have any text."""
    for _, name, lines in read_all({"text": files}, title, empty=True):
        wanted = name.endswith(tuple(options.endings))
        if wanted and (text := "\n".join(KINDS[options.kind].lines(lines))):
            yield name, text


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _group(name: str, depth: int) -> str:
    return "/".join(PurePosixPath(name).parts[:-1][:depth])


def _read_excluded(path: Path) -> set[str]:
    lines = (line.partition("\t")[0].strip() for line in path.read_text("utf-8").splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def _choose(documents: list[Document], excluded: set[str], options: argparse.Namespace) -> list[str]:
    """The split of each document; that of those that are excluded or repeat others is none of ``SPLITS``.

    Raises:
        ValueError: there are no documents, too few groups, or nothing by an excluded name.
    """
    if not documents:
        endings = " ".join(options.endings)
        raise ValueError(f"--text: there is no text in files that end with {endings}; see --endings")
    if unknown := sorted(excluded - {document.name for document in documents}):
        raise ValueError(f"--exclude {options.exclude}: there is no document {unknown[0]} in --text")
    held_out = _hold_out(documents, options)

    def split_of(document: Document) -> str:
        return "excluded" if document.name in excluded else held_out.get(document.group, "train")

    repeats, splits = Repeats(KINDS[options.kind].leak), [split_of(document) for document in documents]
    rank = {split: place for place, split in enumerate(ORDER)}
    for index in sorted(range(len(documents)), key=lambda i: (rank[splits[i]], -documents[i].size)):
        if not repeats.is_new(splits[index], documents[index].digest, documents[index].sample):
            splits[index] = "repeat"
    _print_plan(documents, splits)
    for split in SPLITS:
        if split not in splits:
            raise ValueError(f"--text: nothing is left for the split {split!r}: give more text")
    return splits


def _hold_out(documents: list[Document], options: argparse.Namespace) -> dict[str, str]:
    """The split of each group that is held out."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + document.size
    average = sum(sizes.values()) / len(sizes)
    small = [group for group, size in sizes.items() if size <= average]
    most = min(len(small), len(sizes) - 1) // 2
    if options.held_out_groups > most:
        raise ValueError(
            f"--held-out-groups {options.held_out_groups}: {len(small)} of {len(sizes)} groups are no larger "
            f"than the average; allowed: 1 to {most}, or another --group-depth"
        )
    small.sort(key=lambda group: _digest(f"{options.seed}\0{group}"))
    count = options.held_out_groups
    return {**dict.fromkeys(small[:count], "valid"), **dict.fromkeys(small[count : 2 * count], "test")}


def _groups(documents: list[Document], splits: list[str], split: str) -> list[str]:
    return sorted({document.group for document, own in zip(documents, splits, strict=True) if own == split})


def _print_plan(documents: list[Document], splits: list[str]) -> None:
    for split in (*SPLITS, "repeat", "excluded"):
        sizes = [document.size for document, own in zip(documents, splits, strict=True) if own == split]
        groups = len(_groups(documents, splits, split))
        counts = f"{groups:>6,} groups {len(sizes):>9,} documents {sum(sizes):>15,} characters"
        print(f"  {split:8} {counts}", file=sys.stderr)


def _write(
    files: list[TextFile], plan: list[tuple[Document, str]], options: argparse.Namespace, work: Path
) -> dict[str, dict[str, int]]:
    """Writes each split as text; counts."""
    writers = {split: SplitWriter(work / split) for split in SPLITS}
    found = _read(files, options, "splitting the text")
    for (document, split), (_, text) in zip(plan, found, strict=True):
        if split in writers:
            for line in text.split("\n"):
                writers[split].write(line, document)
    for writer in writers.values():
        writer.close()
    return {split: writer.counts for split, writer in writers.items()}


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    add_shared(parser)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, metavar="PATH", help="folders, files, archives")
    usual = {name: ", ".join(f"{key}: {getattr(KINDS[key], name)}" for key in KINDS) for name in USUAL}
    add("--vocab-size", type=int, metavar="N", help=f"of fairseq's dictionary ({usual['vocab_size']})")
    add("--endings", nargs="+", metavar="END", help=f"of the files to take ({usual['endings']})")
    add("--group-depth", type=int, metavar="N", help=f"folders that tell a group ({usual['group_depth']})")
    add(
        "--held-out-groups",
        type=int,
        default=12,
        metavar="N",
        help="groups for validation, and for test (12)",
    )
    add("--exclude", type=Path, metavar="FILE", help="documents to leave out with their repeats")
    add("--seed", type=int, default=1, metavar="N", help="chooses the groups to hold out (1)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and status 2."""
    print_counts(run_prepare(_parser(), prepare, arguments))


if __name__ == "__main__":
    main()
