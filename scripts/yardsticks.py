"""Measures what a trained language model gets from distant text, where the mean loss cannot show it.

    python scripts/yardsticks.py --data data-bin/books --checkpoints flash_lm.pt --against flash_local_lm.pt

Each yardstick gives records of one CSV, losses in nats per token; ``gain`` is what ``against`` has more:

    recurrence  loss by distance of the token's last occurrence in its row, in tokens ("new": none), of
                consecutive rows of --row tokens; gain over the model --against
    copy        loss on the second copy of a passage of --passage tokens that begins --distances tokens behind
                the first; gain over the same rows whose first copy is another passage
    context     loss on the same last tokens, as many as the shortest of --contexts has, in rows of each of
                --contexts; gain over the shortest
    passkey     loss on five digits that were told --distances tokens before they are asked for, and in what
                part of the rows every one is the likeliest (--data needs its sentencepiece model)

Every language model that fairseq knows can be read. With --linear-window or --plain-linear its linear branch
reads otherwise than it was trained, that of --against does not. Records that are there are not measured
again.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Optional

import numpy
import sentencepiece
import torch

from runs.command_line import command_line, require
from runs.provenance import ROOT, data_name, provenance
from runs.reading import Reader, Scores, add_reading, check_reading, read_tokens, scores
from runs.table import Table
from text.numbered import EOS
from text.pieces import MODEL

__all__ = ["YARDSTICKS", "copies", "distances", "main", "passkeys"]

KEY = ("data", "split", "checkpoint", "yardstick", "value", "x", "against")
COLUMNS = (
    *("commit", "date", "device", "torch", "name", *KEY),
    *("n", "tokens", "loss", "gain", "accuracy", "status"),
)
SHOWN = ("name", "yardstick", "n", "x", "tokens", "loss", "gain", "accuracy", "status")
DIGITS = 5
TOLD, ASKED = "The pass key is {}. Remember it.", "What is the pass key? The pass key is"

Read = Callable[[torch.Tensor], Scores]
Rows = Iterator[dict]


def distances(rows: torch.Tensor) -> torch.Tensor:
    """How far behind each predicted token its last occurrence lies in the row: ``(b, n)`` of ``(b, n + 1)``.

    The token before it has distance 1; 0 is one that the row has not had.
    """
    order = rows.argsort(dim=1, stable=True)
    sorted_rows = rows.gather(1, order)
    again = sorted_rows[:, 1:] == sorted_rows[:, :-1]
    found = torch.zeros_like(order)
    found.scatter_(1, order[:, 1:], (order[:, 1:] - order[:, :-1]) * again)
    return found[:, 1:]


def copies(tokens: torch.Tensor, starts: list[int], passage: int, distance: int) -> tuple:
    """Rows of text that end with a second copy of their first tokens, and the same with another beginning.

    Args:
        tokens: Of a split.
        starts: Where the rows begin in it.
        passage: Tokens of the copy.
        distance: From the first copy's begin to the second's, ``passage`` or more.

    Returns:
        Two tensors ``(starts, distance + passage)`` whose last ``passage`` tokens are the same.
    """
    text = torch.stack([tokens[start : start + distance] for start in starts])
    second = text[:, :passage]
    other = torch.cat((second.roll(1, dims=0), text[:, passage:]), dim=1)
    return tuple(torch.cat((beginning, second), dim=1) for beginning in (text, other))


def passkeys(
    texts: list[torch.Tensor], processor: sentencepiece.SentencePieceProcessor, seed: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows that tell a number, go on with a text, and ask for the number.

    Args:
        texts: Pieces of ``processor``; of each, the end gives way to the sentence that tells the number, so
            that its length is the distance from where the number is told to where it is asked for.
        processor: Of the data.
        seed: Draws the numbers.

    Yields:
        The row ``(n + 1,)``, and how many tokens at its end are the number.

    Raises:
        ValueError: a text is too short.
    """
    drawn = random.Random(seed)
    for text in texts:
        key = " ".join(drawn.choices("0123456789", k=DIGITS))
        told = [*processor.encode(TOLD.format(key)), EOS]
        asked, whole = (processor.encode(words) for words in (ASKED, f"{ASKED} {key}"))
        if len(told) > len(text):
            raise ValueError(f"--distances {len(text)} is too short for a passkey; needed: {len(told)}")
        row = [*told, *text[: len(text) - len(told)].tolist(), *whole]
        yield torch.tensor(row), len(whole) - len(asked)


