"""Draws what the measurements wrote: reads CSV files alone, writes a PNG and an SVG for each figure.

    python scripts/plot.py                                every figure of scripts/results, into its figures/
    python scripts/plot.py quality tokens --results mine  two of them, from another folder
    python scripts/plot.py training --csv mine.csv        one of them, from one file, beside it

    generation  generation.csv          time of a step, state and memory by position
    training    training.csv            tokens a second and memory of a training step by length
    tokens      comparison_curves.csv   loss against tokens
    seconds     comparison_curves.csv   loss against seconds
    quality     comparison.csv          loss against training speed
    ablation    comparison.csv          loss of each system against flash_lm's, as bars
    factors     ablation.csv            loss with one choice changed against that without, as bars

A system has the same colour and marker in every figure. Lines and bars are means over seeds; bands and
whiskers reach from the lowest to the highest. Needs matplotlib (pip install -e ".[plot]").
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

from report.figures import FIGURES, draw

__all__ = ["FIGURES", "draw", "save"]

RESULTS = Path(__file__).resolve().parent / "results"


def save(figure: plt.Figure, stem: Path) -> Iterator[Path]:
    """Writes and closes a figure; yields the PNG and the SVG."""
    for end in ("png", "svg"):
        path = stem.with_name(f"{stem.name}.{end}")
        figure.savefig(path, dpi=150, metadata={"Date": None} if end == "svg" else None)
        yield path
    plt.close(figure)


def stem_of(name: str, path: Path) -> str:
    """The name of a figure: that of its CSV, and its own behind it where several share one."""
    single = sum(source.csv == FIGURES[name].csv for source in FIGURES.values()) == 1
    stem = path.stem.removesuffix("_curves")
    return stem if single else f"{stem}_{name}"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    about, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "plot.py", description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; (all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs (scripts/results)")
    parser.add_argument("--csv", type=Path, help="in place of the one that the figure has there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.figures if name not in FIGURES]
    if unknown:
        parser.error(f"figure {', '.join(unknown)} is unknown; allowed: {', '.join(FIGURES)}")
    if options.csv and not options.figures:
        parser.error(f"--csv {options.csv} needs the name of a figure; allowed: {', '.join(FIGURES)}")
    there = [name for name in FIGURES if (options.results / FIGURES[name].csv).exists()]
    for name in options.figures or there:
        path = options.csv or options.results / FIGURES[name].csv
        try:
            figure = draw(name, path)
        except ValueError as error:
            if options.figures:
                sys.exit(f"plot.py: {error}")
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        folder = path.parent if options.csv else options.results / "figures"
        folder.mkdir(exist_ok=True)
        for written in save(figure, folder / stem_of(name, path)):
            print(written)


if __name__ == "__main__":
    main(sys.argv[1:])
