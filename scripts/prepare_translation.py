"""Turns parallel text into a fairseq data folder for translation: sentencepiece, then fairseq-preprocess.

    python scripts/prepare_translation.py --source-lang en --target-lang de \\
        --train corpus/train --valid corpus/val --test corpus/test --output data-bin/en-de --vocab-size 8000

A prefix such as corpus/train stands for the files corpus/train.en and corpus/train.de, plain (UTF-8), .gz or
.xz, in which line N of one is the translation of line N of the other. White space is reduced to single
spaces; otherwise the text stays as it is. A pair of which a side is empty is dropped from the training text
and kept in the others, so that a translation stays on its reference's line.

Both languages share one vocabulary (fairseq's --share-all-embeddings needs that) unless --separate is given.
The output folder gets ``dict.LANG.txt``, ``{train,valid,test}.SRC-TGT.LANG.{bin,idx}``, the lines of the test
split as ``test.raw.LANG``, ``sentencepiece.bpe.model`` (of the source, with --separate, beside
``sentencepiece.TGT.model``) and ``prepare.json``, which holds for each split the number of pairs, of dropped
pairs, and for each language of tokens (with ``</s>``), words and bytes (with line ends). Rare characters are
written as bytes, so no text has an ``<unk>``. The same text and options give the same bytes.
"""

import argparse
import functools
import re
import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from runs.command_line import command_line
from text.folder import RECORD, Corpus, add_shared, run_prepare
from text.pieces import MODEL, encode, learn_pieces, number_pieces
from text.read import TextFile, read_lines

__all__ = ["main", "prepare"]

SPLITS = ("train", "valid", "test")
ENDINGS = ("", ".gz", ".xz")

Pair = tuple[TextFile, TextFile]


def prepare(options: argparse.Namespace) -> bool:
    """Prepares what ``options`` (see ``--help``) ask for.

    Returns:
        False if the output folder already holds exactly that, so that nothing was done.

    Raises:
        ValueError: an option or the text cannot be used, or the folder holds something else.
    """
    _check_options(options)
    languages = (options.source_lang, options.target_lang)
    pairs = {split: _find_pairs(getattr(options, split), split, languages) for split in SPLITS}
    recorded = {"languages": languages, "vocab_size": options.vocab_size, "separate": options.separate}
    recorded["seed"] = options.seed
    inputs = {split: [file for pair in pairs[split] for file in pair] for split in SPLITS}
    make = functools.partial(_make, options, pairs)
    return Corpus(inputs, recorded, _our_files(*languages), make).publish(options)


def _make(options: argparse.Namespace, pairs: dict[str, list[Pair]], work: Path, lock: int) -> dict:
    languages = (options.source_lang, options.target_lang)
    counts = {split: _write_split(pairs[split], split, languages, work) for split in SPLITS}
    for language in languages:
        shutil.copyfile(work / f"test.{language}", work / "data" / f"test.raw.{language}")
    models = _learn(work, languages, options)
    tokens = _encode(work, languages, models, counts, options)
    words = ["--source-lang", languages[0], "--target-lang", languages[1], "--workers", options.workers]
    words += ["--srcdict", work / f"dict.{languages[0]}", "--tgtdict", work / f"dict.{languages[1]}"]
    for split in SPLITS:
        words += [f"--{split}pref", work / f"{split}.pieces"]
    number_pieces(words, work, tokens, options.vocab_size, lock)
    return counts


def _our_files(source: str, target: str) -> set[str]:
    files = {RECORD, MODEL, f"sentencepiece.{target}.model"}
    for language in (source, target):
        files |= {f"dict.{language}.txt", f"test.raw.{language}"}
        files |= {f"{split}.{source}-{target}.{language}.{end}" for split in SPLITS for end in ("bin", "idx")}
    return files


def _check_options(options: argparse.Namespace) -> None:
    if options.vocab_size < 1:
        raise ValueError(f"--vocab-size {options.vocab_size} must be at least 1")
    for name in ("source_lang", "target_lang"):
        if not re.fullmatch(r"[A-Za-z0-9_]+", getattr(options, name)):
            # fairseq finds the languages by the dots and the hyphen in the names of its files
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)!r} is not allowed; allowed: letters, "
                "digits and _, as in en or pt_BR"
            )
    if options.source_lang == options.target_lang:
        raise ValueError(f"--target-lang {options.target_lang} is the source language too; they must differ")


def _find_pairs(prefixes: list[Path], split: str, languages: tuple[str, str]) -> list[Pair]:
    return [tuple(_find(prefix, split, language) for language in languages) for prefix in prefixes]


