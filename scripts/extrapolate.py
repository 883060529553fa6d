"""Measures length extrapolation: the loss by position, on rows longer than those of the training.

    python scripts/extrapolate.py --data data-bin/books --checkpoints outputs/ablation/winners/*.pt

Each checkpoint reads a split as consecutive rows of each length. A record of the CSV is one checkpoint, one
length and one stretch of positions; the first stretch reaches up to the shortest length, each next one is as
long as all before it. "all" is the whole row. Losses are nats per token. --linear-window and --plain-linear
change how a trained linear branch reads; the name of the record says so.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from runs.command_line import command_line, require
from runs.provenance import ROOT, data_name, provenance
from runs.reading import Reader, add_reading, check_reading, read_tokens, scores
from runs.table import Table

KEY = ("data", "split", "checkpoint", "n", "positions")
COLUMNS = ("commit", "date", "device", "torch", "name", *KEY, "tokens", "loss", "perplexity", "status")
SHOWN = ("name", "n", "positions", "loss", "status")


def stretches(n: int, shortest: int) -> Iterator[tuple[str, slice]]:
    """The stretches of positions of a row of ``n``, each with its name."""
    yield "all", slice(0, n)
    start, end = 0, shortest
    while start < n:
        yield f"{start}-{min(end, n)}", slice(start, min(end, n))
        start, end = end, 2 * end


def measure(options: argparse.Namespace, path: Path, tokens: torch.Tensor, table: Table) -> None:
    """Adds the records of one checkpoint that are missing."""
    reader = Reader(path, options)
    table.common["checkpoint"] = reader.digest
    for n in options.lengths:
        if table.has([reader.name], n=n, positions="all"):
            continue
        records = []
        try:
            inputs = tokens[: (len(tokens) - 1) // n * n + 1].unfold(0, n + 1, n)
            found = scores(reader.model, inputs, options.device).losses
        except (ValueError, RuntimeError, AssertionError) as error:
            failed = f"error: {str(error)[:200]}"
            records = [dict(name=reader.name, n=n, positions="all", status=failed)]
        else:
            for name, stretch in stretches(n, min(options.lengths)):
                loss = found[:, stretch].double().mean().item()
                record = dict(name=reader.name, n=n, positions=name)
                record |= dict(tokens=found[:, stretch].numel(), status="ok")
                records.append({**record, "loss": f"{loss:.4f}", "perplexity": f"{math.exp(loss):.2f}"})
        table.add(records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "extrapolate.py")
    add_reading(parser)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens a row")
    add("--output", type=Path, default=ROOT / "scripts" / "results" / "extrapolation.csv")
    options = parser.parse_args(arguments)
    require(parser, options, 1, "lengths")
    check_reading(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    origin = dict(data=data_name(options.data), split=options.split)
    table = Table(options.output, COLUMNS, KEY, SHOWN, {**provenance(options.device), **origin})
    tokens, _ = read_tokens(options.data, options.split)
    for path in options.checkpoints:
        measure(options, path, tokens, table)


if __name__ == "__main__":
    main()
