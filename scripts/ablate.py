"""Measures the defaults: one choice at a time, by short trainings on one text.

    python scripts/ablate.py --data data-bin/books [--device cuda --jobs 12]

Three stages, each once, in one CSV; a second run goes on where the first ended. "learning rate": every
system with each rate. "factor": around flash_lm_tiny, and around the paper's settings at that size, one
choice changed, at the best rate of its base. "seeds": two more seeds for the best two values of a factor
whose losses differ by less than 0.02. With --stages winner, the systems at their best rates for more tokens;
their checkpoints stay in the folder.
"""

import argparse
import csv
import math
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Optional

import torch
from measuring import ROOT, Table, commit, device_name
from training_runs import CURVE_COLUMNS, MEASURED, Finished, TrainingRun, carry_out

KEY = ("stage", "base", "factor", "value", "lr", "seed", "n", "budget")
COLUMNS = ("commit", "date", "device", "torch", "jobs", "name", *KEY, *MEASURED)
CURVES = ("name", *KEY, *CURVE_COLUMNS)
SHOWN = ("name", "factor", "value", "lr", "seed", "valid_loss", "status")

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SMALL_GAP = 0.02  # nats; less than this is looked at with more seeds
TOKENS_PER_UPDATE = 4096

_OURS = (
    *("flash_lm", "flash_quad_lm", "flash_local_lm", "flash_global_lm"),
    *("transformer_plus_lm", "transformer_pp_lm", "mc_transformer_pp_lm"),
)
#: Options as a dictionary: "" for a switch, None for one that a base sets and a choice takes away.
_PAPER = {"--init": "paper", "--scaled-sin": "", "--linear-norm": "chunk"}
#: What is trained, by name: fairseq-train's options.
SYSTEMS = {
    **{name: {"--arch": f"{name}_tiny"} for name in _OURS},
    "flash_lm chunk": {"--arch": "flash_lm_tiny", "--linear-norm": "chunk"},
    "flash_lm_paper": {"--arch": "flash_lm_tiny", **_PAPER},
    "transformer_lm": {
        **{"--arch": "transformer_lm", "--decoder-layers": "4", "--decoder-embed-dim": "256"},
        **{"--decoder-input-dim": "256", "--decoder-output-dim": "256", "--decoder-ffn-embed-dim": "1152"},
        **{"--decoder-attention-heads": "4", "--attention-dropout": "0"},
    },
}
SHARED_FACTORS = {
    "score scale": {"1/sqrt(s), gamma 1": {"--score-scale": f"{128**-0.5:.4f}", "--gamma-quad": "1"}},
    "norm": {value: {"--norm": value} for value in ("scalenorm", "rmsnorm")},
    "rotary in the linear branch": {"off": {"--plain-linear": ""}},
}
#: For each base: its options of the ablation model, and by factor the values that differ from it.
BASES = {
    "flash_lm": (
        {},
        {
            **SHARED_FACTORS,
            "start": {
                "paper": {"--init": "paper"},
                "dense 0.02": {"--dense-std": "0.02"},
                "out 0.02": {"--out-std": "0.02"},
                "embedding 0.0625": {"--embed-std": "0.0625"},
            },
            "gamma quadratic": {value: {"--gamma-quad": value} for value in ("0.1", "0.3", "1")},
            "gamma linear": {value: {"--gamma-lin": value} for value in ("0.02", "0.03", "0.3", "1")},
            "linear norm": {"chunk": {"--linear-norm": "chunk"}},
            "absolute positions": {"ScaledSin": {"--scaled-sin": ""}},
            "chunk size": {value: {"--chunk-size": value} for value in ("32", "64", "256", "512")},
            "bias": {
                "rotary": {"--relative-bias": "rotary"},
                "toeplitz 0.2": {"--bias-std": "0.2"},
                "rotary N(0, 0.02)": {"--relative-bias": "rotary", "--bias-height": "0"},
            },
        },
    ),
    "flash_lm_paper": (
        _PAPER,
        {
            **SHARED_FACTORS,
            "start": {"fan-in": {"--init": "fan_in"}},
            "gamma quadratic": {value: {"--gamma-quad": value} for value in ("0.1", "1")},
            "gamma linear": {value: {"--gamma-lin": value} for value in ("0.1", "1")},
            "linear norm": {"mean": {"--linear-norm": "mean"}},
            "absolute positions": {"none": {"--scaled-sin": None}},
            "chunk size": {value: {"--chunk-size": value} for value in ("64", "256")},
            "bias": {"rotary": {"--relative-bias": "rotary"}},
        },
    ),
}
TINY = {"--arch": "flash_ablation_lm", "--embed-dim": "256", "--layers": "8", "--chunk-size": "128"}


