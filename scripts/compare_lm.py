"""Answers whether FLASH is better than a Transformer on one's own data: trains, evaluates, and reports.

    python scripts/prepare_lm.py --text my-books/ --output data-bin/books
    python scripts/compare_lm.py --data data-bin/books --report comparison.html
    python scripts/compare_lm.py --data data-bin/books --systems transformer_lm,flash_lm --seeds 1,2,3 \\
        --tokens-per-sample 512,4096 --budget 5000000tokens --lr flash_lm=4e-3,transformer_lm=2e-3
    python scripts/compare_lm.py --data data-bin/books --size base --budget 60minutes --dtype bfloat16 \\
        --tokens-per-update 65536 -- --dropout 0.1      what stands behind -- goes to every training

Every system gets the same blocks of text in the same order, the same schedule (a tenth of the updates is
warm-up, then the rate falls to 0), and the same budget: ``1000000tokens``, ``250updates``, or ``5minutes`` of
training, of which each system makes as many updates as its speed allows, measured beforehand (stage "speed").
fairseq's transformer_lm gets its norms before the layers, as all others have; it hardly learns otherwise.
A system without a rate in ``--lr`` first tries those of ``--lr-grid`` (stage "rate"), with the first length,
the first seed, and ``--lr-budget``, a quarter of the budget.

Each training is a process of fairseq-train; its result (stage "final") is measured by fairseq-eval-lm on the
split "valid" with the last checkpoint, in rows of the trained length. Losses are in nats per token, and
prepare_lm.py's counts turn them into bits per byte and perplexities per byte and word, which can be compared
between vocabularies. Each run is a row of --output and a curve of --curves, a failed one with its error.
Ctrl-C and kill lose at most the updates since the last checkpoint; the same command goes on. A run that was
killed is tried again, one that failed only with --retry.
"""

import argparse
import csv
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

import torch

from report import comparison as comparison_report
from runs.plan import EVALUATED, Budget, Plan, rows_of
from runs.process import locked
from runs.provenance import ROOT, commit, data_name, device_name, precision
from runs.schedule import CURVE_COLUMNS, MEASURED, TrainingRun, carry_out, environment, progress_bar, readable
from runs.systems import SIZES, check_systems
from runs.table import Table, drop_torn_line

RESULTS = ROOT / "scripts" / "results"
#: Options of fairseq-train that tell a run, so that only the plan may set them.
PLANNED = {
    *("--arch", "--lr", "--seed", "--task", "--user-dir", "--tokens-per-sample", "--batch-size"),
    *("--max-tokens", "--update-freq", "--max-update", "--total-num-update", "--save-dir", "--cpu"),
}
#: The columns that tell a run: what all runs of a command share, and what is different between them.
SHARED = ("size", "data", "device", "dtype", "tokens_per_update", "options")
RUN = ("stage", "n", "seed", "lr", "budget")
COLUMNS = (
    *("commit", "date", "python", "torch", "fairseq", "threads", "jobs", "name", *SHARED, *RUN),
    *(*MEASURED[:-1], *EVALUATED, "status"),
)
CURVES = ("jobs", "name", *SHARED, *RUN, *CURVE_COLUMNS)
SHOWN = ("name", "stage", "n", "seed", "lr", "tokens_per_second", "valid_loss", "bits_per_byte", "status")
SYSTEMS = "transformer_lm,transformer_pp_lm,flash_quad_lm,flash_lm"
GRID = "1e-3,2e-3,4e-3,8e-3"


def forget_failed(path: Path, every: bool) -> None:
    """Drops rows of runs that were killed, or of all that failed, so that they are tried again."""
    if not path.exists():
        return
    drop_torn_line(path)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    again = "error:" if every else "error: status -"
    kept = [row for row in rows if not (row["status"] or "").startswith(again)]
    if len(kept) < len(rows):
        new = path.with_name(f"{path.name}.new")
        with new.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(new, path)


def word_counts(data: Path) -> Optional[dict]:
    """What prepare_lm.py counted of the split "valid"; None where another tool made the data."""
    path = data / "prepare.json"
    return json.loads(path.read_text())["splits"]["valid"] if path.exists() else None


