"""The plan of a comparison: which trainings, with which options, and what is measured of them."""

import argparse
import csv
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from runs.provenance import ROOT
from runs.schedule import Finished, TrainingRun, fairseq_command
from runs.systems import architecture

__all__ = ["EVALUATED", "Budget", "Plan", "evaluated", "rows_of"]

#: Columns that the evaluation adds; losses are in nats per token, as everywhere.
EVALUATED = ("valid_tokens", "valid_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
SPEED_UPDATES = 40  # tell how fast a system is
VALIDATED = (
    32768  # tokens that each validation during training looks at; the evaluation takes the whole split
)


class Budget(NamedTuple):
    """How long a system trains: an amount of "tokens", "updates" or "minutes"."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads such as ``1000000tokens``.

        Raises:
            ValueError: it is something else.
        """
        found = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*(?:e[0-9]+)?) ?(tokens|updates|minutes)", text)
        if not found or not float(found[1]) > 0:
            raise ValueError(f"{text!r} is not allowed; allowed: such as 1000000tokens, 250updates, 5minutes")
        return cls(float(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.amount:.12g}{self.unit}"

    def updates(self, tokens_per_update: int, tokens_per_second: float = 0.0) -> int:
        """As updates, of a system that trains that fast."""
        tokens = {"tokens": self.amount, "updates": self.amount * tokens_per_update}
        tokens["minutes"] = 60 * self.amount * tokens_per_second
        return max(1, math.ceil(tokens[self.unit] / tokens_per_update))


class Plan:
    """The runs that the command line asks for, in stages that build upon each other.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.budgets = {"final": options.budget, "rate": options.lr_budget}
        self.budgets["speed"] = Budget(SPEED_UPDATES, "updates")

    @property
    def tuned(self) -> list[str]:
        """Systems that try rates first."""
        return [system for system in self.options.systems if system not in self.options.lr]

    def weight(self) -> float:
        """Of all stages, for the progress."""
        options = self.options
        cells = len(options.systems) * len(options.tokens_per_sample)
        numbers = {"final": cells * len(options.seeds), "rate": len(self.tuned) * len(options.lr_grid)}
        numbers["speed"] = cells if options.budget.unit == "minutes" else 0
        return sum(number * self.weight_of(stage) for stage, number in numbers.items())

    def weight_of(self, stage: str) -> float:
        """Of a run: its tokens, or its seconds where the budget is a time."""
        if self.options.budget.unit == "minutes":
            return 60 * (1.0 if stage == "speed" else self.budgets[stage].amount)
        tokens_per_update = self.options.tokens_per_update
        return tokens_per_update * self.budgets[stage].updates(tokens_per_update)

    def stages(self) -> Iterator[list[TrainingRun]]:
        """One list of runs after the other; each reads what the earlier ones measured."""
        options, first = self.options, (self.options.tokens_per_sample[0], self.options.seeds[0])
        if options.budget.unit == "minutes":
            grid = options.lr_grid[0]
            cells = [(system, n) for n in options.tokens_per_sample for system in options.systems]
            yield [self.run("speed", system, n, first[1], grid) for system, n in cells]
        if self.tuned:
            fast = [system for system in self.tuned if self.speed(system, first[0]) is not None]
            yield [self.run("rate", system, *first, lr) for lr in options.lr_grid for system in fast]
        cells = [(n, seed) for n in options.tokens_per_sample for seed in options.seeds]
        yield [
            self.run("final", system, *cell, self.best_rate(system))
            for cell in cells
            for system in options.systems
            if self.speed(system, cell[0]) is not None
        ]

    def run(self, stage: str, system: str, n: int, seed: int, lr: float) -> TrainingRun:
        """One training, evaluated at its end unless it only tells the speed."""
        budget, tokens_per_update = self.budgets[stage], self.options.tokens_per_update
        updates = budget.updates(tokens_per_update, self.speed(system, n) or 0.0)
        row = {"name": system, "stage": stage, "n": n, "seed": seed, "lr": lr, "budget": str(budget)}
        return TrainingRun(
            tuple(map(str, self.words(system, n, seed, lr, updates))),
            updates,
            row,
            weight=self.weight_of(stage),
            measure=None if stage == "speed" else self.evaluation(n),
        )

    def words(self, system: str, n: int, seed: int, lr: float, updates: int) -> list:
        """The arguments of fairseq-train."""
        options, every = self.options, max(1, min(updates // 5, 500))
        words = [options.data, *self.task(n), *architecture(system, options.size), "--dropout", 0]
        words += ["--update-freq", options.tokens_per_update // options.max_tokens, "--seed", seed]
        words += ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", 0.01]
        words += ["--clip-norm", 1.0, "--lr", lr, "--lr-scheduler", "polynomial_decay"]
        words += ["--warmup-updates", max(1, updates // 10), "--total-num-update", updates]
        words += ["--save-interval-updates", every, "--keep-interval-updates", 1, "--no-epoch-checkpoints"]
        words += ["--max-valid-steps", max(1, VALIDATED // options.max_tokens)]
        words += ["--bf16"] if options.dtype == "bfloat16" else []
        return [*words, *options.extra]

    def task(self, n: int) -> list:
        """What training and evaluation have in common."""
        options = self.options
        words = ["--user-dir", ROOT / "fairseq_flash", "--task", "language_modeling"]
        words += ["--tokens-per-sample", n, "--batch-size", options.max_tokens // n]
        words += ["--required-batch-size-multiple", 1]
        return [*words, *(["--num-workers", 2] if self.on_gpu else ["--num-workers", 0, "--cpu"])]

    @property
    def on_gpu(self) -> bool:
        """Whether fairseq trains on a GPU."""
        return self.options.device.startswith("cuda")

    def evaluation_command(self, n: int, checkpoint: Path) -> list[str]:
        """fairseq-eval-lm on rows of ``n``."""
        shards = ["--num-shards", self.options.eval_shards, "--shard-id", 0]
        words = [self.options.data, *self.task(n), "--path", checkpoint, "--gen-subset", "valid", *shards]
        return fairseq_command("eval_lm", *words)

    def evaluation(self, n: int) -> Callable[[Finished], dict]:
        """What is measured at the end of a training."""

        def evaluate(finished: Finished) -> dict:
            command = self.evaluation_command(n, finished.checkpoint)
            return evaluated(finished.call(command), self.options.counts)

        return evaluate

    def rows(self, stage: str) -> list[dict]:
        """Successful rows of a stage of this comparison."""
        budget = str(self.budgets[stage])
        rows = [
            row
            for row in rows_of(self.options, self.options.output)
            if (row["stage"], row["budget"]) == (stage, budget)
        ]
        return [row for row in rows if row["status"] == "ok" and math.isfinite(float(row["valid_loss"]))]

    def speed(self, system: str, n: int) -> Optional[float]:
        """Tokens a second of a system, where the budget is a time; None if measuring it failed."""
        if self.options.budget.unit != "minutes":
            return 0.0
        rows = [row for row in self.rows("speed") if (row["name"], int(row["n"])) == (system, n)]
        return float(rows[-1]["tokens_per_second"]) if rows else None

    def best_rate(self, system: str) -> float:
        """The given rate, or the one with the lowest loss; the first of the grid if all of them failed."""
        if system in self.options.lr:
            return self.options.lr[system]
        rows = [row for row in self.rows("rate") if row["name"] == system]
        rows = [row for row in rows if float(row["lr"]) in self.options.lr_grid]
        best = min(rows, key=lambda row: float(row["valid_loss"]), default={"lr": self.options.lr_grid[0]})
        return float(best["lr"])


def evaluated(output: str, counts: Optional[dict]) -> dict:
    """The columns that fairseq-eval-lm's output tells, with what prepare_lm.py counted.

    Raises:
        RuntimeError: it evaluated nothing.
    """
    tokens = re.search(r"Evaluated ([\d,]+) tokens", output)
    bits = re.search(r"Loss \(base 2\): (-?[\d.]+|nan|inf)", output)
    if not tokens or not bits or tokens[1] == "0":
        raise RuntimeError("fairseq-eval-lm evaluated nothing: " + output.strip().rpartition("\n")[2])
    loss = float(bits[1])
    row = {
        "valid_loss": f"{loss * math.log(2):.5g}",
        "valid_tokens": tokens[1].replace(",", ""),
        "valid_perplexity": f"{power(loss):.5g}",
    }
    if counts:
        per_byte, per_word = (loss * counts["tokens"] / counts[unit] for unit in ("bytes", "words"))
        row["bits_per_byte"] = f"{per_byte:.5g}"
        row["byte_perplexity"], row["word_perplexity"] = f"{power(per_byte):.5g}", f"{power(per_word):.5g}"
    return row


def power(bits: float) -> float:
    """Of two; infinite where a number ends."""
    return 2**bits if bits < 1024 else math.inf


def rows_of(options: argparse.Namespace, path: Path) -> list[dict]:
    """Rows of a CSV that were measured as this command measures, failed ones among them."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if all(row[name] == str(value) for name, value in options.shared.items())]
