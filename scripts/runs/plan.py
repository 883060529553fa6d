"""What all plans of trainings share: the recipe, and the rows that earlier stages wrote."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from runs.table import read

__all__ = ["as_words", "lowest", "recipe", "succeeded"]


def recipe(rate: float, updates: int, seed: int, *, weight_decay: float = 0.01) -> dict[str, Any]:
    """The optimizer and the schedule: one in ten updates is warm-up, then the rate falls to 0."""
    return {
        **{"--optimizer": "adam", "--adam-betas": "(0.9, 0.98)", "--weight-decay": weight_decay},
        **{"--clip-norm": 1.0, "--lr": rate, "--lr-scheduler": "polynomial_decay"},
        **{"--warmup-updates": max(1, updates // 10), "--total-num-update": updates, "--seed": seed},
    }


def as_words(options: dict[str, Any]) -> Iterator[str]:
    """Options as a command line has them: one with the value "" is a switch, one with None is left out."""
    for option, value in options.items():
        if value is not None:
            yield option
            if value != "":
                yield str(value)


def succeeded(path: Path, **cells: Any) -> list[dict[str, Any]]:
    """Rows of a CSV file of trainings that ended well and have these cells.

    Args:
        path: Of the file.
        cells: Columns with their values, or with a set of values.

    Returns:
        The rows in order, each with its ``loss``; one that is not finite is infinite.
    """
    wanted = {name: value if isinstance(value, set) else {value} for name, value in cells.items()}
    wanted = {name: {str(value) for value in values} for name, values in wanted.items()}
    found = []
    for row in read(path):
        if row["status"] == "ok" and all(row[name] in values for name, values in wanted.items()):
            loss = float(row["valid_loss"] or "nan")
            found.append({**row, "loss": loss if math.isfinite(loss) else math.inf})
    return found


def lowest(rows: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """The row with the lowest finite loss, the first of several; None if there is none."""
    finite = [row for row in rows if row["loss"] < math.inf]
    return min(finite, key=lambda row: row["loss"], default=None)