def numbers(kind: Callable) -> Callable[[str], list]:
    """A reader of values separated by commas, each once."""

    def read(text: str) -> list:
        found = [kind(part) for part in text.split(",")]
        if not all(value > 0 for value in found) or len(set(found)) < len(found):
            raise ValueError
        return found

    read.__name__ = "list of positive, different numbers"
    return read


def rates(text: str) -> dict[str, float]:
    """Reads ``system=rate,...``."""
    return {name: float(rate) for name, rate in (part.split("=") for part in text.split(","))}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    own, extra = arguments, []
    if "--" in arguments:
        own, extra = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    about, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "compare_lm.py",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that prepare_lm.py or fairseq-preprocess wrote")
    add("--systems", default=SYSTEMS, metavar="A,B", help=f"({SYSTEMS})")
    add("--size", choices=SIZES, default="tiny", help="of the models (tiny)")
    add("--tokens-per-sample", type=numbers(int), default="1024", metavar="N,N", help="lengths n (1024)")
    add("--budget", default="1000000tokens", help="tokens, updates or minutes of each run (1000000tokens)")
    add("--seeds", type=numbers(int), default="1", metavar="N,N", help="one run each (1)")
    add("--lr", type=rates, default={}, metavar="SYSTEM=RATE,..", help="rates that are known")
    add("--lr-grid", type=numbers(float), default=GRID, metavar="RATE,..", help=f"for the others ({GRID})")
    add("--lr-budget", help="of a run that tries a rate (a quarter of --budget)")
    add("--tokens-per-update", type=int, default=4096, metavar="N", help="of a batch of any system (4096)")
    add("--max-tokens", type=int, metavar="N", help="of it that are in memory at a time (all)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the training (float32)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=1, help="runs at a time; more than 1 spoil each other's speed (1)")
    add("--eval-shards", type=int, default=1, metavar="K", help="evaluate one block in K (1)")
    add("--output", type=Path, default=RESULTS / "comparison.csv", help="(scripts/results/comparison.csv)")
    add("--curves", type=Path, help="(beside --output, with _curves)")
    add("--folder", type=Path, default=ROOT / "outputs" / "comparison", help="for checkpoints and logs")
    add("--keep", action="store_true", help="keep the checkpoints of finished runs")
    add("--retry", action="store_true", help="try failed runs again")
    add("--report", type=Path, help="write a report to this .html or .md file")
    return check(parser, parser.parse_args(own), extra)


def check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, extra: list[str]
) -> argparse.Namespace:
    """Completes the options, and refuses what cannot be carried out."""
    try:
        options.systems = options.systems.split(",")
        check_systems(options.systems, options.size)
        options.budget = Budget.parse(options.budget)
        quarter = Budget(options.budget.amount / 4, options.budget.unit)
        options.lr_budget = Budget.parse(options.lr_budget or str(quarter))
        if options.lr_budget.unit != options.budget.unit:
            raise ValueError(
                f"--lr-budget {options.lr_budget} is not allowed; allowed: {options.budget.unit}, as --budget"
            )
        comparison_report.check_path(options.report)
    except ValueError as error:
        parser.error(str(error))
    missing = [name for name in ("dict.txt", "train.idx", "valid.idx") if not (options.data / name).exists()]
    if missing:
        parser.error(
            f"--data {options.data} has no {', '.join(missing)}; allowed: a folder that prepare_lm.py or "
            "fairseq-preprocess wrote, with the splits train and valid"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not allowed: there is no GPU; allowed: cpu")
    if options.jobs > 1 and options.budget.unit == "minutes":
        parser.error(f"--jobs {options.jobs} is not allowed with --budget {options.budget}; allowed: 1")
    planned = sorted({word.partition("=")[0] for word in extra} & PLANNED)
    if planned:
        parser.error(f"{planned[0]} is not allowed behind --: the plan sets it, and its row would not tell")
    unknown = sorted(set(options.lr) - set(options.systems))
    if unknown:
        parser.error(f"--lr names {', '.join(unknown)}; allowed: {', '.join(options.systems)}")
    options.max_tokens = options.max_tokens or options.tokens_per_update
    for n in options.tokens_per_sample:
        if options.max_tokens < n or options.max_tokens % n or options.tokens_per_update % options.max_tokens:
            parser.error(
                f"--tokens-per-update {options.tokens_per_update} with --max-tokens {options.max_tokens} is "
                f"not allowed for rows of {n} tokens; allowed: multiples, so that all train on as many tokens"
            )
    for name in ("jobs", "eval_shards"):
        if getattr(options, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(options, name)} is not allowed; allowed: 1 or more"
            )
    options.given_data, options.data, options.extra = options.data, options.data.resolve(), extra
    options.folder, options.output = options.folder.resolve(), options.output.resolve()
    options.curves = options.curves or options.output.with_name(f"{options.output.stem}_curves.csv")
    options.counts = word_counts(options.data)
    options.shared = {
        "size": options.size,
        "data": data_name(options.data),
        "device": device_name(options.device),
        "dtype": precision(options.dtype, options.device),
        "tokens_per_update": options.tokens_per_update,
        "options": shlex.join(extra),
    }
    return options


