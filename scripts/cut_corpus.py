"""Takes a part of prepared data for language modeling, spread evenly over its documents.

    python scripts/cut_corpus.py --data data-bin/gutenberg --output data-bin/gutenberg_small \\
        --train-tokens 20000000 --held-out-tokens 300000

For trainings that need no more, and for machines that can be sent no more. Vocabulary and dictionary stay.
A split takes its documents in an order drawn by ``--seed`` until it has its tokens, each at most to a twelfth
of them, so that no long one fills a short split; then they stand in their old order again. An item of the
output is a document, as in that of prepare_corpus.py, and ends with ``</s>`` wherever it is cut. The same
data and options give the same bytes.
"""

import argparse
import shutil
from pathlib import Path

import numpy
import sentencepiece

from runs.command_line import command_line
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
from text.numbered import EOS, LM_FILES, DocumentWriter, documents_of, lines_of, tokens_of
from text.pieces import MODEL
from text.read import TextFile
from text.split import SPLITS

__all__ = ["cut", "main"]

#: So many documents at least, where there are so many.
LEAST_DOCUMENTS = 12


def cut(options: argparse.Namespace) -> bool:
    """Cuts what ``options`` (see ``--help``) ask for.

    Returns:
        False if the output folder already holds exactly that, so that nothing was done.

    Raises:
        ValueError: an option or the data cannot be used, or the folder holds something else.
    """
    for name in ("train_tokens", "held_out_tokens"):
        if getattr(options, name) < 2 * LEAST_DOCUMENTS:
            option = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise ValueError(f"{option} is not allowed; allowed: {2 * LEAST_DOCUMENTS} or more")
    for name in sorted(LM_FILES):
        if not (options.data / name).is_file():
            raise ValueError(f"--data {options.data} has no {name}: give a folder of prepare_corpus.py")
    recorded = {name: getattr(options, name) for name in ("train_tokens", "held_out_tokens", "seed")}
    files = [TextFile(options.data / name, name) for name in sorted(LM_FILES)]
    identity, output = fingerprint({"data": files}, recorded), options.output.resolve()
    if is_prepared(output, identity, options.overwrite, LM_FILES.__contains__):
        return False
    with work_folder(output) as (work, _):
        data = work / "data"
        data.mkdir()
        for name in ("dict.txt", MODEL):
            shutil.copyfile(options.data / name, data / name)
        counts = {}
        for split in SPLITS:
            budget = options.train_tokens if split == "train" else options.held_out_tokens
            counts[split] = _cut_split(options.data, split, data / split, budget, options.seed)
        record = {"options": recorded, "splits": counts, "digest": digest_of(data)}
        publish(work, output, {"fingerprint": identity, **record})
    return True


def _cut_split(data: Path, split: str, prefix: Path, budget: int, seed: int) -> dict[str, int]:
    items, borders = documents_of(data, split)
    ends = numpy.concatenate([[0], numpy.cumsum(items.sizes, dtype=numpy.int64)])
    sizes = ends[borders[:, 1]] - ends[borders[:, 0]]
    taken = _share(sizes, budget, seed)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / MODEL))
    writer = DocumentWriter(prefix, processor.get_piece_size())
    counts = dict.fromkeys(("documents", "lines", "tokens", "words", "bytes"), 0)
    for index in numpy.flatnonzero(taken):
        tokens = tokens_of(items, borders[index])[: taken[index]]
        tokens[-1] = EOS
        writer.add(tokens[:-1] if tokens[-2] == EOS else tokens)  # two would be the end of a document
        lines = processor.decode(list(lines_of(tokens)))
        counts["documents"] += 1
        counts["words"] += sum(len(line.split()) for line in lines)
        counts["bytes"] += sum(len(line.encode()) + 1 for line in lines)
        counts["lines"] += len(lines)
    writer.close()
    between = counts["documents"] - 1  # empty lines
    counts["lines"] += between
    counts["bytes"] += between
    return {**counts, "tokens": writer.tokens}


def _share(sizes: numpy.ndarray, budget: int, seed: int) -> numpy.ndarray:
    """How many tokens of each document; in all ``budget``, with one between two, or what there is."""
    taken, left = numpy.zeros_like(sizes), budget
    for index in numpy.random.RandomState(seed).permutation(len(sizes)):
        part = min(sizes[index], budget // LEAST_DOCUMENTS, left)
        if part > 1:
            taken[index] = part
            left -= part + 1
    return taken


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add_shared(parser)
    add = parser.add_argument
    add(
        "--data", type=Path, required=True, metavar="DIR", help="folder of prepare_corpus.py or prepare_lm.py"
    )
    add("--train-tokens", type=int, required=True, metavar="N", help="tokens of the split train, at most")
    add("--held-out-tokens", type=int, required=True, metavar="N", help="of valid and of test, each, at most")
    add("--seed", type=int, default=1, metavar="N", help="draws the documents (1)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends it with one line and status 2."""
    print_counts(run_prepare(_parser(), cut, arguments))


if __name__ == "__main__":
    main()
