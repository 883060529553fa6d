"""Compares flash_seq2seq_tiny with a Transformer of as many parameters: same data, tokens and schedule.

    python scripts/compare_translation.py --data data-bin/multi30k [--device cuda --jobs 10]

Two stages, each run once, in one CSV; the same command goes on where it ended. "learning rate": every system
with each rate, for a few epochs. "final": every system at the rate that had the lowest validation loss, for
all epochs; then fairseq-generate translates the test split (beam 5, the last checkpoint), and sacrebleu
compares the text with the reference. With several --seeds the first one tries the rates, and each makes a
final run. A run that fails is a record with its error, one that a signal has ended is tried again. Final
runs have the device to themselves, unless --final-jobs says otherwise: seconds of runs with more than one job
cannot be compared. At the end stand a table and the answer in one sentence.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import sacrebleu
import torch
from sacrebleu.metrics import BLEU

from report.answer import Measure
from report.comparison import Comparison, summary
from runs.command_line import command_line, require
from runs.log import MEASURED
from runs.plan import Earlier, as_words, lowest, recipe
from runs.process import stoppable
from runs.provenance import ROOT, data_name, provenance
from runs.schedule import Finished, TrainingRun, carry_out, fairseq_command, readable
from runs.table import Table
from text.folder import RECORD

KEY = ("data", "stage", "lr", "seed", "epochs", "updates_per_epoch", "max_tokens", "dropout")
VERSIONS = ("python", "torch", "fairseq", "sacrebleu")
SCORES = ("bleu", "signature", "generate_seconds")
COLUMNS = ("commit", "date", *VERSIONS, "device", "jobs", "name", *KEY, *MEASURED, *SCORES, "command")
SHOWN = ("name", "stage", "lr", "epochs", "updates", "valid_loss", "bleu", "status")

OUTPUT = Path("comparison") / "translation.csv"
QUALITY = Measure("bleu", "BLEU", "BLEU", 2, True)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
#: What is trained, by name: fairseq-train's options; within 5 % of each other's parameters.
SYSTEMS = {
    "flash_seq2seq_tiny": {"--arch": "flash_seq2seq_tiny"},
    "transformer": {
        **{"--arch": "transformer", "--encoder-layers": 3, "--decoder-layers": 3},
        **{"--encoder-embed-dim": 256, "--decoder-embed-dim": 256},
        **{"--encoder-ffn-embed-dim": 1024, "--decoder-ffn-embed-dim": 1024},
        **{"--encoder-attention-heads": 4, "--decoder-attention-heads": 4},
    },
}
SYSTEMS["flash_seq2seq_tiny chunk 128"] = {**SYSTEMS["flash_seq2seq_tiny"], "--chunk-size": 128}
SYSTEMS["transformer pre-norm"] = {
    **SYSTEMS["transformer"],
    **{"--encoder-normalize-before": "", "--decoder-normalize-before": ""},
}


class Plan:
    """Makes runs from the command line's options, and reads what earlier ones found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        record = json.loads((options.data / RECORD).read_text())
        self.source, self.target = record["options"]["languages"]
        self.sharing = "--share-all-embeddings"
        if record["options"]["separate"]:
            self.sharing = "--share-decoder-input-output-embed"
        self.reference = options.reference or options.data / f"test.raw.{self.target}"
        self.updates_per_epoch = options.updates_per_epoch or count_batches(
            options.data, self.source, self.target, options.max_tokens
        )
        shared = {"data": data_name(options.data), "updates_per_epoch": self.updates_per_epoch}
        shared |= {"max_tokens": options.max_tokens, "dropout": options.dropout}
        self.earlier = Earlier(options.output, shared)

    def tuning(self) -> Iterator[TrainingRun]:
        """Every system with each rate."""
        for rate in self.options.rates:
            for name in self.options.systems:
                yield self._run(name, "learning rate", rate, self.options.seeds[0])

    def final(self) -> Iterator[TrainingRun]:
        """Every system at its best rate, scored."""
        for name in self.options.systems:
            rate = self.best_rate(name)
            if rate is not None:
                print(f"{name}: best learning rate {rate}", flush=True)
                for seed in self.options.seeds:
                    yield self._run(name, "final", rate, seed)
            else:
                print(f"{name}: no learning rate succeeded; see the status in {self.options.output}")

    def best_rate(self, name: str) -> float | None:
        """The rate with the lowest validation loss; None if no run succeeded."""
        best = lowest(self.tried(name))
        return float(best["lr"]) if best else None

    def tried(self, name: str) -> list[dict]:
        """What a system's rates came to, those that failed among them."""
        cells = {"name": name, "seed": self.options.seeds[0], "epochs": self.options.tuning_epochs}
        return self.earlier.every(stage="learning rate", **cells)

    def _run(self, name: str, stage: str, rate: float, seed: int) -> TrainingRun:
        final = stage == "final"
        epochs = self.options.epochs if final else self.options.tuning_epochs
        updates = epochs * self.updates_per_epoch
        options = {
            **{"--task": "translation", "--source-lang": self.source, "--target-lang": self.target},
            **{"--max-tokens": self.options.max_tokens, self.sharing: "", "--dropout": self.options.dropout},
            **{"--criterion": "label_smoothed_cross_entropy", "--label-smoothing": 0.1},
            **recipe(rate, updates, seed, weight_decay=0.0001),
            **{"--no-epoch-checkpoints": "", "--num-workers": 0, **SYSTEMS[name]},
            "--cpu": "" if self.options.device == "cpu" else None,
        }
        record = {"name": name, **self.earlier.shared, "stage": stage, "lr": rate, "seed": seed}
        record["epochs"] = epochs
        arguments = (str(self.options.data), "--user-dir", str(ROOT / "fairseq_flash"), *as_words(options))
        shown = ("fairseq-train", *arguments, "--max-update", updates)
        record["command"] = readable(shown, {self.options.data: self.options.data.name})
        measure = self._score if final else None
        return TrainingRun(arguments, updates, record, weight=updates, measure=measure)

    def _score(self, finished: Finished) -> dict:
        """Translates the test split with the last checkpoint, and scores the text."""
        started = time.monotonic()
        options = {
            **{"--user-dir": ROOT / "fairseq_flash", "--path": finished.checkpoint, "--task": "translation"},
            **{"--source-lang": self.source, "--target-lang": self.target, "--gen-subset": "test"},
            **{"--beam": 5, "--batch-size": 128, "--num-workers": 0, "--max-len-a": 1.2, "--max-len-b": 10},
            **{"--remove-bpe": "sentencepiece", "--cpu": "" if self.options.device == "cpu" else None},
        }
        output = finished.call(fairseq_command("generate", self.options.data, *as_words(options)))
        seconds = time.monotonic() - started
        bleu, signature = score(hypotheses(output), read_reference(self.reference))
        return dict(bleu=f"{bleu:.2f}", signature=signature, generate_seconds=f"{seconds:.1f}")


