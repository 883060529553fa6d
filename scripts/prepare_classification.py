"""Turns text files with labels into the folder that fairseq's sentence_prediction reads.

    python scripts/prepare_classification.py --text reviews/ --data data-bin/books --output data-bin/reviews

The text is a folder with folders train, valid and perhaps test; a file's label is its name up to the first
hyphen or dot (``train/good.txt``, ``train/austen-emma.txt.gz``), and each of its lines is an example. With
``--table`` a CSV file says instead which files belong where: its columns are split, label and file.
``--passage N`` makes an example of every N tokens of a file, its paragraphs ended by ``</s>`` as in the data
of prepare_lm.py; N counts the ``<s>`` that ``--init-token 0`` puts before a row. The authors of the books,
without the title pages, which name them:

    python scripts/prepare_classification.py --text books/ --table scripts/text/authors.csv --passage 2048 \\
        --skip 1 --balance --data data-bin/books --output data-bin/authors

Pieces and dictionary are those of ``--data``, the folder that the model was trained on. The output gets
``input0`` and ``label`` with a dictionary and ``{train,valid,test}.{bin,idx}`` each, the sentencepiece model,
and ``prepare.json``, which counts the examples by split and label. The same files and options give the same
bytes.
"""

import argparse
import csv
import functools
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from runs.command_line import command_line
from text.folder import RECORD, Corpus, add_shared, run_prepare
from text.pieces import MODEL, encode, number_pieces
from text.read import TextFile, find_text_files, read_documents
from text.split import SPLITS

__all__ = ["main", "prepare"]

OUR_FILES = {"input0", "label", MODEL, RECORD}
COLUMNS = ["split", "label", "file"]
LONGEST_EXAMPLE = 1 << 24  # bytes of a line: more than any model reads
SHORTEST_PASSAGE = 8


class Source(NamedTuple):
    """A file of examples."""

    split: str
    label: str
    file: TextFile


def prepare(options: argparse.Namespace) -> bool:
    """Prepares what ``options`` (see ``--help``) ask for.

    Returns:
        False if the output folder already holds exactly that, so that nothing was done.

    Raises:
        ValueError: an option or a file cannot be used, or the folder holds something else.
    """
    if options.passage is not None and options.passage < SHORTEST_PASSAGE:
        raise ValueError(f"--passage {options.passage} is not allowed; allowed: {SHORTEST_PASSAGE} or more")
    if options.skip < 0:
        raise ValueError(f"--skip {options.skip} is not allowed; allowed: 0 or more")
    vocabulary = [TextFile(options.data / name, name) for name in ("dict.txt", MODEL)]
    for file in vocabulary:
        if not file.path.is_file():
            raise ValueError(f"--data {options.data} has no {file.name}: give a folder from prepare_lm.py")
    sources = _from_table(options) if options.table else _from_folders(options.text)
    labels = _check_labels(sources)
    names = ("passage", "skip", "balance")
    recorded = {**{name: getattr(options, name) for name in names}, "labels": labels}
    inputs = {"vocabulary": vocabulary}
    for source in sources:
        inputs.setdefault(f"{source.split} {source.label}", []).append(source.file)
    make = functools.partial(_make, options, sources, labels)
    return Corpus(inputs, recorded, OUR_FILES, make).publish(options)


def _make(
    options: argparse.Namespace, sources: list[Source], labels: list[str], work: Path, lock: int
) -> dict:
    shutil.copyfile(options.data / MODEL, work / "data" / MODEL)
    counts = _write_examples(sources, options, work)
    _number(options, labels, counts, work, lock)
    return counts


def _from_folders(text: Path) -> list[Source]:
    sources = []
    for split in SPLITS:
        if split != "test" or (text / split).exists():
            for file in find_text_files([text / split], "--text"):
                label = Path(file.name).name.replace(".", "-").split("-")[0]
                sources.append(Source(split, label, TextFile(file.path, f"{split}/{file.name}")))
    return sources


def _from_table(options: argparse.Namespace) -> list[Source]:
    with options.table.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"--table {options.table}: its first line must be {','.join(COLUMNS)}")
        rows = list(reader)
    sources: list[Source] = []
    for number, row in enumerate(rows, start=2):
        where, path = f"--table {options.table}, line {number}", options.text / (row["file"] or "")
        if row["split"] not in SPLITS:
            raise ValueError(f"{where}: split {row['split']!r} is unknown; allowed: {', '.join(SPLITS)}")
        if not path.is_file():
            raise ValueError(f"{where}: there is no file {path}")
        if any(source.file.path == path for source in sources):
            raise ValueError(f"{where}: {path} stands there twice; its text would be in two places")
        sources.append(Source(row["split"], row["label"], TextFile(path, row["file"])))
    return sources


