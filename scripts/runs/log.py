"""What fairseq-train writes with ``--log-format json``, as numbers."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, Optional

__all__ = ["CURVE_COLUMNS", "MEASURED", "Log", "last_test_accuracy"]

#: The columns of a training; losses in nats per token, memory in bytes.
MEASURED = (
    *("parameters", "updates", "tokens", "seconds", "tokens_per_second", "peak_memory"),
    *("train_loss", "valid_loss", "status"),
)
#: Columns of a loss curve, beside those that tell the training.
CURVE_COLUMNS = ("updates", "tokens", "seconds", "split", "loss")


@dataclass
class Log:
    """A log that may still be growing; a resumed training repeats updates, of which the last count.

    Attributes:
        path: Of the file.
        offset: Byte from which on it is read.
    """

    path: Path
    offset: int = 0
    intervals: list[dict] = field(default_factory=list)
    epochs: list[dict] = field(default_factory=list)
    valid: list[dict] = field(default_factory=list)
    parameters: Optional[int] = None
    total_gb: Optional[float] = None
    updates: int = 0

    def read(self) -> list[tuple[str, dict]]:
        """Takes in the whole lines that are new; returns their numbers, each with what they are of."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            text = stream.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        return list(filter(None, map(self._take, text.decode(errors="replace").splitlines())))

    def _take(self, line: str) -> Optional[tuple[str, dict]]:
        if found := re.search(r"num\. shared model params: ([\d,]+)", line):
            self.parameters = int(found[1].replace(",", ""))
        elif found := re.search(r"total memory = ([\d.]+)", line):
            self.total_gb = float(found[1])
        elif found := re.search(r".*\| (train_inner|train|valid) \| (\{.*\})", line):
            try:
                numbers = json.loads(found[2]).items()
            except json.JSONDecodeError:
                return None  # a crash tore a line, which the next process went on with
            point = {name.removeprefix(f"{found[1]}_"): _number(value) for name, value in numbers}
            self.updates = int(point["num_updates"])
            known = {"train_inner": self.intervals, "train": self.epochs, "valid": self.valid}[found[1]]
            known[:] = [old for old in known if old["num_updates"] < self.updates]
            known.append(point)
            return found[1], point
        return None

    def tail(self) -> str:
        """The last line that says anything."""
        lines = self.path.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "nothing was logged")

    def tokens_per_update(self) -> float:
        """The mean of the intervals."""
        return mean(interval["wpb"] for interval in self.intervals)

    def speed(self) -> float:
        """Tokens a second: the median of the intervals, without the first, in which everything is set up."""
        return median(point["wps"] for point in self.intervals[1:] or self.intervals or self.epochs)

    def curve(self) -> list[dict]:
        """Loss by update, tokens and seconds; seconds are tokens at the median speed."""
        points = [("train", point) for point in self.intervals] + [("valid", point) for point in self.valid]
        return [
            {**self._place(point["num_updates"]), "split": split, "loss": _loss(point)}
            for split, point in points
        ]

    def gpu_bytes(self) -> Optional[int]:
        """Of a GPU at its fullest; None without one."""
        free = [interval["gb_free"] for interval in self.intervals if "gb_free" in interval]
        return int((self.total_gb - min(free)) * 2**30) if self.total_gb and free else None

    def measured(self, peak_bytes: int) -> dict[str, Any]:
        """The columns of ``MEASURED``, of a process that took ``peak_bytes``."""
        last = self.intervals[-max(1, len(self.intervals) // 10) :]
        return dict(
            parameters=self.parameters,
            **self._place(self.updates),
            tokens_per_second=f"{self.speed():.4g}",
            peak_memory=self.gpu_bytes() or peak_bytes,
            train_loss=f"{mean(map(_loss, last)):.5g}",
            valid_loss=f"{_loss(self.valid[-1]):.5g}" if self.valid else "",
            status="ok",
        )

    def _place(self, updates: float) -> dict[str, Any]:
        tokens = updates * self.tokens_per_update()
        return {"updates": int(updates), "tokens": round(tokens), "seconds": f"{tokens / self.speed():.4g}"}


def _loss(point: dict) -> float:
    """Nats per token of a logged point; fairseq logs bits, and the loss without label smoothing apart."""
    return round(point.get("nll_loss", point["loss"]) * math.log(2), 5)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def last_test_accuracy(log: Path) -> float:
    """Per cent of the test split, from the log of a training that validates on it too."""
    return float(json.loads(re.findall(r"\| test \| (\{.*\})", log.read_text())[-1])["test_accuracy"])
