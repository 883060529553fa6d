"""Draws scripts/results/generation.csv: time per token, size of the state and peak memory by position.

    python scripts/plot_generation.py                     writes generation.png and .svg beside the CSV
    python scripts/plot_generation.py --csv mine.csv

Reads only the CSV of benchmark_generation.py; needs matplotlib (pip install -e ".[plot]").
"""

import argparse
import csv
import sys
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results" / "generation.csv"
#: Told apart without colours as well: Okabe and Ito's palette, with a marker each.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")]
PANELS = {
    "median_ms": ("one step, milliseconds", 1.0),
    "state_bytes": ("state, MiB", 2**20),
    "peak_memory": ("peak memory, MiB", 2**20),
}


def read(path: Path) -> list[dict[str, str]]:
    """The rows for single steps.

    Raises:
        ValueError: there are none, or of several devices or types, which cannot share a panel.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; benchmark_generation.py writes it")
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["pass"] == "step"]
    settings = {(row["device"], row["dtype"], row["threads"]) for row in rows}
    if len(settings) != 1:
        raise ValueError(
            f"{path} has rows of {len(settings)} settings (device, dtype, threads); allowed: one"
        )
    return rows


def draw(rows: list[dict[str, str]]) -> plt.Figure:
    """A row of panels for each batch and beam; what ran out of memory is missing from the lines."""
    names = sorted({row["name"] for row in rows})
    cells = sorted({(int(row["b"]), int(row["beam"])) for row in rows})
    size = (4 * len(PANELS), 2.6 * len(cells))
    figure, axes = plt.subplots(len(cells), len(PANELS), figsize=size, squeeze=False, layout="constrained")
    for (line, (b, beam)), (column, quantity) in product(enumerate(cells), enumerate(PANELS)):
        axis, (label, unit) = axes[line][column], PANELS[quantity]
        for name, (colour, marker) in zip(names, STYLES, strict=False):
            points = sorted(
                (int(row["n"]), float(row[quantity]) / unit)
                for row in rows
                if (row["name"], int(row["b"]), int(row["beam"])) == (name, b, beam)
                and row["status"] == "ok"
                and float(row[quantity] or 0) > 0
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        axis.set(xscale="log", yscale="log", ylabel=label, title=f"batch {b}, beam {beam}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("position")
    axes[0][0].legend()
    row = rows[0]
    figure.suptitle(f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}")
    return figure


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    about, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="(scripts/results/generation.csv)")
    path = parser.parse_args(arguments).csv
    try:
        figure = draw(read(path))
    except ValueError as error:
        sys.exit(f"plot_generation.py: {error}")
    for end in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{end}"), dpi=150)
        print(path.with_suffix(f".{end}"))


if __name__ == "__main__":
    main(sys.argv[1:])