class Text:
    """A split, and how to take rows of it.

    Args:
        options: ``data``, ``split``, ``samples`` and ``seed``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokens, _ = read_tokens(options.data, options.split)

    def starts(self, length: int) -> list[int]:
        """Where ``--samples`` stretches of text begin, evenly spread.

        Raises:
            ValueError: the split is shorter.
        """
        room = len(self.tokens) - length
        if room < 0:
            raise ValueError(f"--split {self.options.split} has {len(self.tokens)} tokens; needed: {length}")
        return numpy.linspace(0, room, self.options.samples).astype(int).tolist()


def measure_recurrence(text: Text, n: int, read: Read, other: Optional[Read]) -> Rows:
    """Loss by distance, and of all."""
    if len(text.tokens) <= n:
        raise ValueError(f"--split {text.options.split} has {len(text.tokens)} tokens; needed: {n + 1}")
    rows = text.tokens[: (len(text.tokens) - 1) // n * n + 1].unfold(0, n + 1, n)
    losses, far = read(rows).losses.double(), distances(rows)
    gains = None if other is None else other(rows).losses.double() - losses
    edges = [1, *(edge for edge in text.options.edges if edge < n), n + 1]
    cells = {f"{a}-{b - 1}": (far >= a) & (far < b) for a, b in pairwise(edges)}
    for x, cell in {**cells, "new": far == 0, "all": far >= 0}.items():
        if cell.any():
            gain = "" if gains is None else gains[cell].mean().item()
            yield dict(n=n, x=x, tokens=int(cell.sum()), loss=losses[cell].mean().item(), gain=gain)


def measure_copy(text: Text, distance: int, read: Read, other: Optional[Read]) -> Rows:
    """Loss on the second copy; its first token, which nothing announces, is left out."""
    passage = text.options.passage
    if distance < passage:
        raise ValueError(f"--distances {distance} is not allowed with --passage {passage}; allowed: no less")
    pairs = copies(text.tokens, text.starts(distance), passage, distance)
    copied, alone = (read(rows).losses[:, 1 - passage :].double() for rows in pairs)
    gain = (alone - copied).mean().item()
    yield dict(n=distance + passage, tokens=copied.numel(), loss=copied.mean().item(), gain=gain)


def measure_context(text: Text, n: int, read: Read, other: Optional[Read]) -> Rows:
    """Loss of the last tokens, which are the same at each length of the rows."""
    last, contexts = min(text.options.contexts), text.options.contexts
    longest = max(contexts) + 1
    ends = [start + longest for start in text.starts(longest)]
    losses, alone = (
        read(torch.stack([text.tokens[end - size - 1 : end] for end in ends]), last=last).losses.double()
        for size in (n, last)
    )
    gain = (alone - losses).mean().item()
    yield dict(n=n, tokens=losses.numel(), loss=losses.mean().item(), gain=gain)


def measure_passkey(text: Text, distance: int, read: Read, other: Optional[Read]) -> Rows:
    """Loss and accuracy of the number."""
    path = text.options.data / MODEL
    if not path.exists():
        raise ValueError(f"--data {text.options.data} has no {MODEL}, which passkey needs")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [text.tokens[start : start + distance] for start in text.starts(distance)]
    losses, right = [], []
    for row, answer in passkeys(texts, processor, text.options.seed):
        found = read(row.unsqueeze(0), last=answer)
        losses.append(found.losses.flatten())
        right.append(bool(found.hits.all()))
    loss, accuracy = torch.cat(losses).double().mean().item(), sum(right) / len(right)
    yield dict(n=len(row) - 1, tokens=sum(map(len, losses)), loss=loss, accuracy=accuracy)


class Yardstick(NamedTuple):
    """How it is measured at each value of an option, and what its gain is over ("": --against)."""

    option: str
    measure: Callable[[Text, int, Read, Optional[Read]], Rows]
    over: str


YARDSTICKS = {
    "recurrence": Yardstick("row", measure_recurrence, ""),
    "copy": Yardstick("distances", measure_copy, "another passage"),
    "context": Yardstick("contexts", measure_context, "the shortest row"),
    "passkey": Yardstick("distances", measure_passkey, "-"),
}


def measure(reader: Reader, other: Optional[Reader], text: Text, table: Table) -> None:
    """Adds the records of one checkpoint that are missing."""
    options = text.options
    table.common["checkpoint"] = reader.digest

    def read_with(which: Reader) -> Read:
        return lambda rows, **more: scores(which.model, rows, options.device, **more)

    for name in options.yardsticks:
        yardstick = YARDSTICKS[name]
        own = yardstick.over or (other.name if other else "")
        cell = {"yardstick": name, "against": own}
        for value in getattr(options, yardstick.option):
            x = "all" if name == "recurrence" else value
            if table.has([reader.name], **cell, value=value, x=x):
                continue
            try:
                found = list(yardstick.measure(text, value, read_with(reader), other and read_with(other)))
                records = [{"x": x, **row, "status": "ok"} for row in found]
            except (ValueError, RuntimeError, AssertionError, IndexError) as error:
                records = [{"x": x, "status": f"error: {str(error)[:200]}"}]
            table.add([{"name": reader.name, "value": value, **cell, **_rounded(row)} for row in records])


def _rounded(row: dict) -> dict:
    """The cells of a record, its numbers with five digits behind the point."""
    return {name: f"{cell:.5f}" if isinstance(cell, float) else cell for name, cell in row.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "yardsticks.py")
    add_reading(parser)
    add = parser.add_argument
    add("--against", type=Path, metavar="PATH", help="checkpoint that recurrence compares with")
    add("--yardsticks", nargs="+", choices=YARDSTICKS, default=list(YARDSTICKS), help="some of them (all)")
    add("--row", type=int, nargs="+", default=[4096], metavar="N", help="of recurrence (4096)")
    add(
        "--edges", type=int, nargs="+", default=[128, 1024, 4096], metavar="N", help="where its classes begin"
    )
    add("--passage", type=int, default=64, metavar="N", help="of copy (64)")
    far = [64, 1024, 4096, 16384]
    add("--distances", type=int, nargs="+", default=far, metavar="N", help="of copy and passkey")
    rows = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    add("--contexts", type=int, nargs="+", default=rows, metavar="N", help="tokens a row, of context")
    add("--samples", type=int, default=64, metavar="N", help="rows of all but recurrence (64)")
    add("--seed", type=int, default=1, metavar="N", help="draws the numbers of passkey (1)")
    add("--output", type=Path, default=ROOT / "scripts" / "results" / "yardsticks.csv")
    options = parser.parse_args(arguments)
    check_reading(parser, options)
    require(parser, options, 1, "row", "distances", "contexts")
    require(parser, options, 2, "edges", "passage", "samples")
    if options.against and not options.against.exists():
        parser.error(f"--against {options.against} does not exist")
    options.edges = sorted(set(options.edges))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    origin = dict(data=data_name(options.data), split=options.split)
    table = Table(options.output, COLUMNS, KEY, SHOWN, {**provenance(options.device), **origin})
    text = Text(options)
    plain = argparse.Namespace(**{**vars(options), "linear_window": None, "plain_linear": False})
    other = options.against and Reader(options.against, plain)
    for path in options.checkpoints:
        measure(Reader(path, options), other, text, table)


if __name__ == "__main__":
    main()
