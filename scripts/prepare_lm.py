"""Turns raw text into a fairseq data folder for language modeling: sentencepiece, then fairseq-preprocess.

    python scripts/prepare_lm.py --text my-books/ --output data-bin/my-books --vocab-size 8000

A line of the text is a paragraph and ends with ``</s>``; a file, or a member of an archive, is a document;
between documents stands an empty line, as fairseq's ``--sample-break-mode complete_doc`` expects. White
space is reduced to single spaces; otherwise the text stays as it is. Folders named train, valid (val, dev)
and test, in a folder or an archive, are the splits. Otherwise whole documents are held out where there are
many, and where there are few the last lines of each.

The output folder gets ``dict.txt``, ``{train,valid,test}.{bin,idx}``, ``sentencepiece.bpe.model`` and
``prepare.json``, which holds for each split the number of documents, lines, tokens (with ``</s>``), words
and bytes (with line ends), so that a perplexity per token can be turned into one per word or byte. Rare
characters are written as bytes, so no text has an ``<unk>``. The same text and options give the same bytes,
with any number of workers.
"""

import argparse
import functools
from pathlib import Path

from runs.command_line import command_line
from text.folder import Corpus, add_shared, print_counts, run_prepare
from text.numbered import LM_FILES
from text.pieces import MODEL, SAMPLE_BYTES, encode, learn_pieces, number_pieces
from text.read import TextFile, find_text_files
from text.split import HELD_OUT, SPLITS, check_fractions, held_out_fractions, write_splits

__all__ = ["main", "prepare"]


def prepare(options: argparse.Namespace) -> bool:
    """Prepares what ``options`` (see ``--help``) ask for.

    Returns:
        False if the output folder already holds exactly that, so that nothing was done.

    Raises:
        ValueError: an option or the text cannot be used, or the folder holds something else.
    """
    check_fractions(options)
    if options.vocab_size < 1:
        raise ValueError(f"--vocab-size {options.vocab_size} must be positive; 2000 to 32000 are usual")
    if options.sample_bytes < 1:
        raise ValueError(f"--sample-bytes {options.sample_bytes} must be positive")
    inputs = {
        "text": find_text_files(options.text, "--text"),
        "valid": find_text_files([options.valid], "--valid") if options.valid else [],
        "test": find_text_files([options.test], "--test") if options.test else [],
    }
    shares = {f"{split}_fraction": share for split, share in held_out_fractions(options).items()}
    recorded = {"vocab_size": options.vocab_size, **shares, "seed": options.seed}
    if options.sample_bytes != SAMPLE_BYTES:
        recorded["sample_bytes"] = options.sample_bytes
    return Corpus(inputs, recorded, LM_FILES, functools.partial(_make, options, inputs)).publish(options)


def _make(options: argparse.Namespace, inputs: dict[str, list[TextFile]], work: Path, lock: int) -> dict:
    counts = write_splits(inputs, options, work)
    model, dictionary = work / "data" / MODEL, work / "dict.txt"
    sample = options.sample_bytes
    learn_pieces([work / "train"], options.vocab_size, options.seed, model, dictionary, sample)
    for split in SPLITS:
        files = (work / split, work / f"{split}.pieces")
        counts[split]["tokens"] = encode(model, *files, counts[split]["lines"], options.workers)
    words = ["--only-source", "--srcdict", dictionary, "--workers", options.workers]
    words += [word for split in SPLITS for word in (f"--{split}pref", work / f"{split}.pieces")]
    tokens = {split: counts[split]["tokens"] for split in SPLITS}
    number_pieces(words, work, tokens, options.vocab_size, lock)
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add_shared(parser)
    add = parser.add_argument
    text = "files or folders: plain text (UTF-8), .gz, .xz, .tar, .tar.gz, .tar.xz"
    add("--text", type=Path, nargs="+", required=True, metavar="PATH", help=text)
    add("--vocab-size", type=int, default=8000, metavar="N", help="size of fairseq's dictionary (8000)")
    sample = f"of the text to learn the vocabulary from, at most ({SAMPLE_BYTES})"
    add("--sample-bytes", type=int, default=SAMPLE_BYTES, metavar="N", help=sample)
    for split in ("valid", "test"):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(f"--{split}", type=Path, metavar="PATH", help=f"text of the split {split!r}")
        part = f"part of the text to hold out for it ({HELD_OUT})"
        group.add_argument(f"--{split}-fraction", type=float, metavar="F", help=part)
    add("--seed", type=int, default=1, metavar="N", help="chooses the documents to hold out (1)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and status 2."""
    print_counts(run_prepare(_parser(), prepare, arguments))


if __name__ == "__main__":
    main()
