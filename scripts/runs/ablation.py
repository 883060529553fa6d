"""What the ablation trains: systems, each with rates, and choices, one changed at a time."""

import argparse
import math
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

from runs.plan import Earlier, as_words, recipe
from runs.provenance import ROOT, data_name
from runs.schedule import Finished, TrainingRun
from runs.systems import PRE_NORM, architecture

__all__ = ["BASES", "KEY", "LOW_RATES", "RATES", "STAGES", "SYSTEMS", "Plan"]

#: Columns that tell one run from another.
KEY = ("data", "stage", "base", "factor", "value", "lr", "seed", "n", "budget")

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
#: fairseq's default, a norm after each layer, learns nothing here at higher rates.
LOW_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3)
SMALL_GAP = 0.02  # nats; less than this is looked at with more seeds
TOKENS_PER_UPDATE = 4096

_TABLE = {"--relative-bias": "toeplitz"}
_CHUNK = {"--linear-norm": "chunk"}
#: Options as a dictionary: "" for a switch, None for one that a base sets and a choice takes away.
_PAPER = {"--init": "paper", "--scaled-sin": "", **_CHUNK, **_TABLE}
#: What is trained, by name: the system, and options that differ from it.
SYSTEMS = {
    **{name: (name, {}) for name in ("flash_lm", "flash_quad_lm", "flash_local_lm", "flash_global_lm")},
    **{name: (name, {}) for name in ("transformer_plus_lm", "transformer_pp_lm", "mc_transformer_pp_lm")},
    "flash_lm chunk": ("flash_lm", _CHUNK),
    "flash_lm toeplitz": ("flash_lm", _TABLE),
    "flash_lm chunk toeplitz": ("flash_lm", {**_CHUNK, **_TABLE}),
    "flash_local_lm toeplitz": ("flash_local_lm", _TABLE),
    "flash_lm_paper": ("flash_lm", _PAPER),
    "transformer_lm pre-norm": ("transformer_lm", {}),
    "transformer_lm": ("transformer_lm", {PRE_NORM: None}),
}
#: Those that train for longer.
WINNERS = [name for name in SYSTEMS if "toeplitz" not in name]
TINY = {"--arch": "flash_ablation_lm", "--embed-dim": 256, "--layers": 8, "--chunk-size": 128}
TINY_PP = {
    **TINY,
    **{"--block": "transformer", "--attention-dim": 64, "--layers": 4, "--glu": "", "--ffn-embed-dim": 768},
}
SCALED = {"1/sqrt(s), gamma 1": {"--score-scale": f"{128**-0.5:.4f}", "--gamma-quad": 1}}
NORMS = {value: {"--norm": value} for value in ("scalenorm", "rmsnorm")}
PLAIN_LINEAR = {"off": {"--plain-linear": ""}}
SCALED_SIN = {"ScaledSin": {"--scaled-sin": ""}}
STARTS = {
    "paper": {"--init": "paper"},
    "dense 0.02": {"--dense-std": 0.02},
    "out 0.02": {"--out-std": 0.02},
    "embedding 0.0625": {"--embed-std": 0.0625},
}
#: What is changed around either relative bias of FLASH.
AROUND = {
    "score scale": SCALED,
    "norm": NORMS,
    "rotary in the linear branch": PLAIN_LINEAR,
    "start": STARTS,
    "gamma quadratic": {str(value): {"--gamma-quad": value} for value in (0.1, 0.3, 1)},
    "linear norm": {"chunk": _CHUNK},
    "absolute positions": SCALED_SIN,
    "chunk size": {str(value): {"--chunk-size": value} for value in (32, 64, 256, 512)},
}


class Base(NamedTuple):
    """Options of the ablation model, the system whose rate it takes, and values by factor that differ."""

    system: str
    options: dict
    factors: dict[str, dict[str, dict]]


def gammas(quad: float, lin: float, **more: object) -> dict:
    """Options for how the gammas of the branches start."""
    return {"--gamma-quad": quad, "--gamma-lin": lin, **more}