def stop(number: int, frame: object) -> None:
    """Ends the plan as Ctrl-C does, so that its trainings are ended as well."""
    raise KeyboardInterrupt


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    if options.counts is None:
        print(f"{options.data} has no prepare.json: perplexities per byte and per word are left empty")
    common = {
        "commit": commit(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq_version(),
        "threads": environment(options.jobs, 0)["OMP_NUM_THREADS"],
        "jobs": options.jobs,
        **options.shared,
    }
    plan = Plan(options)
    try:
        with locked(options.folder):
            forget_failed(options.output, every=options.retry)
        table = Table(options.output, COLUMNS, (*SHARED, *RUN), SHOWN, common)
        curves = Table(
            options.curves, CURVES, CURVES[1:], (), {name: common[name] for name in ("jobs", *SHARED)}
        )
        unit = "s" if options.budget.unit == "minutes" else "token"
        with progress_bar(plan.weight(), unit) as bar:
            how = dict(curves=curves, jobs=options.jobs, keep=options.keep, progress=bar)
            for runs in plan.stages():
                carry_out(runs, table, options.folder, **how)
    except ValueError as error:
        sys.exit(f"compare_lm.py: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one ended", file=sys.stderr)
        sys.exit(130)
    print(f"written to {options.output} and {options.curves}")
    if options.report:
        write_report(plan, runs, arguments)


def fairseq_version() -> str:
    """Of the distribution that is installed."""
    for name in ("ve-fairseq", "fairseq"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def write_report(plan: Plan, runs: list[TrainingRun], arguments: list[str]) -> None:
    """The report on this command's runs.

    Args:
        plan: What was carried out.
        runs: Its last stage.
        arguments: The command line.
    """
    options, rows = plan.options, rows_of(plan.options, plan.options.output)
    names = [(run.row["name"], str(run.row["n"]), str(run.row["seed"]), str(run.row["lr"])) for run in runs]

    def chosen(rows: list[dict], stage: str) -> list[dict]:
        budget = str(plan.budgets[stage])
        rows = [row for row in rows if (row["stage"], row["budget"]) == (stage, budget)]
        if stage == "rate":
            return [row for row in rows if row["name"] in options.systems and row["name"] not in options.lr]
        return [row for row in rows if (row["name"], row["n"], row["seed"], row["lr"]) in names]

    final = chosen(rows, "final")
    told = ("date", "commit", "fairseq", "torch", "python", "threads", "jobs")
    settings = {**options.shared, "data": options.given_data, "budget": options.budget}
    settings |= {name: ", ".join(sorted({row[name] for row in final})) for name in told}
    commands = [shlex.join(["python", "scripts/compare_lm.py", *arguments]), ""]
    for run in runs:
        evaluation = plan.evaluation_command(run.row["n"], Path("CHECKPOINTS/checkpoint_last.pt"))
        both = (run.command("CHECKPOINTS"), evaluation)
        commands += [readable(["python", *words[1:]], {options.data: options.given_data}) for words in both]
    curves = chosen(rows_of(options, options.curves), "final")
    comparison = comparison_report.Comparison(settings, final, chosen(rows, "rate"), curves, commands)
    for path in comparison_report.write(options.report, comparison):
        print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
