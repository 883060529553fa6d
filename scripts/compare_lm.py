"""Answers whether FLASH is better than a Transformer on one's own data: trains, evaluates, and reports.

    python scripts/prepare_lm.py --text my-books/ --output data-bin/books
    python scripts/compare_lm.py --data data-bin/books --report comparison.html
    python scripts/compare_lm.py --data data-bin/books --systems transformer_lm,flash_lm --seeds 1,2,3 \\
        --tokens-per-sample 512,4096 --budget 5000000tokens --lr flash_lm=4e-3,transformer_lm=2e-3
    python scripts/compare_lm.py --data data-bin/books --size base --budget 60minutes --dtype bfloat16 \\
        --tokens-per-update 65536 -- --compile --optimizer fused_adam

What stands behind -- goes to every training; --compile not to transformer_lm, whose fairseq does not know it.

Every system gets the same blocks of text in the same order, the same schedule (a tenth of the updates is
warm-up, then the rate falls to 0), and the same budget: ``1000000tokens``, ``250updates``, or ``5minutes`` of
training, of which each system makes as many updates as its speed allows. A few updates of each (stage
"speed") tell that, and how long everything takes. fairseq's transformer_lm gets its norms before the layers,
as all others have; it hardly learns otherwise. A system without a rate in ``--lr`` first tries those of
``--lr-grid`` (stage "rate"), with the first length, the first seed, and ``--lr-budget``, a quarter of the
budget.

Each training is a process of fairseq-train; its result (stage "final") is measured by fairseq-eval-lm on the
split "valid" with the last checkpoint, in rows of the trained length. Losses are in nats per token, and
prepare_lm.py's counts turn them into bits per byte and perplexities per byte and word, which can be compared
between vocabularies. Each run is a record of --output, in the folder "comparison" here, and a curve of
--curves, a failed one with its error. At the end stand a table and the answer in one sentence, as on top of
--report. Ctrl-C and kill lose at most the updates since the last checkpoint; the same command goes on. A run
that was killed is tried again, one that failed only with --retry. With another --eval-shards runs are others.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch

from report import comparison
from runs import process
from runs.command_line import command_line, require, split_off
from runs.lm_comparison import EVALUATED, Budget, Plan
from runs.log import CURVE_COLUMNS, MEASURED
from runs.progress import Progress, duration
from runs.provenance import data_name, provenance
from runs.schedule import TrainingRun, carry_out, readable
from runs.slots import environment
from runs.systems import SIZES, check_systems
from runs.table import Table, read

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
OUTPUT = Path("comparison") / "comparison.csv"
GRID = "1e-3,2e-3,4e-3,8e-3"


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


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Plan]:
    """Reads the command line: where and how to carry out, and what."""
    own, extra = split_off(arguments)
    parser = command_line(__doc__, "compare_lm.py")
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
    add("--output", type=Path, default=OUTPUT, help=f"CSV of the runs ({OUTPUT})")
    add("--curves", type=Path, help="(beside --output, with _curves)")
    add("--folder", type=Path, help="for checkpoints and logs (beside --output, with _runs)")
    add("--keep", action="store_true", help="keep the checkpoints of finished runs")
    add("--retry", action="store_true", help="try failed runs again")
    add("--report", type=Path, help="write a report to this .html or .md file")
    options = parser.parse_args(own)
    require(parser, options, 1, "jobs", "eval_shards")
    try:
        return options, check(options, extra)
    except ValueError as error:
        parser.error(str(error))


def check(options: argparse.Namespace, extra: list[str]) -> Plan:
    """What the command line asks for.

    Raises:
        ValueError: it cannot be carried out.
    """
    systems, budget = options.systems.split(","), Budget.parse(options.budget)
    check_systems(systems, options.size)
    rate_budget = Budget.parse(options.lr_budget or str(Budget(budget.amount / 4, budget.unit)))
    if rate_budget.unit != budget.unit:
        raise ValueError(f"--lr-budget {rate_budget} is not allowed; allowed: {budget.unit}, as --budget")
    comparison.check_path(options.report)
    missing = [name for name in ("dict.txt", "train.idx", "valid.idx") if not (options.data / name).exists()]
    if missing:
        raise ValueError(
            f"--data {options.data} has no {', '.join(missing)}; allowed: a folder that prepare_lm.py or "
            "fairseq-preprocess wrote, with the splits train and valid"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda is not allowed: there is no GPU; allowed: cpu")
    if options.jobs > 1 and budget.unit == "minutes":
        raise ValueError(f"--jobs {options.jobs} is not allowed with --budget {budget}; allowed: 1")
    planned = sorted({word.partition("=")[0] for word in extra} & PLANNED)
    if planned:
        raise ValueError(f"{planned[0]} is not allowed behind --: the plan sets it, no record would tell")
    unknown = sorted(set(options.lr) - set(systems))
    if unknown:
        raise ValueError(f"--lr names {', '.join(unknown)}; allowed: {', '.join(systems)}")
    whole = options.tokens_per_update
    part = options.max_tokens or whole
    for n in options.tokens_per_sample:
        if part < n or part % n or whole % part:
            raise ValueError(
                f"--tokens-per-update {whole} with --max-tokens {part} is not allowed for rows of {n} "
                "tokens; allowed: multiples, so that all train on as many tokens"
            )
    origin, data = provenance(options.device, options.dtype), options.data.resolve()
    shared = {"size": options.size, "data": data_name(data), "device": origin["device"]}
    # What was evaluated tells a run as well: losses of different parts of the split are never compared.
    part_of = ["--eval-shards", str(options.eval_shards)] if options.eval_shards > 1 else []
    shared |= {"dtype": origin["dtype"], "tokens_per_update": whole, "options": shlex.join(part_of + extra)}
    return Plan(
        data=data,
        output=options.output.resolve(),
        shared=shared,
        systems=systems,
        size=options.size,
        lengths=options.tokens_per_sample,
        seeds=options.seeds,
        budget=budget,
        rate_budget=rate_budget,
        rates=options.lr,
        grid=options.lr_grid,
        tokens_per_update=whole,
        max_tokens=part,
        half=options.dtype == "bfloat16",
        on_gpu=options.device == "cuda",
        eval_shards=options.eval_shards,
        counts=word_counts(options.data),
        extra=extra,
    )


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options, plan = parse(arguments)
    if plan.counts is None:
        print(f"{options.data} has no prepare.json: perplexities per byte and per word are left empty")
    common = {**provenance(options.device, options.dtype), "jobs": options.jobs, **plan.shared}
    common["threads"] = environment(options.jobs, 0)["OMP_NUM_THREADS"]
    beside = {name: plan.output.with_name(f"{plan.output.stem}_{name}") for name in ("curves.csv", "runs")}
    folder, curves_path = (options.folder or beside["runs"]).resolve(), options.curves or beside["curves.csv"]
    with process.stoppable("compare_lm.py"):
        table = Table(plan.output, COLUMNS, (*SHARED, *RUN), SHOWN, common)
        if options.retry:
            with process.locked(folder):
                table.forget_failed()
        curves = Table(curves_path, CURVES, CURVES[1:], (), common)
        print("\n".join(plan.told()), flush=True)
        final = run_all(plan, table, folder, dict(curves=curves, jobs=options.jobs, keep=options.keep))
    told = tell(plan, final, read(curves_path), options.data, arguments)
    print(f"\n{comparison.summary(told)}\n\nwritten to {plan.output} and {curves_path}")
    if options.report:
        for path in comparison.write(options.report, told):
            print(f"written to {path}")


def run_all(plan: Plan, table: Table, folder: Path, how: dict) -> list[TrainingRun]:
    """Carries out a plan, whose last stage is returned; tells beforehand how long it takes."""
    probes = plan.probes()
    with Progress(len(probes), len(probes), "measurements of speed") as progress:
        each = max(1, min(10, probes[0].updates // 3))
        carry_out(probes, table, folder, jobs=how["jobs"], log_interval=each, progress=progress)
    runs = [run for stage in plan.stages() for run in stage]
    left = [run for run in runs if not table.has([run.record["name"]], **run.record)]
    seconds = sum(run.weight for run in left) / how["jobs"]
    if left:
        count = (
            f"{len(left)} of {len(runs)} runs that are left" if len(left) < len(runs) else f"{len(runs)} runs"
        )
        print(f"about {duration(seconds)} for {count}", flush=True)
    with Progress(len(runs), sum(run.weight for run in runs)) as progress:
        for stage in plan.stages():
            carry_out(stage, table, folder, progress=progress, **how)
    return stage


def tell(
    plan: Plan, runs: list[TrainingRun], curves: list[dict], data: Path, arguments: list[str]
) -> comparison.Comparison:
    """What the report on this command's runs tells.

    Args:
        plan: What was carried out.
        runs: Its last stage.
        curves: Loss curves, those of other runs among them.
        data: Folder of the data, as it was given.
        arguments: The command line.
    """
    names = [tuple(str(run.record[name]) for name in ("name", *RUN)) for run in runs]
    shared = {name: str(value) for name, value in plan.shared.items()}

    def chosen(records: list[dict]) -> list[dict]:
        records = [record for record in records if shared.items() <= record.items()]
        return [record for record in records if tuple(record[name] for name in ("name", *RUN)) in names]

    records = read(plan.output)
    rates = [
        record for record in records if shared.items() <= record.items() and record["name"] in plan.tuned
    ]
    rates = [
        record for record in rates if (record["stage"], record["budget"]) == ("rate", str(plan.rate_budget))
    ]
    final = chosen(records)
    settings = {**plan.shared, "data": data, "budget": plan.budget, "evaluated": plan.part}
    for name in ("date", "commit", "fairseq", "torch", "python", "threads", "jobs"):
        settings[name] = ", ".join(sorted({record[name] for record in final}))
    commands = [shlex.join(["python", "scripts/compare_lm.py", *arguments]), ""]
    for run in runs:
        name, n = run.record["name"], run.record["n"]
        evaluation = plan.evaluation_command(name, n, Path("CHECKPOINTS/checkpoint_last.pt"))
        both = (run.command("CHECKPOINTS"), evaluation)
        commands += [readable(["python", *words[1:]], {plan.data: data}) for words in both]
    tokens = plan.counts["tokens"] if plan.counts else None
    return comparison.Comparison(settings, final, rates, chosen(curves), commands, tokens)


if __name__ == "__main__":
    main(sys.argv[1:])
