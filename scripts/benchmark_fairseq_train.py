"""Measures fairseq-train itself: tokens a second of whole trainings, on rows that fairseq makes up.

    python scripts/benchmark_fairseq_train.py                       language models at 1024 and 8192, on a GPU
    python scripts/benchmark_fairseq_train.py --kind masked_lm --lengths 512 4096
    python scripts/benchmark_fairseq_train.py --kind translation --lengths 30 500
    python scripts/benchmark_fairseq_train.py --systems transformer_lm flash_lm

Everything counts: model, loss over the vocabulary, clipping, optimizer, logging. Each contender is a command
of its own, as a user would start it, ``--rounds`` times in turn, with the options of ``CONTENDERS``. A record
says the median over all intervals of ``--log-interval`` updates after the first ``--skip`` updates, in which
code is compiled; ``ratio`` is that over the first contender's of the same run; ``first_update_s`` are seconds
from the start of the command to the end of its first interval; ``peak_memory`` is what a GPU holds for it, in
bytes, at the end of an interval (in rows of commits f6630c6 and f43c7af what fairseq logs, which is less).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from runs.command_line import command_line, require
from runs.provenance import ROOT, provenance
from runs.table import Table

RESULTS = ROOT / "scripts" / "results" / "fairseq_train.csv"
COLUMNS = (
    *("commit", "date", "device", "torch", "name", "kind", "dtype", "n", "tokens", "vocabulary"),
    *("tokens_per_s", "slowest", "fastest", "ratio", "peak_memory", "first_update_s", "intervals", "status"),
)
KEY = ("kind", "device", "torch", "dtype", "n", "tokens", "vocabulary")
SHOWN = ("name", "n", "tokens_per_s", "ratio", "peak_memory", "first_update_s", "status")

ADAM, FUSED = ("--optimizer", "adam"), ("--optimizer", "fused_adam")
TIED = ("--share-decoder-input-output-embed",)
TRANSFORMER = ("--arch", "transformer_lm_gpt", *TIED)
TRANSFORMER_PP = ("--arch", "transformer_pp_lm_gpt", *TIED, "--compile", *FUSED)
FLASH = ("--arch", "flash_lm_gpt", *TIED)
FLASH2 = ("--arch", "flash2_lm_gpt", *TIED)
SENTENCES = ("--arch", "transformer_iwslt_de_en")
#: By kind: its task, and by name the words of each contender, the baseline first.
CONTENDERS = {
    "lm": (
        "dummy_lm",
        {
            "transformer_lm": (*TRANSFORMER, *ADAM),
            "transformer_lm --optimizer fused_adam": (*TRANSFORMER, *FUSED),
            "transformer_pp_lm --compile --optimizer fused_adam": TRANSFORMER_PP,
            "flash_lm": (*FLASH, *ADAM),
            "flash_lm --compile --optimizer fused_adam": (*FLASH, "--compile", *FUSED),
            "flash2_lm --compile --optimizer fused_adam": (*FLASH2, "--compile", *FUSED),
        },
    ),
    "masked_lm": (
        "dummy_masked_lm",
        {
            "roberta_base": ("--arch", "roberta_base", *ADAM),
            "roberta_base --optimizer fused_adam": ("--arch", "roberta_base", *FUSED),
            "flash_masked_lm --compile --optimizer fused_adam": (
                *("--arch", "flash_masked_lm", "--compile", *FUSED),
            ),
        },
    ),
    "translation": (
        "dummy_mt",
        {
            "transformer_iwslt_de_en": (*SENTENCES, *ADAM),
            "transformer_iwslt_de_en --optimizer fused_adam": (*SENTENCES, *FUSED),
            "flash_seq2seq --compile --optimizer fused_adam": (
                *("--arch", "flash_seq2seq", "--compile", *FUSED),
            ),
        },
    ),
}


def words_of(kind: str, name: str, n: int, options: argparse.Namespace) -> list[str]:
    """The command line of a training."""
    task, contenders = CONTENDERS[kind]
    rows = {
        "lm": ("--tokens-per-sample", n),
        "masked_lm": ("--tokens-per-sample", n, "--max-positions", n, "--criterion", "masked_lm"),
        "translation": ("--src-len", n, "--tgt-len", n),
    }[kind]
    words = [
        *("--user-dir", ROOT / "fairseq_flash", "--task", task, "--dict-size", options.vocabulary, *rows),
        *("--max-tokens", max(n, options.tokens), "--dataset-size", 100 * max(n, options.tokens) // n),
        *("--dropout", 0, "--lr", 1e-4, "--lr-scheduler", "fixed", "--clip-norm", 1.0),
        *("--max-update", options.updates, "--log-interval", options.log_interval, "--log-format", "json"),
        *("--no-save", "--disable-validation", *contenders[name]),
        *((f"--{options.dtype}",) if options.dtype != "float32" else ()),
        *(() if options.device.startswith("cuda") else ("--cpu",)),
    ]
    return [str(word) for word in words]


def held_by_a_gpu() -> int | None:
    """Bytes that all processes have of the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return whole - free


