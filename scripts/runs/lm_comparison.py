"""The plan of a comparison of language models: which trainings, and what is measured of them."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from runs.plan import Earlier, as_words, recipe
from runs.progress import counted
from runs.provenance import ROOT
from runs.schedule import Finished, TrainingRun, fairseq_command
from runs.systems import BASELINE, architecture

__all__ = ["EVALUATED", "Budget", "Plan", "evaluated"]

#: Columns that the evaluation adds; losses are in nats per token, as everywhere.
EVALUATED = ("valid_tokens", "valid_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
SPEED_UPDATES = 16  # tell how fast a system is, where its budget is a time
STEPS = 3  # tell it well enough for an estimate
START = 15.0  # seconds that fairseq's tools take to start and to save, about
GUESS = 1000.0  # tokens a second of a system whose speed could not be measured
VALIDATED = 32768  # tokens that a validation during training looks at; the evaluation takes the whole split


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


@dataclass(frozen=True)
class Plan:
    """The runs that a command line asks for, in stages that build upon each other.

    Attributes:
        data: Folder of the data.
        output: CSV of the runs.
        shared: The columns that all runs share.
        systems: Names of ``systems.py``.
        size: One of ``systems.SIZES``.
        lengths: Tokens a row of text.
        seeds: One final run each.
        budget: Of a final run.
        rate_budget: Of a run that tries a learning rate.
        rates: Learning rates that are known, by system.
        grid: Those that the other systems try.
        tokens_per_update: Of a batch of any system.
        max_tokens: Of it that are in memory at a time.
        half: Whether to train in bfloat16.
        on_gpu: Whether fairseq trains on a GPU.
        eval_shards: One block in so many is evaluated.
        counts: What prepare_lm.py counted of the split "valid"; None where another tool made the data.
        extra: More arguments of every training.
    """

    data: Path
    output: Path
    shared: dict[str, Any]
    systems: list[str]
    size: str
    lengths: list[int]
    seeds: list[int]
    budget: Budget
    rate_budget: Budget
    rates: dict[str, float]
    grid: list[float]
    tokens_per_update: int
    max_tokens: int
    half: bool
    on_gpu: bool
    eval_shards: int
    counts: Optional[dict]
    extra: list[str]

    def budget_of(self, stage: str) -> Budget:
        """Of a run of the stage "final", "rate" or "speed"."""
        few = Budget(SPEED_UPDATES if self.budget.unit == "minutes" else STEPS, "updates")
        return {"final": self.budget, "rate": self.rate_budget}.get(stage, few)

    @property
    def tuned(self) -> list[str]:
        """Systems that try rates first."""
        return [system for system in self.systems if system not in self.rates]

    def told(self) -> Iterator[str]:
        """The plan in words, a line each."""
        lengths = " and ".join(map(str, self.lengths))
        yield f"{', '.join(self.systems)}, size {self.size}, rows of {lengths} tokens"
        if self.tuned:
            rates = ", ".join(f"{rate:g}" for rate in self.grid)
            each = f"{len(self.tuned)} x {len(self.grid)} runs of {self.rate_budget}"
            yield f"rates {rates} of {', '.join(self.tuned)}: {each}"
        shape = {"system": self.systems, "length": self.lengths, "seed": self.seeds}
        cells = " x ".join(counted(len(each), noun) for noun, each in shape.items())
        yield f"final: {cells}, runs of {self.budget}, evaluated on {self.part}"
        if self.on_gpu and "--compile" not in self.extra:
            yield "not compiled; with -- --compile --optimizer fused_adam all but transformer_lm are faster"

    @property
    def part(self) -> str:
        """What is evaluated."""
        shards = self.eval_shards
        return f"{'the whole' if shards == 1 else f'one block in {shards} of the'} split valid"

    def probes(self) -> list[TrainingRun]:
        """Short trainings that tell how fast each system is at each length."""
        cells = [(system, n) for n in self.lengths for system in self.systems]
        return [self.run("speed", system, n, self.seeds[0], self.grid[0]) for system, n in cells]

    def seconds(self, stage: str, system: str, n: int) -> float:
        """About as long as a run takes, its start, validations and evaluation with it."""
        speed = self.speed(system, n) or GUESS
        tokens = self.tokens_per_update * self.budget_of(stage).updates(self.tokens_per_update, speed)
        split = self.counts["tokens"] if self.counts else VALIDATED
        read = 5 * min(split, VALIDATED) + split / self.eval_shards
        # A forward pass alone is a third of a training step.
        return START + (tokens + read / 3) / speed

    def stages(self) -> Iterator[list[TrainingRun]]:
        """One list of runs after the other; each reads what the earlier ones, and the probes, measured."""
        first = (self.lengths[0], self.seeds[0])
        if self.tuned:
            fast = [system for system in self.tuned if self.can_run(system, first[0])]
            yield [self.run("rate", system, *first, lr) for lr in self.grid for system in fast]
        cells = [(n, seed) for n in self.lengths for seed in self.seeds]
        yield [
            self.run("final", system, *cell, self.best_rate(system))
            for cell in cells
            for system in self.systems
            if self.can_run(system, cell[0])
        ]

    def run(self, stage: str, system: str, n: int, seed: int, lr: float) -> TrainingRun:
        """One training, evaluated at its end unless it only tells the speed."""
        budget = self.budget_of(stage)
        updates = budget.updates(self.tokens_per_update, self.speed(system, n) or 0.0)
        record = {"name": system, "stage": stage, "n": n, "seed": seed, "lr": lr, "budget": str(budget)}
        saving = {
            **{"--save-interval-updates": max(1, min(updates // 5, 500)), "--keep-interval-updates": 1},
            **{"--no-epoch-checkpoints": "", "--max-valid-steps": max(1, VALIDATED // self.max_tokens)},
        }
        if stage == "speed":
            saving = {"--no-save": "", "--disable-validation": ""}
        return TrainingRun(
            tuple(self.words(system, n, recipe(lr, updates, seed), saving)),
            updates,
            record,
            weight=1.0 if stage == "speed" else self.seconds(stage, system, n),
            measure=None if stage == "speed" else self.evaluation(system, n),
        )

    def words(self, system: str, n: int, training: dict, saving: dict) -> list[str]:
        """The arguments of fairseq-train."""
        own = {"--dropout": 0, "--update-freq": self.tokens_per_update // self.max_tokens}
        own["--bf16"] = "" if self.half else None
        options = as_words({**own, **training, **saving})
        extra = [word for word in self.extra if word != "--compile" or self.is_compiled(system)]
        return [*self.task(n), *architecture(system, self.size), *options, *extra]

    def is_compiled(self, system: str) -> bool:
        """Whether its trainings are: fairseq's own models cannot be."""
        return "--compile" in self.extra and system != BASELINE

    def task(self, n: int) -> list[str]:
        """What training and evaluation have in common."""
        options = {
            **{"--user-dir": ROOT / "fairseq_flash", "--task": "language_modeling"},
            **{"--tokens-per-sample": n, "--batch-size": self.max_tokens // n},
            **{"--required-batch-size-multiple": 1, "--num-workers": 2 if self.on_gpu else 0},
            "--cpu": None if self.on_gpu else "",
        }
        return [str(self.data), *as_words(options)]

    def evaluation_command(self, system: str, n: int, checkpoint: Path) -> list[str]:
        """fairseq-eval-lm on rows of ``n``."""
        options = {
            **{"--path": checkpoint, "--gen-subset": "valid"},
            **{"--num-shards": self.eval_shards, "--shard-id": 0},
            # A split is read before a compiler is done.
            "--model-overrides": "{'compile': False}" if self.is_compiled(system) else None,
        }
        return fairseq_command("eval_lm", *self.task(n), *as_words(options))

    def evaluation(self, system: str, n: int) -> Callable[[Finished], dict]:
        """What is measured at the end of a training."""

        def evaluate(finished: Finished) -> dict:
            command = self.evaluation_command(system, n, finished.checkpoint)
            return evaluated(finished.call(command), self.counts)

        return evaluate

    def earlier(self, stage: str) -> Earlier:
        """What the runs of a stage have written."""
        return Earlier(self.output, {**self.shared, "stage": stage, "budget": str(self.budget_of(stage))})

    def speed(self, system: str, n: int) -> Optional[float]:
        """Tokens a second of a system; None if measuring it failed, or has not been done."""
        found = self.earlier("speed").find(name=system, n=n)
        return float(found[-1]["tokens_per_second"]) if found else None

    def can_run(self, system: str, n: int) -> bool:
        """Whether it is known how many updates a run has."""
        return self.budget.unit != "minutes" or self.speed(system, n) is not None

    def best_rate(self, system: str) -> float:
        """The given rate, or the one with the lowest loss; the first of the grid if all of them failed."""
        if system in self.rates:
            return self.rates[system]
        best = self.earlier("rate").best(name=system, lr=set(self.grid))
        return float(best["lr"]) if best else self.grid[0]


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
    record = {
        "valid_loss": f"{loss * math.log(2):.5g}",
        "valid_tokens": tokens[1].replace(",", ""),
        "valid_perplexity": f"{power(loss):.5g}",
    }
    if counts:
        per_byte, per_word = (loss * counts["tokens"] / counts[unit] for unit in ("bytes", "words"))
        record["bits_per_byte"] = f"{per_byte:.5g}"
        record["byte_perplexity"], record["word_perplexity"] = (
            f"{power(per_byte):.5g}",
            f"{power(per_word):.5g}",
        )
    return record


def power(bits: float) -> float:
    """Of two; infinite where a number ends."""
    return 2**bits if bits < 1024 else math.inf