BASES = {
    "flash_lm toeplitz": Base(
        "flash_lm toeplitz",
        {**TINY, **_TABLE},
        {
            **AROUND,
            "gamma linear": {str(value): {"--gamma-lin": value} for value in (0.02, 0.03, 0.3, 1)},
            "together": {
                "gammas 0.3, 0.03": gammas(0.3, 0.03),
                "gammas 0.3, 0.03, rmsnorm": gammas(0.3, 0.03, **NORMS["rmsnorm"]),
                "gammas 0.3, 0.03, rmsnorm, out 0.02": gammas(
                    0.3, 0.03, **NORMS["rmsnorm"], **{"--out-std": 0.02}
                ),
                "gammas 0.3, 0.03, chunk": gammas(0.3, 0.03, **_CHUNK),
                "gammas 0.3, 0.003, chunk": gammas(0.3, 0.003, **_CHUNK),
            },
            "bias": {
                "rotary": {"--relative-bias": "rotary"},
                "toeplitz 0.2": {"--bias-std": 0.2},
                "rotary N(0, 0.02)": {"--relative-bias": "rotary", "--bias-height": 0},
            },
        },
    ),
    "flash_lm_paper": Base(
        "flash_lm_paper",
        {**TINY, **_PAPER},
        {
            "score scale": SCALED,
            "norm": NORMS,
            "rotary in the linear branch": PLAIN_LINEAR,
            "start": {"fan-in": {"--init": "fan_in"}},
            "gamma quadratic": {str(value): {"--gamma-quad": value} for value in (0.1, 1)},
            "gamma linear": {str(value): {"--gamma-lin": value} for value in (0.1, 1)},
            "linear norm": {"mean": {"--linear-norm": "mean"}},
            "absolute positions": {"none": {"--scaled-sin": None}},
            "chunk size": {str(value): {"--chunk-size": value} for value in (64, 256)},
            "bias": {"rotary": {"--relative-bias": "rotary"}},
        },
    ),
    "flash_lm": Base(
        "flash_lm",
        TINY,
        {
            **AROUND,
            "bias": {
                **{f"height {value}": {"--bias-height": value} for value in (0.01, 0.1, 0.3)},
                **{
                    f"toeplitz, height {value}": {"--relative-bias": "toeplitz", "--bias-height": value}
                    for value in (0.03, 0.1)
                },
            },
            "gamma linear": {str(value): {"--gamma-lin": value} for value in (0.03, 0.05, 0.3)},
            "together": {
                "gammas 0.3, 0.03": gammas(0.3, 0.03),
                "gammas 0.3, 0.03, rmsnorm": gammas(0.3, 0.03, **NORMS["rmsnorm"]),
                "gammas 0.3, 0.003, chunk": gammas(0.3, 0.003, **_CHUNK),
            },
            "branches": {"local": {"--attention": "local"}},
        },
    ),
    "transformer_pp_lm": Base(
        "transformer_pp_lm",
        {**TINY_PP, "--attention": "quadratic"},
        {
            "norm": {"rmsnorm": NORMS["rmsnorm"]},
            "start": {name: STARTS[name] for name in ("paper", "out 0.02")},
            "absolute positions": SCALED_SIN,
        },
    ),
    "mc_transformer_pp_lm": Base(
        "mc_transformer_pp_lm",
        {**TINY_PP, "--attention": "mixed_chunk"},
        {
            "gamma linear": {str(value): {"--gamma-lin": value} for value in (0.1, 1)},
            "branches": {"local": {"--attention": "local"}},
            "chunk size": {"64": {"--chunk-size": 64}},
        },
    ),
}