def _find(prefix: Path, split: str, language: str) -> TextFile:
    names = [prefix.with_name(f"{prefix.name}.{language}{ending}") for ending in ENDINGS]
    found = [path for path in names if path.is_file()]
    if len(found) != 1:
        kind = "these files exist, of which one is needed" if found else "none of these files exists"
        raise ValueError(f"--{split} {prefix}: {kind}: {', '.join(map(str, found or names))}")
    return TextFile(found[0], found[0].name)


def _read_pairs(pair: Pair) -> Iterator[tuple[str, str]]:
    """Lines that belong together.

    Raises:
        ValueError: the files have different numbers of lines.
    """
    counts = [0, 0]
    for lines in zip_longest(*map(read_lines, pair)):
        counts = [count + (line is not None) for count, line in zip(counts, lines, strict=True)]
        if None not in lines:
            yield lines
    if counts[0] != counts[1]:
        found = " and ".join(f"{count:,} in {file.path}" for count, file in zip(counts, pair, strict=True))
        raise ValueError(f"parallel text needs as many lines in both files; there are {found}")


def _write_split(pairs: list[Pair], split: str, languages: tuple[str, str], work: Path) -> dict:
    """Writes ``split.LANG`` as text; returns its counts, without those of tokens."""
    files = [(work / f"{split}.{language}").open("wb") for language in languages]
    counts = {"pairs": 0, "dropped": 0, **{language: {"words": 0, "bytes": 0} for language in languages}}
    with files[0], files[1]:
        for pair in pairs:
            for lines in _read_pairs(pair):
                if split == "train" and not all(lines):
                    counts["dropped"] += 1
                    continue
                counts["pairs"] += 1
                for language, line, file in zip(languages, lines, files, strict=True):
                    counts[language]["words"] += len(line.split())
                    counts[language]["bytes"] += file.write(line.encode() + b"\n")
    if not counts["pairs"]:
        raise ValueError(f"--{split} {pairs[0][0].path}: there is no pair of lines in it")
    return counts


def _learn(work: Path, languages: tuple[str, str], options: argparse.Namespace) -> dict[str, Path]:
    """The model of each language; also writes ``dict.LANG`` for each."""
    source, target = languages
    texts = {language: [work / f"train.{language}"] for language in languages}
    models = dict.fromkeys(languages, work / "data" / MODEL)
    if options.separate:
        models[target] = work / "data" / f"sentencepiece.{target}.model"
        for language in languages:
            learned = (models[language], work / f"dict.{language}")
            learn_pieces(texts[language], options.vocab_size, options.seed, *learned)
    else:
        both = texts[source] + texts[target]
        learn_pieces(both, options.vocab_size, options.seed, models[source], work / f"dict.{source}")
        shutil.copyfile(work / f"dict.{source}", work / f"dict.{target}")
    return models


def _encode(
    work: Path,
    languages: tuple[str, str],
    models: dict[str, Path],
    counts: dict[str, dict],
    options: argparse.Namespace,
) -> dict[str, int]:
    """Writes ``split.pieces.LANG``; returns the tokens by the name of fairseq's file."""
    tokens = {}
    for split in SPLITS:
        for language in languages:
            files = (work / f"{split}.{language}", work / f"{split}.pieces.{language}")
            count = encode(models[language], *files, counts[split]["pairs"], options.workers)
            counts[split][language]["tokens"] = count
            tokens[f"{split}.{'-'.join(languages)}.{language}"] = count
    return tokens


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add_shared(parser)
    add = parser.add_argument
    add("--source-lang", required=True, metavar="LANG", help="ending of the source's files, such as en")
    add("--target-lang", required=True, metavar="LANG", help="ending of the target's files, such as de")
    add("--train", type=Path, nargs="+", required=True, metavar="PREFIX", help="training text")
    for split in ("valid", "test"):
        add(f"--{split}", type=Path, nargs=1, required=True, metavar="PREFIX", help=f"text of {split!r}")
    add("--vocab-size", type=int, default=8000, metavar="N", help="size of a dictionary (8000)")
    add("--separate", action="store_true", help="a vocabulary for each language")
    add("--seed", type=int, default=1, metavar="N", help="chooses what of a long text is learnt from (1)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and status 2."""
    record = run_prepare(_parser(), prepare, arguments)
    for split, counts in record["splits"].items():
        print(f"  {split:5} {counts['pairs']:>11,} pairs  {counts['dropped']:>9,} dropped", end="")
        for language in record["options"]["languages"]:
            print(f"  {counts[language]['tokens']:>13,} tokens of {language}", end="")
        print()


if __name__ == "__main__":
    main()
