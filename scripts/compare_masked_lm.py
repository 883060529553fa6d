"""Compares flash_masked_lm with RoBERTa of as many parameters: masked words, then the authors of passages.

    python scripts/prepare_lm.py --text books/ --output data-bin/books --vocab-size 8000
    python scripts/prepare_classification.py --text books/ --table scripts/text/authors.csv --passage 2048 \\
        --skip 1 --balance --data data-bin/books --output data-bin/authors
    python scripts/compare_masked_lm.py --data data-bin/books --classes data-bin/authors [--jobs 8]

Three stages, each run once, in one CSV; a second call goes on where the first ended, and a run that fails is
a record with its error (one that a signal has ended is tried again). "pretraining": each system with each of
its rates, on rows of 512 tokens. "rates": the best checkpoint of FLASH and of RoBERTa is fine-tuned with each
rate on the first seed: with whole passages, and cut to the 512 tokens of pretraining. RoBERTa has a table of
positions, which for whole passages is repeated (as Longformer does). "seeds": each again with other seeds at
the rate that was best on valid. The accuracy to compare is the one on test, with which nothing is chosen.
Each --pooling has its own records. At the end stand, for the pretraining and for each length of the
fine-tuning, a table and the answer in one sentence, and what counts of tokens alone tell of the labels, by
naive Bayes (stage "counts").
"""

import argparse
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fairseq_flash.modules import POOLINGS
from report.answer import LOSS, Measure
from report.comparison import Comparison, by_name, summary
from runs.classification import count, naive_bayes
from runs.command_line import command_line, require
from runs.log import MEASURED, last_test_accuracy
from runs.plan import Earlier, as_words, lowest, recipe
from runs.process import stoppable
from runs.provenance import ROOT, data_name, provenance
from runs.roberta_positions import with_more_positions
from runs.schedule import Finished, TrainingRun, carry_out, readable
from runs.systems import with_pooling
from runs.table import Table

KEY = ("data", "stage", "n", "lr", "seed", "pretraining", "epochs", "pooling")
SCORES = ("valid_perplexity", "valid_accuracy", "test_accuracy")
COLUMNS = ("commit", "date", "device", "python", "torch", "jobs", "name", *KEY, *MEASURED, *SCORES, "command")
SHOWN = ("stage", "name", "n", "lr", "seed", *SCORES, "seconds", "status")

OUTPUT = Path("comparison") / "masked_lm.csv"
MASKED = LOSS._replace(unit="nats a masked token")
ACCURACY = Measure("test_accuracy", "accuracy on test", "points of accuracy", 1, True)

_ROBERTA = (
    *("--encoder-layers", "4", "--encoder-embed-dim", "256", "--encoder-ffn-embed-dim", "1152"),
    *("--encoder-attention-heads", "4"),
)
_HIGH, _LOW = (1e-3, 2e-3, 4e-3, 8e-3), (2.5e-4, 5e-4, 1e-3, 2e-3)


class System(NamedTuple):
    """What is trained: its kind, of which the best is fine-tuned, its options, and its rates."""

    kind: str
    words: tuple[str, ...]
    rates: tuple[float, ...]
    dropout: tuple[str, ...] = ("--dropout",)


_BOTH = ("--dropout", "--attention-dropout")
SYSTEMS = {
    "flash_masked_lm": System("flash", ("--arch", "flash_masked_lm_tiny"), _HIGH),
    "flash_shifted_masked_lm": System("shifted", ("--arch", "flash_masked_lm_tiny", "--shift-keys"), _HIGH),
    "flash_quad_masked_lm": System("flash_quad", ("--arch", "flash_quad_masked_lm_tiny"), _HIGH),
    "roberta": System("roberta", ("--arch", "roberta", *_ROBERTA), _LOW, _BOTH),
    "roberta_prenorm": System("roberta", ("--arch", "roberta_prenorm", *_ROBERTA), _HIGH, _BOTH),
}
USUAL = ["flash_masked_lm", "roberta", "roberta_prenorm"]
FINE_TUNED = ("flash", "roberta")


