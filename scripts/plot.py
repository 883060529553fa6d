"""Draws what the measurements wrote: reads CSV files alone, writes a PNG for each figure.

    python scripts/plot.py                                every figure of scripts/results, into its figures/
    python scripts/plot.py quality tokens --results mine  two of them, from another folder
    python scripts/plot.py training --csv mine.csv        one of them, from one file, beside it

    generation  generation.csv          time of a step, state and memory by position
    training    training.csv            tokens a second and memory of a training step by length
    gpu         fairseq_train.csv       the same of whole trainings on a GPU
    masked      masked_lm.csv           perplexity of masked words by rate, accuracy once fine-tuned
    translation translation.csv         loss by rate, BLEU
    positions   extrapolation.csv       perplexity by position in rows longer than those of training
    candidates  candidates.csv          loss by distance and in longer rows, of the longest trainings
    tokens      comparison_curves.csv   loss against tokens
    seconds     comparison_curves.csv   loss against seconds
    quality     comparison.csv          loss against training speed
    ablation    comparison.csv          loss of each system against flash_lm's, as bars
    factors     ablation.csv            loss with one choice changed against that without, as bars
    recurrence  yardsticks.csv          gain over another model by distance of the token's last occurrence
    copy        yardsticks.csv          gain of a first copy by the distance of the second
    context     yardsticks.csv          loss of the same last tokens by length of the row
    passkey     yardsticks.csv          part of the keys that are found, by their distance

A system has the same colour and marker in every figure. Lines and bars are means over seeds; bands and
whiskers reach from the lowest to the highest. A figure has at most six panels; the rest are in a second file
(_2) and so on. Needs matplotlib and pandas (pip install -e ".[plot]").
"""

import sys
from pathlib import Path

from runs.command_line import command_line

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = command_line(__doc__, "plot.py")
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIGURE", help="see above; (all)")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs (scripts/results)")
    add("--csv", type=Path, help="in place of the one that the figure has there")
    add("--svg", action="store_true", help="an SVG beside each PNG, the same at each call")
    options = parser.parse_args(arguments)
    try:
        from report.figures import FIGURES, draw, png, stem_of, svg
    except ImportError as error:
        parser.exit(2, f'plot.py: {error.name} is not installed; allowed: pip install -e ".[plot]"\n')
    unknown = [name for name in options.figures if name not in FIGURES]
    if unknown:
        parser.error(f"figure {', '.join(unknown)} is unknown; allowed: {', '.join(FIGURES)}")
    if options.csv and not options.figures:
        parser.error(f"--csv {options.csv} needs the name of a figure; allowed: {', '.join(FIGURES)}")
    if not options.csv and not options.results.is_dir():
        parser.error(f"--results {options.results} does not exist; allowed: a folder of CSVs")
    there = [name for name in FIGURES if (options.results / FIGURES[name].csv).exists()]
    for name in options.figures or there:
        path = options.csv or options.results / FIGURES[name].csv
        folder = path.parent if options.csv else options.results / "figures"
        folder.mkdir(exist_ok=True)
        try:
            for kind in ("png", "svg") if options.svg else ("png",):
                for page, figure in enumerate(draw(name, path), start=1):
                    written = folder / f"{stem_of(name, path, page)}.{kind}"
                    written.write_bytes({"png": png, "svg": svg}[kind](figure))
                    print(written)
        except ValueError as error:
            if options.figures:
                sys.exit(f"plot.py: {error}")
            print(f"{name} is left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
