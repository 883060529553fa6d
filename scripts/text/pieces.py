"""Text to numbered pieces: sentencepiece learns and cuts, fairseq-preprocess numbers."""

import io
import re
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from runs import process

__all__ = ["MODEL", "SAMPLE_BYTES", "encode", "learn_pieces", "number_pieces", "sample_lines"]

MODEL = "sentencepiece.bpe.model"  # the one name that fairseq's hub interface looks for

SAMPLE_BYTES = 16_000_000  # of the text, for sentencepiece: keeps its time under a minute on any corpus


def learn_pieces(
    texts: list[Path],
    vocab_size: int,
    seed: int,
    model: Path,
    dictionary: Path,
    sample_bytes: int = SAMPLE_BYTES,
) -> None:
    """Learns the pieces of a text; the same text gives the same pieces.

    Args:
        texts: Files, a sentence or paragraph a line.
        vocab_size: Of fairseq's dictionary, its own four symbols among them.
        seed: Chooses the lines to learn from, if there is a lot of text.
        model: File to write sentencepiece's model to.
        dictionary: File to write fairseq's dictionary to, every piece in it.
        sample_bytes: Of the text to learn from, at most, about.

    Raises:
        ValueError: the text allows no such number of pieces.
    """
    size = sum(path.stat().st_size for path in texts)
    amount = min(size, sample_bytes) / 1e6
    print(f"learning {vocab_size} pieces from {amount:.1f} MB of text ...", file=sys.stderr)
    learned = io.BytesIO()
    with _interruptible():
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sample_lines(texts, sample_bytes / size, seed),
                model_writer=learned,
                model_type="unigram",
                vocab_size=vocab_size,
                character_coverage=0.9999,
                byte_fallback=True,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,
                pad_id=3,  # a control symbol, so that no piece can be spelled like fairseq's own <pad>
                num_threads=8,  # not --workers: the pieces depend on how the sums are grouped
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(_explain(str(error), vocab_size)) from error
    model.write_bytes(learned.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=learned.getvalue())
    # every piece, seen or not, so that new text has no <unk>; the first four are fairseq's own symbols
    pieces = [processor.id_to_piece(i) for i in range(4, processor.get_piece_size())]
    dictionary.write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: Python's own handler would wait until sentencepiece returns."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def sample_lines(paths: Iterable[Path], share: float, seed: int) -> Iterator[str]:
    """Lines of the files, each kept or not by its number and the seed alone."""
    for path in paths:
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


def encode(model: Path, text: Path, pieces: Path, total: int, workers: int) -> int:
    """Cuts a text into pieces, and deletes it.

    Args:
        model: Of sentencepiece.
        text: File of lines.
        pieces: File to write, the pieces of a line separated by spaces.
        total: Lines, for the progress bar.
        workers: Threads.

    Returns:
        Tokens, an ``</s>`` a line among them.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = 0
    source = text.open(encoding="utf-8", newline="\n")
    target = pieces.open("w", encoding="utf-8", newline="\n")
    with source, target, tqdm(total=total, desc=f"encoding {text.name}", unit="line", disable=None) as bar:
        while lines := [line.rstrip("\n") for line in islice(source, 1000)]:
            encoded = processor.encode(lines, out_type=str, num_threads=workers)
            target.writelines(" ".join(of_line) + "\n" for of_line in encoded)
            tokens += sum(len(of_line) + 1 for of_line in encoded)
            bar.update(len(lines))
    text.unlink()
    return tokens


def number_pieces(words: list, work: Path, tokens: dict[str, int], vocab_size: int, lock: int) -> None:
    """Has fairseq-preprocess number the pieces, into ``work / "data"``.

    Args:
        words: What and with which dictionary, as arguments of fairseq-preprocess.
        work: Folder of the pieces.
        tokens: How many there are, by the name of the ``.bin`` file that they end in.
        vocab_size: Of the larger dictionary.
        lock: File descriptor that the process keeps open.

    Raises:
        RuntimeError: fairseq-preprocess fails, or writes another number of tokens.
    """
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--destdir", work / "data", *words]
    width = 2 if vocab_size < 65500 else 4  # fairseq's choice of integer
    expected = {name: count * width for name, count in tokens.items()}
    total, log = sum(expected.values()), work / "log"
    with tqdm(total=total, desc="writing the data", unit="B", unit_scale=True, disable=None) as bar:

        def follow() -> None:
            sizes = (path.stat().st_size for path in (work / "data").glob("*.bin") if path.exists())
            bar.update(max(0, min(sum(sizes), total) - bar.n))

        # the child keeps the lock: killed alone, this process must not make room for a second one too early
        ended = process.run(command, log, follow=follow, keep_open=[lock])
    if ended.status:
        raise RuntimeError(f"fairseq-preprocess failed:\n{log.read_text(errors='replace')}")
    (work / "data" / "preprocess.log").unlink()  # holds dates and the name of the work folder
    written = {name: (work / "data" / f"{name}.bin").stat().st_size for name in tokens}
    if written != expected:
        raise RuntimeError(f"fairseq-preprocess wrote {written} bytes instead of {expected}")