class Plan:
    """Makes runs from the command line's options, and reads what earlier ones found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checkpoints = options.folder / "pretrained"
        shared = {"pretraining": options.tokens}
        own = {"stage": "pretraining", "data": data_name(options.data)}
        own |= {"n": options.row, "seed": options.seeds[0]}
        self.pretrained = self.fine_tuned = Earlier(options.output, {**shared, **own})
        if options.classes:
            own = {"stage": "fine-tuning", "data": data_name(options.classes)}
            own |= {"epochs": options.epochs, "pooling": options.pooling}
            self.fine_tuned = Earlier(options.output, {**shared, **own})
            self.counted = Earlier(options.output, {"stage": "counts", "data": own["data"]})

    def pretraining(self) -> Iterator[TrainingRun]:
        """Every system with each of its rates."""
        updates = max(1, math.ceil(self.options.tokens / self.options.max_tokens))
        for name in self.options.systems:
            for rate in self.options.pretraining_rates or SYSTEMS[name].rates:
                record = {"name": name, "lr": rate, "epochs": "", "pooling": "", **self.pretrained.shared}
                options = {
                    **{"--task": "masked_lm", "--criterion": "masked_lm"},
                    **{"--tokens-per-sample": self.options.row, "--max-tokens": self.options.max_tokens},
                    "--max-tokens-valid": 8 * self.options.max_tokens,
                    **{"--no-epoch-checkpoints": "", "--no-save-optimizer-state": ""},
                }
                words = self._words(
                    self.options.data, name, options, recipe(rate, updates, record["seed"]), 0
                )
                yield self._run(words, updates, record, updates * self.options.max_tokens)

    def rates(self) -> Iterator[TrainingRun]:
        """The best of each kind, at each length and rate, on the first seed."""
        for kind in FINE_TUNED:
            for n in (self.options.passage, self.options.row):
                for rate in self.options.rates:
                    yield self._fine_tuning(kind, n, rate, self.options.seeds[0])

    def seeds(self) -> Iterator[TrainingRun]:
        """The other seeds, at the rate that was best on valid."""
        for kind in FINE_TUNED:
            for n in (self.options.passage, self.options.row):
                rate = float(self.best_tuned(kind, n)["lr"])
                for seed in self.options.seeds[1:]:
                    yield self._fine_tuning(kind, n, rate, seed)

    def counts(self, table: Table) -> None:
        """Adds what naive Bayes tells at each length."""
        for n in (self.options.passage, self.options.row):
            cell = dict.fromkeys(KEY, "") | {**self.counted.shared, "n": n}
            if not table.has(["naive_bayes"], **cell):
                right = naive_bayes(self.options.classes, n)
                found = {f"{part}_accuracy": f"{right[part]:.1f}" for part in right}
                table.add([{"name": "naive_bayes", **cell, **found, "status": "ok"}])

    def best_tuned(self, kind: str, n: int) -> dict:
        """The record of the first seed with the best accuracy on valid.

        Raises:
            ValueError: no fine-tuning succeeded.
        """
        name, _ = self.best_pretrained(kind)
        records = self.fine_tuned.finite(name=name, n=n, seed=self.options.seeds[0])
        if not records:
            raise ValueError(f"no fine-tuning of {name} at {n} tokens succeeded; see its records")
        return max(records, key=lambda each: (float(each["valid_accuracy"]), -float(each["valid_loss"])))

    def best_pretrained(self, kind: str) -> tuple[str, Path]:
        """Name and checkpoint of the pretrained system of a kind that has the lowest loss.

        Raises:
            ValueError: none succeeded, or its checkpoint is gone.
        """
        names = {name for name, system in SYSTEMS.items() if system.kind == kind}
        best = self.pretrained.best(name=names)
        if best is None:
            raise ValueError(f"no pretraining of {kind} succeeded; see the records of {self.options.output}")
        path = self._kept(best)
        if not path.exists():
            raise ValueError(f"{path} is gone: delete its record in {self.options.output} to train it again")
        return best["name"], path

    def _fine_tuning(self, kind: str, n: int, rate: float, seed: int) -> TrainingRun:
        name, path = self.best_pretrained(kind)
        if kind == "roberta" and n > self.options.row:
            path = with_more_positions(path, self.options.row, n)
        classes, batch = self.options.classes, self.options.batch_size
        labels, examples = count(classes)
        updates = self.options.epochs * math.ceil(examples / batch)
        options = {
            **{"--task": "sentence_prediction", "--criterion": "sentence_prediction"},
            **{"--num-classes": labels, "--init-token": 0, "--separator-token": 2},
            **{"--max-positions": n, "--shorten-method": "truncate", "--batch-size": batch},
            **{"--valid-subset": "valid,test", "--validate-interval": self.options.epochs + 1},
            **{"--restore-file": path, "--reset-optimizer": "", "--reset-dataloader": ""},
            **{"--reset-meters": "", "--no-save": ""},
        }
        words = self._words(classes, name, options, recipe(rate, updates, seed), self.options.dropout)
        words = with_pooling(words, kind, self.options.pooling)
        record = dict(name=name, n=n, lr=rate, seed=seed, **self.fine_tuned.shared)
        return self._run(words, updates, record, updates * batch * n)

    def _words(self, data: Path, name: str, options: dict, training: dict, dropout: float) -> tuple:
        system = SYSTEMS[name]
        common = {
            **{"--num-workers": 0, "--max-valid-steps": self.options.valid_batches or None},
            **dict.fromkeys(system.dropout, dropout),
            "--cpu": None if self.options.device.startswith("cuda") else "",
        }
        plugin = ("--user-dir", str(ROOT / "fairseq_flash"))
        return (str(data), *as_words(options), *plugin, *system.words, *as_words({**training, **common}))

    def _run(self, words: tuple, updates: int, record: dict, weight: float) -> TrainingRun:
        def measure(finished: Finished) -> dict:
            loss = finished.valid["loss"]
            if record["stage"] == "pretraining":
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(finished.checkpoint, self._kept(record))
                return {"valid_perplexity": f"{2**loss:.5g}"}
            return {
                "valid_loss": f"{loss * math.log(2):.5g}",
                "valid_accuracy": finished.valid["accuracy"],
                "test_accuracy": last_test_accuracy(finished.checkpoint.with_name("train.log")),
            }

        folders = (self.options.data, self.options.classes, self.options.folder)
        names = {path: path.name for path in folders if path}
        record["command"] = readable(("fairseq-train", *words, "--max-update", updates), names)
        return TrainingRun(words, updates, record, weight=weight, measure=measure)

    def _kept(self, record: dict) -> Path:
        told = (record[name] for name in ("name", "data", "n", "lr", "seed", "pretraining"))
        return self.checkpoints / f"{'-'.join(map(str, told))}.pt"


def report(plan: Plan) -> str:
    """Table and answer of the pretraining, each system at its best rate, and of each length of the rest."""
    options, tuned = plan.options, plan.fine_tuned
    batches = options.valid_batches
    part = f"the first {batches} batches of the split" if batches else "the whole split"
    tried = plan.pretrained.every()
    # Of a system that has no best rate, what failed.
    best = [each for own in by_name(tried).values() for each in ([lowest(own)] if lowest(own) else own)]
    told = [Comparison({"evaluated": f"{part} valid"}, best, tried, [], [], measure=MASKED)]
    for n in (options.passage, options.row) if options.classes else ():
        best = [plan.best_tuned(kind, n) for kind in FINE_TUNED]
        cells = [{"name": each["name"], "n": n, "lr": each["lr"]} for each in best]
        final = [record for cell in cells for record in tuned.every(**cell, seed=set(options.seeds))]
        rates = tuned.every(name={each["name"] for each in best}, n=n, seed=options.seeds[0])
        told.append(Comparison({"evaluated": f"{part} test"}, final, rates, [], [], measure=ACCURACY))
    titles = ("Pretraining", *("Fine-tuning",) * 2)
    whole = [f"{title}: {summary(each)}" for title, each in zip(titles, told, strict=False)]
    for record in plan.counted.find(n={options.passage, options.row}) if options.classes else ():
        right = " and ".join(f"{record[f'{part}_accuracy']} % of {part}" for part in ("test", "valid"))
        whole.append(f"Counts of tokens alone, in {record['n']} tokens, tell the labels of {right}.")
    return "\n\n".join(whole)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "compare_masked_lm.py")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that prepare_lm.py wrote")
    add("--classes", type=Path, help="folder of prepare_classification.py; without, pretraining alone")
    add("--output", type=Path, default=OUTPUT, help=f"CSV of the runs ({OUTPUT})")
    add("--folder", type=Path, help="for checkpoints and logs (beside --output, with _runs)")
    add("--systems", nargs="+", choices=list(SYSTEMS), default=USUAL, help=f"to pretrain ({' '.join(USUAL)})")
    add("--pretraining-rates", type=float, nargs="+", help="of every system (its own grid)")
    add("--row", type=int, default=512, help="tokens of a row in pretraining")
    add("--tokens", type=int, default=2_000_000, help="of a pretraining")
    add("--max-tokens", type=int, default=4096, help="of an update of it")
    add("--passage", type=int, default=2048, help="tokens of a whole example")
    add("--epochs", type=int, default=10, help="of a fine-tuning")
    add("--batch-size", type=int, default=8, help="of a fine-tuning")
    add("--dropout", type=float, default=0.1, help="of a fine-tuning; pretraining has none")
    add("--pooling", choices=POOLINGS, default="first", help="what heads see of a row, in FLASH and RoBERTa")
    add("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="of a fine-tuning")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--valid-batches", type=int, default=0, help="at most so many in a validation (all)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=1, help="runs at a time; their speeds cannot be compared if more than 1")
    options = parser.parse_args(arguments)
    counted = ("tokens", "max_tokens", "row", "passage", "epochs", "batch_size", "jobs")
    require(parser, options, 1, *counted)
    if options.max_tokens < options.row:
        parser.error(f"--max-tokens {options.max_tokens} is not allowed; allowed: {options.row} or more")
    if not (options.data / "dict.txt").exists():
        parser.error(f"--data {options.data} has no dict.txt; allowed: a folder from prepare_lm.py")
    if options.classes:
        if not (options.classes / "input0" / "test.bin").exists():
            parser.error(f"--classes {options.classes} has no input0/test.bin; see prepare_classification.py")
        if (options.classes / "input0" / "dict.txt").read_bytes() != (options.data / "dict.txt").read_bytes():
            parser.error(f"--classes {options.classes} has another dictionary than --data {options.data}")
        options.classes = options.classes.resolve()
    options.folder = options.folder or options.output.with_name(f"{options.output.stem}_runs")
    options.data, options.folder = options.data.resolve(), options.folder.resolve()
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    common = {**provenance(options.device), "jobs": options.jobs}
    with stoppable("compare_masked_lm.py"):
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
        plan = Plan(options)
        for stage in (plan.pretraining, plan.rates, plan.seeds) if options.classes else (plan.pretraining,):
            runs = list(stage())
            print(f"{stage.__name__}: {len(runs)} runs, {options.jobs} at a time", flush=True)
            carry_out(runs, table, options.folder, jobs=options.jobs)
        if options.classes:
            plan.counts(table)
    print(f"\n{report(plan)}")


if __name__ == "__main__":
    main()
