"""What all plans of trainings share: the recipe, and the records that earlier stages wrote."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from runs.table import read

__all__ = ["Earlier", "as_words", "lowest", "recipe"]


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


@dataclass(frozen=True)
class Earlier:
    """What the runs of a plan have written so far.

    Attributes:
        path: Of their CSV file.
        shared: The columns that are the same in all of them.
    """

    path: Path
    shared: dict[str, Any]

    def every(self, **cells: Any) -> list[dict[str, Any]]:
        """Records of runs that have these cells, those that failed among them.

        Args:
            cells: Columns with their values, or with a set of values.

        Returns:
            The records in order, each with its ``loss``; that of a run that failed, or whose loss is not
            finite, is infinite.
        """
        wanted = {
            name: set(map(str, value)) if isinstance(value, set) else {str(value)}
            for name, value in {**self.shared, **cells}.items()
        }
        found = []
        for record in read(self.path):
            if all(record[name] in values for name, values in wanted.items()):
                loss = float(record["valid_loss"] or "nan") if record["status"] == "ok" else math.inf
                found.append({**record, "loss": loss if math.isfinite(loss) else math.inf})
        return found

    def find(self, **cells: Any) -> list[dict[str, Any]]:
        """As :meth:`every`, those of runs that ended well."""
        return [record for record in self.every(**cells) if record["status"] == "ok"]

    def finite(self, **cells: Any) -> list[dict[str, Any]]:
        """As :meth:`every`, those with a finite loss."""
        return [record for record in self.find(**cells) if record["loss"] < math.inf]

    def best(self, **cells: Any) -> Optional[dict[str, Any]]:
        """As :meth:`find`, the one with the lowest loss; None if none is finite."""
        return lowest(self.find(**cells))


def lowest(records: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """The record with the lowest finite loss, the first of several; None if there is none."""
    finite = [record for record in records if record["loss"] < math.inf]
    return min(finite, key=lambda record: record["loss"], default=None)