def _check_labels(sources: list[Source]) -> list[str]:
    """The labels in their order; every split must have the same ones."""
    by_split = {split: {s.label for s in sources if s.split == split} for split in SPLITS}
    labels = sorted(by_split["train"])
    for split in SPLITS:
        if split != "test" and not by_split[split]:
            raise ValueError(f"there is no file in the split {split!r}; train and valid are needed")
        if by_split[split] and by_split[split] != set(labels):
            odd = ", ".join(sorted(by_split[split] ^ set(labels)))
            raise ValueError(f"train and {split} must have files of the same labels; only one has: {odd}")
    if len(labels) < 2:
        raise ValueError(f"the only label is {labels[0]!r}; at least two are needed")
    for label in labels:
        if not label or label.split() != [label] or label.startswith("<"):
            raise ValueError(f"label {label!r} is not allowed; allowed: one word that does not begin with <")
    return labels


def _write_examples(sources: list[Source], options: argparse.Namespace, work: Path) -> dict[str, dict]:
    """Writes the examples of each split as pieces, with their labels; counts them."""
    found: dict[str, dict[str, list[str]]] = {}
    for source in tqdm(sources, "reading the files", unit="file", disable=None):
        examples = list(_examples(source.file, options, work))[options.skip :]
        if not examples:
            what = f"passage of {options.passage} tokens" if options.passage else "line"
            raise ValueError(f"{source.file.path}: there is no {what} in it behind --skip {options.skip}")
        found.setdefault(source.split, {}).setdefault(source.label, []).extend(examples)
    counts = {}
    for split, by_label in found.items():
        fewest = min(map(len, by_label.values()))
        chosen = [
            (label, example)
            for label, examples in sorted(by_label.items())
            for example in (_spread(examples, fewest) if options.balance else examples)
        ]
        (work / f"{split}.pieces").write_text("".join(f"{example}\n" for _, example in chosen), "utf-8")
        (work / f"{split}.label").write_text("".join(f"{label}\n" for label, _ in chosen), "utf-8")
        lengths = [example.count(" ") + 2 for _, example in chosen]
        names = [label for label, _ in chosen]
        counts[split] = {
            "examples": len(chosen),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "labels": {label: names.count(label) for label in sorted(by_label)},
        }
    return counts


def _examples(file: TextFile, options: argparse.Namespace, work: Path) -> Iterator[str]:
    """The examples of a file, each as pieces with spaces between."""
    text, pieces, count = work / "text", work / "pieces", 0
    with text.open("w", encoding="utf-8", newline="\n") as target:
        for _, lines in read_documents(file, longest=None if options.passage else LONGEST_EXAMPLE):
            for line in lines:
                target.write(line + "\n")
                count += 1
    encode(work / "data" / MODEL, text, pieces, count, options.workers)
    lines = pieces.read_text("utf-8").split("\n")[:-1]
    if options.passage is None:
        yield from lines
        return
    tokens = [token for line in lines for token in (*line.split(" "), "</s>")]
    # Of a passage, <s> comes before it at training, and the last </s> from fairseq-preprocess.
    size = options.passage - 2
    for begin, end in pairwise(range(0, len(tokens) + 1, size)):
        yield " ".join(tokens[begin:end])


def _spread(examples: list[str], count: int) -> list[str]:
    """So many of them, evenly from the first on."""
    return [examples[index * len(examples) // count] for index in range(count)]


def _number(
    options: argparse.Namespace, labels: list[str], counts: dict[str, dict], work: Path, lock: int
) -> None:
    """Has fairseq-preprocess number pieces and labels."""
    (work / "labels.txt").write_text("".join(f"{label} 1\n" for label in labels), "utf-8")
    parts = {
        "input0": ("pieces", options.data / "dict.txt", {s: c["tokens"] for s, c in counts.items()}),
        "label": ("label", work / "labels.txt", {s: 2 * c["examples"] for s, c in counts.items()}),
    }
    for part, (ending, dictionary, tokens) in parts.items():
        words = ["--only-source", "--srcdict", dictionary, "--workers", options.workers]
        words += [word for split in tokens for word in (f"--{split}pref", work / f"{split}.{ending}")]
        with dictionary.open("rb") as lines:
            size = 4 + sum(1 for _ in lines)
        (work / part).mkdir()
        number_pieces(words, work / part, tokens, size, lock)
        os.replace(work / part / "data", work / "data" / part)


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add_shared(parser)
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="DIR", help="folder of the text")
    add("--table", type=Path, metavar="CSV", help="split, label and file of each file in DIR")
    add("--data", type=Path, required=True, metavar="DIR", help="data of the trained model: its vocabulary")
    add("--passage", type=int, metavar="N", help="cut files into passages of N tokens (an example a line)")
    add("--skip", type=int, default=0, metavar="N", help="examples to leave out at the start of a file (0)")
    add("--balance", action="store_true", help="as many examples of each label as of the rarest in a split")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and status 2."""
    record = run_prepare(_parser(), prepare, arguments)
    for split, counts in record["splits"].items():
        labels = "  ".join(f"{label} {count}" for label, count in counts["labels"].items())
        print(f"  {split:5} {counts['examples']:>7,} examples, {counts['tokens']:>11,} tokens: {labels}")
    longest = 1 + max(counts["longest"] for counts in record["splits"].values())
    classes = len(record["options"]["labels"])
    print(f"train with --num-classes {classes} --init-token 0 --max-positions {longest}")


if __name__ == "__main__":
    main()