def count_batches(data: Path, source: str, target: str, max_tokens: int) -> int:
    """Updates in an epoch, by fairseq's own cutting of the training split into batches."""
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    # Left out, these would be references to the rest of fairseq's configuration.
    resolved = dict(dataset_impl=None, train_subset="train", required_seq_len_multiple=1)
    cfg = TranslationConfig(data=str(data), source_lang=source, target_lang=target, **resolved)
    task = TranslationTask.setup_task(cfg)
    task.load_dataset("train")
    longest = tuple(min(limit, max_tokens) for limit in task.max_positions())
    options = dict(max_positions=longest, ignore_invalid_inputs=True, required_batch_size_multiple=8)
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=max_tokens, **options)
    return len(batches.frozen_batches)


def hypotheses(output: str) -> list[str]:
    """The translations that fairseq-generate printed, in the order of the sources."""
    found = re.findall(r"^D-(\d+)\t[^\t\n]*\t([^\n]*)$", output, re.MULTILINE)
    return [text for _, text in sorted(found, key=lambda record: int(record[0]))]


def read_reference(path: Path) -> list[str]:
    """Lines of a reference; only a line feed ends one."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def score(translations: list[str], reference: list[str]) -> tuple[float, str]:
    """BLEU and sacrebleu's signature.

    Raises:
        ValueError: there are not as many translations as lines of the reference.
    """
    if len(translations) != len(reference):
        raise ValueError(f"there are {len(translations)} translations of {len(reference)} reference lines")
    bleu = BLEU()
    return bleu.corpus_score(translations, [reference]).score, str(bleu.get_signature())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "compare_translation.py")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that prepare_translation.py wrote")
    add("--reference", type=Path, help="lines to compare with (test.raw.LANG in the folder)")
    add("--output", type=Path, default=OUTPUT, help=f"CSV of the runs ({OUTPUT})")
    add("--folder", type=Path, help="for checkpoints and logs (beside --output, with _runs)")
    add("--systems", nargs="+", choices=list(SYSTEMS), default=["flash_seq2seq_tiny", "transformer"])
    add("--rates", type=float, nargs="+", default=list(RATES), metavar="LR", help="learning rates to try")
    add("--tuning-epochs", type=int, default=2, metavar="N", help="of a run of the first stage (2)")
    add("--epochs", type=int, default=12, metavar="N", help="of a final run (12)")
    add("--updates-per-epoch", type=int, metavar="N", help="fewer than the data give, for a try")
    add("--max-tokens", type=int, default=2048, metavar="N", help="of a batch, on either side (2048)")
    add("--dropout", type=float, default=0.3, metavar="P", help="of all systems (0.3)")
    add("--seeds", type=int, nargs="+", default=[1], help="one final run each (1)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time in the first stage (1)")
    add("--final-jobs", type=int, default=1, metavar="N", help="final runs at a time (1)")
    options = parser.parse_args(arguments)
    counted = ("tuning_epochs", "epochs", "max_tokens", "jobs", "final_jobs", "updates_per_epoch")
    require(parser, options, 1, *counted)
    if not (options.data / RECORD).is_file():
        parser.error(f"--data {options.data} has no {RECORD}; give a folder of prepare_translation.py")
    options.folder = options.folder or options.output.with_name(f"{options.output.stem}_runs")
    options.data, options.folder = options.data.resolve(), options.folder.resolve()
    return options


def report(plan: Plan) -> str:
    """Table and answer of the final runs, each system at its best rate; of one without, what was tried."""
    final, rates, options = [], [], plan.options
    for name in options.systems:
        rate, tried = plan.best_rate(name), plan.tried(name)
        cells = {"name": name, "lr": rate, "epochs": options.epochs, "seed": set(options.seeds)}
        final += tried if rate is None else plan.earlier.every(stage="final", **cells)
        rates += tried
    part = f"the whole split test ({len(read_reference(plan.reference)):,} sentences)"
    return summary(Comparison({"evaluated": part}, final, rates, [], [], measure=QUALITY))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    plan = Plan(options)
    common = {**provenance(options.device), "sacrebleu": sacrebleu.__version__}
    print(f"{plan.updates_per_epoch} updates an epoch; records go to {options.output}", flush=True)
    with stoppable("compare_translation.py"):
        for stage, jobs in ((plan.tuning, options.jobs), (plan.final, options.final_jobs)):
            table = Table(options.output, COLUMNS, KEY, SHOWN, {**common, "jobs": jobs})
            carry_out(list(stage()), table, options.folder, jobs=jobs, keep=stage == plan.final)
    print(f"\n{report(plan)}")


if __name__ == "__main__":
    main()