class Plan:
    """Makes runs from the command line's options, and reads what earlier ones found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def run(self, name: str, words: dict, budget: int, **row: object) -> TrainingRun:
        """A training of ``budget`` tokens: one in ten updates is warm-up, then the rate falls to 0."""
        updates = max(1, math.ceil(budget / TOKENS_PER_UPDATE))
        row = {"name": name, **{key: "" for key in KEY}, **row, "n": self.options.tokens_per_sample}
        row["budget"] = budget
        plugin = "scripts/ablation" if words["--arch"] == "flash_ablation_lm" else "fairseq_flash"
        recipe = {
            **{"--user-dir": ROOT / plugin, "--task": "language_modeling", "--tokens-per-sample": row["n"]},
            **{"--max-tokens": TOKENS_PER_UPDATE, "--share-decoder-input-output-embed": "", "--dropout": 0},
            **{"--optimizer": "adam", "--adam-betas": "(0.9, 0.98)", "--weight-decay": 0.01},
            **{"--clip-norm": 1.0, "--lr": row["lr"], "--lr-scheduler": "polynomial_decay"},
            **{"--warmup-updates": max(1, updates // 10), "--total-num-update": updates},
            **{"--no-epoch-checkpoints": "", "--validate-interval-updates": max(1, updates // 5)},
            **{"--num-workers": 0, "--seed": row["seed"], **words},
            "--cpu": None if self.options.device.startswith("cuda") else "",
        }
        arguments = (str(self.options.data), *as_words(recipe))
        return TrainingRun(arguments, updates, row, weight=budget, measure=self._after(row))

    def _after(self, row: dict) -> Optional[Callable[[Finished], dict]]:
        """The checkpoints of the last stage are kept, for what else can be asked of them."""
        if row["stage"] != "winner":
            return None

        def keep(finished: Finished) -> dict:
            place = self.options.folder / "winners" / f"{row['name'].replace(' ', '_')}.pt"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(finished.checkpoint, place)
            return {}

        return keep

    def learning_rates(self) -> Iterator[TrainingRun]:
        """Every system with each rate."""
        for rate in RATES:
            for name, words in SYSTEMS.items():
                yield self.run(name, words, self.options.tokens, stage="learning rate", lr=rate, seed=1)

    def factors(self, seeds: tuple[int, ...] = (1,)) -> Iterator[TrainingRun]:
        """Each base, and each of its choices."""
        for base, (common, factors) in BASES.items():
            choices = {("", ""): {}}
            choices |= {
                (factor, value): words for factor in factors for value, words in factors[factor].items()
            }
            row = dict(stage="factor", base=base, lr=self.best_rate(base))
            for seed in seeds:
                for (factor, value), words in choices.items():
                    words = {**TINY, **common, **words}
                    run = dict(row, factor=factor, value=value, seed=seed)
                    yield self.run(base, words, self.options.tokens, **run)

    def close_seeds(self) -> Iterator[TrainingRun]:
        """Two more seeds where one seed does not tell: of the base and of every value near it."""
        rows = self.rows("factor")
        close = {(base, "", "") for base in BASES}
        for base in BASES:
            losses = {
                (r["factor"], r["value"]): r["loss"] for r in rows if r["base"] == base and r["seed"] == "1"
            }
            for factor in {factor for factor, _ in losses} - {""}:
                ranked = sorted((loss, key) for key, loss in losses.items() if key[0] in ("", factor))
                (best, first), (next_best, second) = ranked[:2]
                if next_best - best < SMALL_GAP:
                    close |= {(base, *first), (base, *second)}
        for run in self.factors(seeds=(2, 3)):
            if (run.row["base"], run.row["factor"], run.row["value"]) in close:
                yield run

    def winners(self) -> Iterator[TrainingRun]:
        """Every system at its best rate, for more tokens."""
        for name, words in SYSTEMS.items():
            row = dict(stage="winner", lr=self.best_rate(name), seed=1)
            yield self.run(name, words, self.options.winner_tokens, **row)

    def best_rate(self, name: str) -> float:
        """The rate with the lowest loss.

        Raises:
            ValueError: none has been measured.
        """
        rows = [row for row in self.rows("learning rate") if row["name"] == name]
        if not rows:
            raise ValueError(
                f"--output {self.options.output} has no learning rate of {name}; run that stage first"
            )
        return float(min(rows, key=lambda row: row["loss"])["lr"])

    def rows(self, stage: str) -> list[dict]:
        """Successful rows of a stage, each with its ``loss``; one that is not finite counts as infinite."""
        with self.options.output.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["stage"] == stage and row["status"] == "ok"]
        for row in rows:
            loss = float(row["valid_loss"])
            row["loss"] = loss if math.isfinite(loss) else math.inf
        return rows


def as_words(options: dict) -> Iterator[str]:
    """Options as the command line has them."""
    for option, value in options.items():
        if value is not None:
            yield option
            if value != "":
                yield str(value)


STAGES = {
    "learning rate": Plan.learning_rates,
    "factor": Plan.factors,
    "seeds": Plan.close_seeds,
    "winner": Plan.winners,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    about, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "ablate.py", description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    results = ROOT / "scripts" / "results"
    add("--data", type=Path, required=True, help="folder that prepare_lm.py wrote")
    add("--output", type=Path, default=results / "ablation.csv", help="CSV of the runs")
    add("--curves", type=Path, help="CSV of the loss curves (beside --output)")
    add("--folder", type=Path, default=ROOT / "outputs" / "ablation", help="for logs")
    add("--stages", nargs="+", choices=list(STAGES), default=["learning rate", "factor", "seeds"])
    add("--tokens", type=int, default=1_000_000, help="of a run")
    add("--winner-tokens", type=int, default=5_000_000, help="of a run of the stage winner")
    add("--tokens-per-sample", type=int, default=1024)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=1, help="runs at a time; their speeds cannot be compared if more than 1")
    options = parser.parse_args(arguments)
    for name in ("tokens", "winner_tokens", "tokens_per_sample", "jobs"):
        if getattr(options, name) < 1:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} {getattr(options, name)} is not allowed; allowed: 1 or more")
    if not (options.data / "dict.txt").exists():
        parser.error(f"--data {options.data} has no dict.txt; allowed: a folder that prepare_lm.py wrote")
    options.data = options.data.resolve()
    options.curves = options.curves or options.output.with_name(f"{options.output.stem}_curves.csv")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    common = dict(
        commit=commit(),
        date=date.today().isoformat(),
        device=device_name(options.device),
        torch=torch.__version__,
        jobs=options.jobs,
    )
    table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    curves = Table(options.curves, CURVES, (*KEY, *CURVE_COLUMNS), (), {})
    for stage in options.stages:
        runs = list(STAGES[stage](Plan(options)))
        carry_out(runs, table, options.folder, curves=curves, jobs=options.jobs)


if __name__ == "__main__":
    main()
