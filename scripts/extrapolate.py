"""Measures length extrapolation: the loss by position, on rows longer than those of the training.

    python scripts/extrapolate.py --data data-bin/books --checkpoints outputs/ablation/winners/*.pt

Each checkpoint reads a split as consecutive rows of each length. A record of the CSV is one checkpoint, one
length and one stretch of positions; the first stretch reaches up to the shortest length, each next one is as
long as all before it. "all" is the whole row. Losses are nats per token.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils
from torch import nn

import fairseq_flash  # noqa: F401  (registers the models of the checkpoints)
from runs.command_line import command_line, require
from runs.provenance import ROOT, data_name, provenance
from runs.table import Table

KEY = ("data", "split", "checkpoint", "n", "positions")
COLUMNS = ("commit", "date", "device", "torch", "name", *KEY, "tokens", "loss", "perplexity", "status")
SHOWN = ("name", "n", "positions", "loss", "status")
TOKENS_PER_BATCH = 16384


def read_tokens(data: Path, split: str) -> tuple[torch.Tensor, Dictionary]:
    """All tokens of a split, one document after the other."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    lines = data_utils.load_indexed_dataset(str(data / split), dictionary)
    if lines is None:
        raise ValueError(f"--split {split} is not in --data {data}")
    return torch.from_numpy(
        numpy.concatenate([lines[index].numpy() for index in range(len(lines))])
    ), dictionary


def stretches(n: int, shortest: int) -> Iterator[tuple[str, slice]]:
    """The stretches of positions of a row of ``n``, each with its name."""
    yield "all", slice(0, n)
    start, end = 0, shortest
    while start < n:
        yield f"{start}-{min(end, n)}", slice(start, min(end, n))
        start, end = end, 2 * end


@torch.no_grad()
def losses(model: nn.Module, tokens: torch.Tensor, n: int, device: str) -> torch.Tensor:
    """The loss of every prediction, (rows, n), of consecutive rows of ``n`` predictions."""
    rows = (len(tokens) - 1) // n
    inputs, targets = (tokens[begin : begin + rows * n].view(rows, n).long() for begin in (0, 1))
    found = []
    for begin in range(0, rows, max(1, TOKENS_PER_BATCH // n)):
        part = slice(begin, begin + max(1, TOKENS_PER_BATCH // n))
        features, _ = model.decoder.extract_features(inputs[part].to(device))
        for row, target in zip(features, targets[part].to(device), strict=True):
            logits = model.decoder.output_layer(row)
            found.append(nn.functional.cross_entropy(logits.float(), target, reduction="none").cpu())
    return torch.stack(found)


def measure(options: argparse.Namespace, path: Path, tokens: torch.Tensor, table: Table) -> None:
    """Adds the records of one checkpoint that are missing."""
    table.common["checkpoint"] = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
    waiting = [n for n in options.lengths if not table.has([path.stem], n=n, positions="all")]
    if not waiting:
        return
    overrides = {"data": str(options.data)}
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
    model.to(options.device).eval()
    for n in waiting:
        records = []
        try:
            found = losses(model, tokens, n, options.device)
        except (ValueError, RuntimeError, AssertionError) as error:
            records = [dict(name=path.stem, n=n, positions="all", status=f"error: {str(error)[:200]}")]
        else:
            for name, stretch in stretches(n, min(options.lengths)):
                loss = found[:, stretch].double().mean().item()
                count = found[:, stretch].numel()
                record = dict(name=path.stem, n=n, positions=name, tokens=count, status="ok")
                records.append({**record, "loss": f"{loss:.4f}", "perplexity": f"{math.exp(loss):.2f}"})
        table.add(records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "extrapolate.py")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that prepare_lm.py wrote")
    add("--checkpoints", type=Path, nargs="+", required=True, help="a record's name is the file's")
    add("--split", default="test")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens a row")
    add("--output", type=Path, default=ROOT / "scripts" / "results" / "extrapolation.csv")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    require(parser, options, 1, "lengths")
    for path in options.checkpoints:
        if not path.exists():
            parser.error(f"--checkpoints {path} does not exist")
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