def run(words: list[str], skip: int, limit: float) -> dict:
    """One training.

    Returns:
        Its ``rates`` in tokens a second after ``skip`` updates, ``peak_memory``, ``first_update_s`` and
        ``status``, "ok" or the last line of what went wrong.
    """
    found: dict = {"rates": [], "peak_memory": "", "first_update_s": "", "status": "ok"}
    lines = []
    before, begin = held_by_a_gpu(), time.perf_counter()
    # fairseq's folder of logs is the working folder.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fairseq_cli.train", *words]
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            for line in process.stdout or ():
                lines.append(line.strip())
                row = json.loads(line[line.index("{") :]) if '"wps"' in line else None
                if row is None:
                    continue
                if not found["first_update_s"]:
                    found["first_update_s"] = f"{time.perf_counter() - begin:.1f}"
                if int(row["num_updates"]) > skip:
                    found["rates"].append(float(row["wps"]))
                if before is not None:
                    found["peak_memory"] = max(found["peak_memory"] or 0, held_by_a_gpu() - before)
                if time.perf_counter() - begin > limit:
                    process.kill()
        finally:
            process.kill()
            process.wait()
    if not found["rates"]:
        found["status"] = next((line for line in reversed(lines) if line), "no output")[:200]
    return found


def measure(kind: str, n: int, options: argparse.Namespace) -> list[dict]:
    """The rows of a length: every contender, in turn."""
    names = options.systems
    runs: dict = {name: [] for name in names}
    for round_ in range(options.rounds):
        for name in names:
            print(f"n={n}, round {round_ + 1} of {options.rounds}: {name}", flush=True)
            runs[name].append(run(words_of(kind, name, n, options), options.skip, options.limit))
    found = []
    for name in names:
        row = {"name": name, "n": n, **runs[name][-1]}
        rates = [rate for training in runs[name] for rate in training["rates"]]
        del row["rates"]
        row["intervals"] = len(rates)
        if rates:
            row["tokens_per_s"] = round(statistics.median(rates))
            row["slowest"], row["fastest"] = round(min(rates)), round(max(rates))
        found.append(row)
    if "tokens_per_s" in found[0]:
        for row in found:
            if "tokens_per_s" in row:
                row["ratio"] = f"{row['tokens_per_s'] / found[0]['tokens_per_s']:.3f}"
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "benchmark_fairseq_train.py")
    add = parser.add_argument
    add("--kind", choices=CONTENDERS, default="lm", help="of model (lm)")
    add("--systems", nargs="+", metavar="NAME", help="contenders with their options, each in quotes (all)")
    add("--lengths", nargs="+", type=int, default=[1024, 8192], metavar="N", help="(1024 8192)")
    add("--tokens", type=int, default=32768, help="of a batch; one row where a row is longer (32768)")
    add("--vocabulary", type=int, default=32000, help="words, more than a row's tokens (32000)")
    add("--dtype", choices=("float32", "bf16", "fp16"), default="bf16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=1, help="trainings of each contender (1)")
    add("--updates", type=int, default=40, help="of a training (40)")
    add("--skip", type=int, default=10, help="updates that are not timed (10)")
    add("--log-interval", type=int, default=5, help="updates whose rate is one number (5)")
    add("--limit", type=float, default=600, help="seconds of a training (600)")
    add("--output", type=Path, default=RESULTS, help="(scripts/results/fairseq_train.csv)")
    options = parser.parse_args(arguments)
    require(parser, options, 1, "tokens", "rounds", "updates", "log_interval", "lengths")
    if options.vocabulary <= max(options.lengths):
        parser.error(
            f"--vocabulary {options.vocabulary} is not allowed: made-up rows count up; "
            f"allowed: more than {max(options.lengths)}"
        )
    known = list(CONTENDERS[options.kind][1])
    options.systems = options.systems or known
    unknown = [name for name in options.systems if name not in known]
    if unknown:
        parser.error(f"--systems {unknown[0]!r} is unknown; allowed: {', '.join(map(repr, known))}")
    return options


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    common = {**provenance(options.device, options.dtype), "kind": options.kind, "dtype": options.dtype}
    common |= {"tokens": options.tokens, "vocabulary": options.vocabulary}
    table = Table(options.output, COLUMNS, KEY, SHOWN, common)
    for n in options.lengths:
        if not table.has(options.systems, n=n):
            table.add(measure(options.kind, n, options))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
