"""Measures the defaults: one choice at a time, by short trainings on one text.

    python scripts/ablate.py --data data-bin/books [--device cuda --jobs 12]

Three stages, each once, in one CSV; a second run goes on where the first ended. "learning rate": every
system with each rate. "factor": around each base, one choice changed, at the best rate of its system.
"seeds": two more seeds for the values of a factor that lie less than 0.02 from its best. With --stages
winner, the systems at their best rates for more tokens; their checkpoints stay in the folder.
"""

import argparse
import re
from pathlib import Path

import torch

from report.ablation import tables
from runs.ablation import BASES, KEY, STAGES, Plan
from runs.command_line import command_line, require
from runs.log import CURVE_COLUMNS, MEASURED
from runs.process import stoppable
from runs.provenance import ROOT, provenance
from runs.schedule import carry_out
from runs.table import Table

COLUMNS = ("commit", "date", "device", "torch", "dtype", "jobs", "name", *KEY, *MEASURED)
CURVES = ("name", *KEY, *CURVE_COLUMNS)
SHOWN = ("name", "factor", "value", "lr", "seed", "valid_loss", "status")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "ablate.py")
    add = parser.add_argument
    results = ROOT / "scripts" / "results"
    add("--data", type=Path, required=True, help="folder that prepare_lm.py wrote")
    add("--output", type=Path, default=results / "ablation.csv", help="CSV of the runs")
    add("--curves", type=Path, help="CSV of the loss curves (beside --output)")
    add("--folder", type=Path, default=ROOT / "outputs" / "ablation", help="for logs")
    add("--stages", nargs="+", choices=list(STAGES), default=["learning rate", "factor", "seeds"])
    add("--bases", nargs="+", choices=list(BASES), default=list(BASES), help="of the stages factor and seeds")
    add("--seeds", type=int, nargs="+", default=[1], help="of the stage factor (1)")
    add("--tokens", type=int, default=1_000_000, help="of a run")
    add("--winner-tokens", type=int, default=5_000_000, help="of a run of the stage winner")
    add("--tokens-per-sample", type=int, default=1024)
    add("--table", action="store_true", help="print what --output holds as Markdown, and train nothing")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=1, help="runs at a time; their speeds cannot be compared if more than 1")
    options = parser.parse_args(arguments)
    require(parser, options, 1, "tokens", "winner_tokens", "tokens_per_sample", "jobs")
    if not (options.data / "dict.txt").exists():
        parser.error(f"--data {options.data} has no dict.txt; allowed: a folder that prepare_lm.py wrote")
    options.data = options.data.resolve()
    options.curves = options.curves or options.output.with_name(f"{options.output.stem}_curves.csv")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    if options.table:
        print(re.sub(" {2,}", " ", "\n\n".join(tables(Plan(options).earlier.find(stage=set(STAGES))))))
        return
    common = {**provenance(options.device), "jobs": options.jobs}
    with stoppable("ablate.py"):
        table = Table(options.output, COLUMNS, KEY, SHOWN, common)
        curves = Table(options.curves, CURVES, (*KEY, *CURVE_COLUMNS), (), {})
        for stage in options.stages:
            runs = list(STAGES[stage](Plan(options)))
            points = max(1, min(run.updates for run in runs) // 10)
            carry_out(runs, table, options.folder, curves=curves, jobs=options.jobs, log_interval=points)


if __name__ == "__main__":
    main()
