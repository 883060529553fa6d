"""How far a plan of trainings is, and how long the rest takes: on a terminal, and in a log as well."""

import time
from types import TracebackType
from typing import Optional

from tqdm import tqdm

__all__ = ["Progress", "counted", "duration"]


def counted(number: int, noun: str) -> str:
    """Such as "1 run" and "2 runs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time as one says it, such as ``2 h 10 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


class Progress:
    """A bar on a terminal; elsewhere a line for each run that ends.

    The time left is that of the work so far, for as much as is left; work of an earlier call tells nothing.

    Args:
        runs: Of the whole plan.
        weight: The sum of their weights, such as seconds.
        noun: What the runs are called.
    """

    def __init__(self, runs: int, weight: float, noun: str = "runs") -> None:
        self.runs, self.done, self.noun = runs, 0, noun
        self._left, self._worked, self._start = weight, 0.0, time.monotonic()
        shown = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=weight, bar_format=shown, smoothing=0, mininterval=0.5, disable=None)
        self._tell()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: Optional[type], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._bar.close()

    def skip(self, runs: int, weight: float) -> None:
        """Takes in runs that an earlier call has done."""
        self.done, self._left = self.done + runs, self._left - weight
        if not self._bar.disable:
            self._bar.n, self._bar.initial = self._bar.n + weight, self._bar.initial + weight
        self._tell()

    def work(self, weight: float) -> None:
        """Takes in a part of a run."""
        self._left, self._worked = self._left - weight, self._worked + weight
        self._bar.update(weight)

    def end(self) -> None:
        """Takes in that a run has ended."""
        self.done += 1
        self._tell()
        if self._bar.disable:
            print(f"{self._said()}{self._rest()}", flush=True)

    def _rest(self) -> str:
        if self.done == self.runs or not self._worked:
            return ""
        seconds = (time.monotonic() - self._start) * self._left / self._worked
        return f", about {duration(seconds)} left"

    def _tell(self) -> None:
        self._bar.set_description_str(self._said())

    def _said(self) -> str:
        return f"{self.done} of {self.runs} {self.noun} done"
