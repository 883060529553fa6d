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
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import sentencepiece
from read_text import TextFile, find_text_files
from split_text import HELD_OUT, SPLITS, check_fractions, held_out_fractions, write_splits
from tqdm import tqdm

__all__ = ["main", "prepare"]

MODEL = "sentencepiece.bpe.model"  # the one name that fairseq's hub interface looks for
RECORD = "prepare.json"
OUR_FILES = {"dict.txt", MODEL, RECORD, *(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx"))}

SAMPLE_BYTES = 16_000_000  # of the text, for sentencepiece: keeps its time under a minute on any corpus


def prepare(options: argparse.Namespace) -> bool:
    """Prepares what ``options`` (see ``--help``) ask for.

    Returns:
        False if the output folder already holds exactly that, so that nothing was done.

    Raises:
        ValueError: an option or the text cannot be used, or the folder holds something else.
    """
    _check_options(options)
    inputs = {
        "text": find_text_files(options.text, "--text"),
        "valid": find_text_files([options.valid], "--valid") if options.valid else [],
        "test": find_text_files([options.test], "--test") if options.test else [],
    }
    fingerprint = _fingerprint(inputs, _recorded(options))
    output = options.output.resolve()
    if _is_prepared(output, fingerprint, options.overwrite):
        return False
    with _work_folder(output) as (work, lock):
        counts = write_splits(inputs, options, work)
        _train_tokenizer(work, options, counts["train"]["bytes"])
        _binarize(work, options, counts, lock)
        files = {path.name: path.stat().st_size for path in sorted((work / "data").iterdir())}
        record = {"fingerprint": fingerprint, "options": _recorded(options), "splits": counts, "files": files}
        (work / "data" / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if output.exists():
            os.replace(output, work / "replaced")
        os.replace(work / "data", output)
    return True


def _check_options(options: argparse.Namespace) -> None:
    check_fractions(options)
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers} must be at least 1")
    if options.vocab_size < 1:
        raise ValueError(f"--vocab-size {options.vocab_size} must be positive; 2000 to 32000 are usual")


def _recorded(options: argparse.Namespace) -> dict:
    """The options that change the result."""
    shares = {f"{split}_fraction": share for split, share in held_out_fractions(options).items()}
    return {"vocab_size": options.vocab_size, **shares, "seed": options.seed}


def _fingerprint(inputs: dict[str, list[TextFile]], recorded: dict) -> str:
    """Identifies text and options; where the text lies, and when it was written, does not matter."""
    digest = hashlib.sha256(json.dumps(recorded).encode())
    files = [(role, file) for role in inputs for file in inputs[role]]
    for role, file in tqdm(files, "checking the text", unit="file", leave=False, disable=None):
        with file.path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{role}\0{file.name}\0{content}\0".encode())
    return digest.hexdigest()


def _is_prepared(output: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether ``output`` already holds this corpus; refuses to touch a folder with anything else in it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / RECORD).is_file():
        raise ValueError(f"--output {output} exists and was not made by this script: choose another folder")
    record = json.loads((output / RECORD).read_text())
    sizes = {name: (output / name).stat().st_size for name in record["files"] if (output / name).is_file()}
    if overwrite:
        foreign = sorted({path.name for path in output.iterdir()} - OUR_FILES)
        if foreign:
            raise ValueError(f"--overwrite would delete files that are not from here: {output}/{foreign[0]}")
        return False
    if record["fingerprint"] != fingerprint:
        raise ValueError(
            f"--output {output} holds another text or was made with other options (see {RECORD} there): "
            "choose another folder, or give --overwrite"
        )
    if sizes != record["files"]:
        raise ValueError(f"--output {output} is damaged (files are missing or cut): give --overwrite")
    return True


@contextmanager
def _work_folder(output: Path) -> Iterator[tuple[Path, int]]:
    """An empty folder beside ``output``, locked; what a killed run left in it is cleared away."""
    work = output.with_name(output.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"--output {output}: another run is preparing it at this moment") from None
    try:
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield work, lock
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _train_tokenizer(work: Path, options: argparse.Namespace, size: int) -> None:
    """Learns the pieces from the training text, and writes the dictionary with every piece in it."""
    amount = min(size, SAMPLE_BYTES) / 1e6
    print(f"learning {options.vocab_size} pieces from {amount:.1f} MB of text ...", file=sys.stderr)
    model = io.BytesIO()
    with _interruptible():
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sample(work / "train", SAMPLE_BYTES / size, options.seed),
                model_writer=model,
                model_type="unigram",
                vocab_size=options.vocab_size,
                character_coverage=0.9999,
                byte_fallback=True,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,
                pad_id=3,  # a control symbol, so that no piece can be spelled like fairseq's own <pad>
                num_threads=8,  # not --workers: the pieces depend on how the sums are grouped
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(_explain(str(error), options.vocab_size)) from error
    (work / "data").mkdir()
    (work / "data" / MODEL).write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # every piece, seen or not, so that new text has no <unk>; the first four are fairseq's own symbols
    pieces = [processor.id_to_piece(i) for i in range(4, processor.get_piece_size())]
    (work / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: Python's own handler would wait until sentencepiece returns."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _sample(path: Path, share: float, seed: int) -> Iterator[str]:
    """Lines of the file, each kept or not by its number and the seed alone."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines):
            if share >= 1 or zlib.crc32(f"{seed} {number}".encode()) < share * 2**32:
                yield line.rstrip("\n")


def _explain(message: str, vocab_size: int) -> str:
    if most := re.search(r"value <= (\d+)", message):
        return f"--vocab-size {vocab_size} is too large for this corpus; it allows at most {most[1]}"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small for this corpus; it needs at least {least[1]}"
    return f"--vocab-size {vocab_size}: sentencepiece cannot learn from this corpus: {message}"


def _binarize(work: Path, options: argparse.Namespace, counts: dict[str, dict], lock: int) -> None:
    """Writes the pieces of each split as text, counts them, and has fairseq-preprocess number them."""
    for split in SPLITS:
        counts[split]["tokens"] = _encode(work, split, counts[split]["lines"], options.workers)
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source"]
    command += ["--srcdict", str(work / "dict.txt"), "--destdir", str(work / "data")]
    command += ["--workers", str(options.workers)]
    command += [word for split in SPLITS for word in (f"--{split}pref", str(work / f"{split}.pieces"))]
    width = 2 if options.vocab_size < 65500 else 4  # fairseq's choice of integer
    expected = {split: counts[split]["tokens"] * width for split in SPLITS}
    with (work / "log").open("w+") as log:
        # the child keeps the lock: killed alone, this process must not make room for a second one too early
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock])
        _watch(child, work / "data", sum(expected.values()))
        if child.returncode:
            log.seek(0)
            raise RuntimeError(f"fairseq-preprocess failed:\n{log.read()}")
    (work / "data" / "preprocess.log").unlink()  # holds dates and the name of the work folder
    written = {split: (work / "data" / f"{split}.bin").stat().st_size for split in SPLITS}
    if written != expected:
        raise RuntimeError(f"fairseq-preprocess wrote {written} bytes instead of {expected}")


def _encode(work: Path, split: str, total: int, workers: int) -> int:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(work / "data" / MODEL))
    tokens = 0
    source = (work / split).open(encoding="utf-8", newline="\n")
    target = (work / f"{split}.pieces").open("w", encoding="utf-8", newline="\n")
    with source, target, tqdm(total=total, desc=f"encoding {split}", unit="line", disable=None) as bar:
        while lines := [line.rstrip("\n") for line in islice(source, 1000)]:
            encoded = processor.encode(lines, out_type=str, num_threads=workers)
            target.writelines(" ".join(pieces) + "\n" for pieces in encoded)
            tokens += sum(len(pieces) + 1 for pieces in encoded)
            bar.update(len(lines))
    (work / split).unlink()
    return tokens


def _watch(child: subprocess.Popen, folder: Path, total: int) -> None:
    """Waits for the child; the bar shows how much of the data it has written."""
    with tqdm(total=total, desc="writing the data", unit="B", unit_scale=True, disable=None) as bar:
        while True:
            sizes = (path.stat().st_size for path in folder.glob("*.bin") if path.exists())
            bar.update(max(0, min(sum(sizes), total) - bar.n))
            try:
                child.wait(timeout=0.5)
                return
            except subprocess.TimeoutExpired:
                pass
            except BaseException:
                child.kill()
                raise


def _parser() -> argparse.ArgumentParser:
    summary, _, details = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "files or folders: plain text (UTF-8), .gz, .xz, .tar, .tar.gz, .tar.xz"
    add("--text", type=Path, nargs="+", required=True, metavar="PATH", help=text)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the data")
    add("--vocab-size", type=int, default=8000, metavar="N", help="size of fairseq's dictionary (8000)")
    for split in ("valid", "test"):
        group = parser.add_mutually_exclusive_group()
        group.add_argument(f"--{split}", type=Path, metavar="PATH", help=f"text of the split {split!r}")
        part = f"part of the text to hold out for it ({HELD_OUT})"
        group.add_argument(f"--{split}-fraction", type=float, metavar="F", help=part)
    cores = min(os.cpu_count() or 1, 8)
    add("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores}); changes no result")
    add("--seed", type=int, default=1, metavar="N", help="chooses the documents to hold out (1)")
    add("--overwrite", action="store_true", help="replace other data of this script in DIR")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        new = prepare(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{Path(sys.argv[0]).name}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; nothing was changed\n")
    record = json.loads((options.output / RECORD).read_text())
    print(f"{'prepared' if new else 'already prepared'}: {options.output}")
    for split, counts in record["splits"].items():
        print(f"  {split:5} " + "  ".join(f"{count:>13,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
