"""Prints what a model costs before anyone pays for it: size, work, memory, and when it beats a Transformer.

    python scripts/describe.py --arch flash_lm --tokens-per-sample 4096 [any option of the model]
    python scripts/describe.py --arch transformer_lm_gpt --tokens-per-sample 4096
    python scripts/describe.py --plan      # what training takes: 125 M to 7 B on 1 to 1024 GPUs, rows to 1 M

Nothing is computed: the real model runs on tensors that have a shape and no numbers, and PyTorch reports the
products it asks for and the tensors it keeps, so that the largest model takes seconds and no memory. Where
PyTorch chooses between implementations (attention, dropout), it is the choice for a CPU.

Multiply-adds are those of matrix products, two floating point operations each; all other work is small
beside them, but takes time: where training steps of both were measured, the crossover in time stands there
too. "Skipping the future" is what a perfect kernel of quadratic attention would do, which computes the scores
on and below the diagonal alone; mixed chunk attention is counted as its reference computes it. The crossover
is the shortest row, in whole chunks, from which on a token costs at most what it costs in a Transformer of
the same width, depth (two gated attention units for a layer) and, but for rounding, number of parameters.
Activations are what the forward pass keeps for the backward pass, each memory block once.

With --plan, time, memory and money are reckoned from the rate that one GPU was measured at and from what is
printed as assumed: for each size the fastest division into GPUs that share a row (--sequence-parallel-size)
and groups with rows of their own that fits.
"""

import argparse
import sys

import torch

from bench.models import language_models
from bench.sketch import Sketch
from report.cost import report
from report.plan import Cluster, assumptions, plans
from runs.command_line import command_line, require


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line: our options, and fairseq's."""
    parser = command_line(__doc__, "describe.py", allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help="what training takes, from one GPU to 1024")
    described = "--plan" not in arguments
    parser.add_argument("--arch", required=described, help="a language model")
    parser.add_argument("--tokens-per-sample", type=int, required=described, metavar="N", help="tokens a row")
    parser.add_argument("--vocabulary", type=int, default=8000, help="words of the dictionary (8000)")
    parser.add_argument("--batch", type=int, default=8, help="rows; what they share is divided by it (8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    own, words = parser.parse_known_args(arguments)
    if own.plan:
        if len(arguments) > 1:
            parser.error("--plan is alone; allowed: --plan, or --arch with --tokens-per-sample")
        return own, []
    if own.arch not in language_models():
        parser.error(f"--arch {own.arch} is unknown; allowed: {', '.join(language_models())}")
    require(parser, own, 1, "tokens_per_sample", "batch")
    require(parser, own, 5, "vocabulary")
    return own, ["--arch", own.arch, "--tokens-per-sample", str(own.tokens_per_sample), *words]


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    own, words = parse(arguments)
    if own.plan:
        for line in (*assumptions(Cluster()), *plans(Cluster())):
            print(line)
        return
    print(
        f"{own.arch}, {own.tokens_per_sample} tokens per sample, {own.batch} rows, {own.vocabulary} words, "
        f"{own.dtype}"
    )
    try:
        sketch = Sketch(words, own.vocabulary, getattr(torch, own.dtype), own.batch)
        for line in report(sketch, own.tokens_per_sample):
            print(line, flush=True)
    except (ValueError, AssertionError) as error:  # the second is how fairseq refuses an option
        sys.exit(f"describe.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