class Plan:
    """Makes runs from the command line's options, and reads what earlier ones found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.earlier = Earlier(options.output, {"data": data_name(options.data)})

    def run(self, name: str, words: dict, budget: int, **record: object) -> TrainingRun:
        """A training of ``budget`` tokens: one in ten updates is warm-up, then the rate falls to 0."""
        updates = max(1, math.ceil(budget / TOKENS_PER_UPDATE))
        record = {"name": name, **{key: "" for key in KEY}, **record, **self.earlier.shared, "budget": budget}
        record["n"] = self.options.tokens_per_sample
        plugin = "scripts/ablation" if words["--arch"] == "flash_ablation_lm" else "fairseq_flash"
        options = {
            **{
                "--user-dir": ROOT / plugin,
                "--task": "language_modeling",
                "--tokens-per-sample": record["n"],
            },
            **{"--max-tokens": TOKENS_PER_UPDATE, "--share-decoder-input-output-embed": "", "--dropout": 0},
            **recipe(record["lr"], updates, record["seed"]),
            "--no-epoch-checkpoints" if record.get("stage") == "winner" else "--no-save": "",
            **{"--num-workers": 0, **words},
            "--cpu": None if self.options.device.startswith("cuda") else "",
        }
        arguments = (str(self.options.data), *as_words(options))
        return TrainingRun(arguments, updates, record, weight=budget, measure=self._after(record))

    def _after(self, record: dict) -> Optional[Callable[[Finished], dict]]:
        """The checkpoints of the last stage are kept, for what else can be asked of them."""
        if record["stage"] != "winner":
            return None

        def keep(finished: Finished) -> dict:
            place = self.options.folder / "winners" / f"{record['name'].replace(' ', '_')}.pt"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(finished.checkpoint, place)
            return {}

        return keep

    def learning_rates(self) -> Iterator[TrainingRun]:
        """Every system with each rate."""
        for name in SYSTEMS:
            for rate in LOW_RATES if name == "transformer_lm" else RATES:
                record = dict(stage="learning rate", lr=rate, seed=1)
                yield self.run(name, system_options(name), self.options.tokens, **record)

    def factors(self, seeds: Optional[list[int]] = None) -> Iterator[TrainingRun]:
        """Each base, and each of its choices."""
        for seed in seeds or self.options.seeds:
            for base in self.options.bases:
                system, common, factors = BASES[base]
                choices = {("", ""): {}}
                choices |= {
                    (factor, value): words for factor in factors for value, words in factors[factor].items()
                }
                record = dict(stage="factor", base=base, lr=self.best_rate(system), seed=seed)
                for (factor, value), words in choices.items():
                    words = {**common, **words}
                    yield self.run(base, words, self.options.tokens, **record, factor=factor, value=value)

    def close_seeds(self) -> Iterator[TrainingRun]:
        """Two more seeds where one seed does not tell: of the base and of every value near it."""
        records = self.earlier.find(stage="factor")
        close = {(base, "", "") for base in self.options.bases}
        for base in self.options.bases:
            losses = {
                (r["factor"], r["value"]): r["loss"]
                for r in records
                if r["base"] == base and r["seed"] == "1"
            }
            for factor in {factor for factor, _ in losses} - {""}:
                ranked = sorted((loss, key) for key, loss in losses.items() if key[0] in ("", factor))
                near = [key for loss, key in ranked if loss - ranked[0][0] < SMALL_GAP]
                close |= {(base, *key) for key in near if len(near) > 1}
        for run in self.factors(seeds=[2, 3]):
            if (run.record["base"], run.record["factor"], run.record["value"]) in close:
                yield run

    def winners(self) -> Iterator[TrainingRun]:
        """Every system at its best rate, for more tokens."""
        for name in WINNERS:
            record = dict(stage="winner", lr=self.best_rate(name), seed=1)
            yield self.run(name, system_options(name), self.options.winner_tokens, **record)

    def best_rate(self, name: str) -> float:
        """The rate with the lowest loss.

        Raises:
            ValueError: none has been measured.
        """
        best = self.earlier.best(stage="learning rate", name=name)
        if best is None:
            raise ValueError(
                f"--output {self.options.output} has no learning rate of {name}; run that stage first"
            )
        return float(best["lr"])


def system_options(name: str) -> dict:
    """A system's options as a dictionary."""
    system, changes = SYSTEMS[name]
    words = architecture(system, "tiny")
    pairs = zip(words, [*words[1:], "--"], strict=True)
    options = {
        word: "" if following.startswith("--") else following for word, following in pairs if word[0] == "-"
    }
    return {**options, **changes}


STAGES = {
    "learning rate": Plan.learning_rates,
    "factor": Plan.factors,
    "seeds": Plan.close_seeds,
    "winner": Plan.winners,
}
