"""Trains candidates for a better FLASH for a short while, and measures what they get from distant text.

    python scripts/candidates.py --data data-bin/linux --systems flash,flash+decay,local --lr 1e-3

A system is a base as in the package, flash, flash2, flash_chunk, local, quad, transformer_pp or
mc_tfm_pp; behind flash and local, changes follow with a plus, as in flash+convzv+decay. Of the linear branch
alone:

    norm        sums, normalised by groups of values, in place of the mean over all tokens
    decay       norm, and groups forget with fixed half-lives of 1 to 64 chunks, one never; decaylearn: these
                are a start; data: each token has a factor of its own on them
    fade        the mean over earlier chunks forgets with those half-lives
    delta       norm and l2, and a chunk is added less what the state foretells of it
    l2          queries and keys of length 1, with a learned temperature
    norope      queries and keys without rotary positions

and of the whole unit:

    shift       half of the columns of the keys are of the token before; shiftz: of their base z
    conv        z is convolved with the last 4 tokens, column by column; convzv: and v
    sigmoid     of the gate, in place of SiLU
    randchunk   chunks of --chunk-size to an eighth of it, drawn for each update
    hybrid      every sixth layer is softmax attention over the whole row, without positions

--data recall needs no text: rows of --task flash_recall, whose keys are asked for at least --recall-gap
tokens behind the pairs; measured are loss and accuracy of the values, in a CSV of its own.

--lr is a rate for all, or flash=1e-3,local=2e-3,5e-4, the last for all others; with 5e-4/1e-3, each of them.
Each training is a process of its own and a record of the CSV, a failure too (--retry repeats it). A second
run does what is missing; with --save-dir, whose files are named system-rate-seed-digest.pt, also what has no
file there.
"""

import argparse
import hashlib
import itertools
import json
import logging
import sys
import threading
from pathlib import Path

import torch

from ablation.candidate_data import Recall, Text
from ablation.candidate_systems import ALL_SCORES, Size, build, describe, parse_system, rates, save
from ablation.candidate_training import Recipe, compile_layers, train
from runs.command_line import command_line, require
from runs.process import locked, run, stoppable
from runs.provenance import ROOT, provenance
from runs.slots import Slot, do_at_once
from runs.table import Table

KEY = (
    *("data", "seed", "lr", "d", "layers", "s", "chunk_size", "n", "tokens", "tokens_per_update", "dtype"),
    "valid_tokens",
)
COLUMNS = (
    *("commit", "date", "device", "torch", "jobs", "name", *KEY),
    *("parameters", "updates", "seconds", "tokens_per_s", "peak_memory_gib", "train_loss"),
)
SHOWN = ("name", "seed", "lr", "parameters", "tokens_per_s")
#: The data that are made, not read.
RECALL = "recall"
RESULT = "result "
#: What a training takes over from the command line, beside its system, rate and seed.
SHARED = (
    *("data", "tokens", "tokens_per_sample", "tokens_per_update", "embed_dim", "layers", "attention_dim"),
    *("chunk_size", "valid_tokens", "device", "dtype", "pairs", "recall_gap", "recall_words", "save_dir"),
)


def work(options: argparse.Namespace) -> None:
    """One training and its yardsticks; a line of the output is its result."""
    # A compiler's every lock would be a line.
    logging.getLogger().setLevel(logging.WARNING)
    system = parse_system(options.systems[0])
    n, device = options.tokens_per_sample, options.device
    size = Size(options.embed_dim, options.layers, options.chunk_size, options.attention_dim, n)
    rate, seed = options.lr[system.name][0], options.seeds[0]
    recipe = Recipe(
        rate, seed, options.tokens, options.tokens_per_update, n, device, options.dtype, options.compile
    )
    torch.manual_seed(seed)
    data = data_of(options)
    model = build(system, size, data.dictionary).to(device)
    found = {"parameters": sum(map(torch.numel, model.parameters()))}
    print(f"model {describe(system)}, {found['parameters']} parameters", flush=True)
    if recipe.compile:
        compile_layers(model)
    found.update(train(model, data.examples(recipe), recipe))
    if options.save_dir:
        save(options.save_dir / f"{options.worker}.pt", model, size, Path(options.data))
    if device.startswith("cuda"):
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        torch.cuda.empty_cache()
    longest = 4 if system.base in ALL_SCORES else 16
    limits = dict(tokens=options.valid_tokens, chunk=options.chunk_size, longest=longest)
    found.update(data.measure(model, recipe, **limits))
    print(RESULT + json.dumps(found), flush=True)


def data_of(options: argparse.Namespace) -> Text | Recall:
    """What is trained on.

    Raises:
        ValueError: it is not there, or there are no such rows.
    """
    if options.data != RECALL:
        return Text(Path(options.data))
    n = options.tokens_per_sample
    return Recall(options.pairs, options.recall_gap, options.recall_words, n)


def plan(options: argparse.Namespace) -> list[dict]:
    """The records' keys, in the order in which they are trained."""
    shared = dict(
        d=options.embed_dim,
        layers=options.layers,
        s=options.attention_dim,
        chunk_size=options.chunk_size,
        n=options.tokens_per_sample,
        tokens=options.tokens,
        tokens_per_update=options.tokens_per_update,
        valid_tokens=options.valid_tokens,
    )
    cells = itertools.product(options.seeds, options.systems)
    return [
        {"name": name, "seed": seed, "lr": f"{rate:g}", **shared}
        for seed, name in cells
        for rate in options.lr[name]
    ]


class Trainings:
    """Several trainings at a time, each in a process of its own.

    Args:
        options: The command line.
        table: Where records go.
    """

    def __init__(self, options: argparse.Namespace, table: Table) -> None:
        self.options, self.table, self.writing = options, table, threading.Lock()

    def carry_out(self, cells: list[dict]) -> None:
        """Trains all that the table, or the folder for models, does not have.

        Raises:
            KeyboardInterrupt: interrupted; all processes have been ended.
        """
        with locked(self.options.folder):
            self.table.forget_killed()
            waiting = [cell for cell in cells if self._lacks(cell)]
            if len(waiting) < len(cells):
                print(f"{len(cells) - len(waiting)} of {len(cells)} trainings are done already", flush=True)
            do_at_once(self.options.jobs, waiting, self._one)

    def _lacks(self, cell: dict) -> bool:
        found, folder = self.table.find(**cell), self.options.save_dir
        kept = folder is None or (folder / f"{self._named(cell)}.pt").exists()
        return found is None or (found["status"] == "ok" and not kept)

    def _named(self, cell: dict) -> str:
        """Of its files, without an ending: another for each cell of the table."""
        whole = {**self.table.common, **cell}
        digest = hashlib.sha256(json.dumps([whole[name] for name in KEY]).encode()).hexdigest()[:8]
        return f"{cell['name']}-{cell['lr']}-{cell['seed']}-{digest}"

    def _one(self, cell: dict, slot: Slot) -> None:
        log = self.options.folder / f"{self._named(cell)}.log"
        log.unlink(missing_ok=True)
        told, seen = f"{cell['name']} {cell['lr']} {cell['seed']}", 0

        def follow() -> None:
            nonlocal seen
            if slot.stop.is_set():
                raise KeyboardInterrupt
            lines = log.read_text(errors="replace").split("\n")[:-1] if log.exists() else []
            for line in lines[seen:]:
                if line.startswith(("model ", "update ")):
                    print(f"{told}: {line}", flush=True)
            seen = len(lines)

        ended = run(self._words(cell), log, follow=follow, environment=slot.environment, cwd=ROOT)
        follow()
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
        results = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
        result = results[0] if results and not ended.status else {}
        status = "ok" if result else f"error: status {ended.status}: {lines[-1][:300]}"
        row = {**cell, **{name: _rounded(value) for name, value in result.items()}, "status": status}
        with self.writing:
            if result:
                # One whose file was missing.
                old = self.table.find(**cell)
                self.table.forget(lambda record: record == old)
            self.table.add([row])

    def _words(self, cell: dict) -> list[str]:
        words = [sys.executable, __file__, "--worker", self._named(cell), "--systems", cell["name"]]
        words += ["--lr", cell["lr"], "--seeds", cell["seed"]]
        words += [] if self.options.compile else ["--no-compile"]
        for name in (name for name in SHARED if getattr(self.options, name) is not None):
            words += [f"--{name.replace('_', '-')}", getattr(self.options, name)]
        return list(map(str, words))


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__doc__, "candidates.py", allow_abbrev=False)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--data", required=True, help="folder that prepare_lm.py wrote (train and valid are used), or recall")
    add("--systems", required=True, type=lambda text: text.split(","), help="names, separated by commas")
    add("--lr", required=True, metavar="RATES", help="highest learning rates, see below")
    add("--seeds", type=int, nargs="+", default=[1], metavar="N", help="of weights and order (1)")
    add("--tokens", type=int, default=50_000_000, metavar="N", help="of a training")
    add("--tokens-per-sample", type=int, default=4096, metavar="N", help="of a row, a multiple of 8 (4096)")
    add(
        "--tokens-per-update",
        type=int,
        default=32768,
        metavar="N",
        help="a multiple of those of a row (32768)",
    )
    add("--embed-dim", type=int, default=512, metavar="D")
    add("--layers", type=int, default=12, metavar="N", help="units; half as many Transformer layers (12)")
    add("--attention-dim", type=int, default=128, metavar="S", help="of the units' single head (128)")
    add("--chunk-size", type=int, default=256, metavar="C")
    add("--valid-tokens", type=int, default=500_000, metavar="N", help="that the losses are of")
    add("--pairs", type=int, default=16, metavar="N", help="of recall: of a key and its value in a row (16)")
    add("--recall-gap", type=int, metavar="N", help="tokens between pairs and questions (a chunk's)")
    add("--recall-words", type=int, default=64, metavar="N", help="keys, and as many values (64)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=["bfloat16", "float32"], help="of products (bfloat16 on a GPU, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="layers, for training (on a GPU)")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time; speeds then tell little")
    add("--retry", action="store_true", help="take the records of failures away first")
    add("--output", type=Path, help="(scripts/results/candidates.csv, of recall candidates_recall.csv)")
    add("--folder", type=Path, default=ROOT / "outputs" / "candidates", help="for logs")
    add(
        "--save-dir",
        type=Path,
        help="keeps models there, of bases alone, for yardsticks.py and extrapolate.py",
    )
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    require(parser, options, 1, "tokens", "embed_dim", "layers", "chunk_size", "valid_tokens", "jobs")
    on_gpu, n = options.device.startswith("cuda"), options.tokens_per_sample
    if n < 8 or n % 8:
        parser.error(f"--tokens-per-sample {n} is not allowed; allowed: a multiple of 8")
    if options.tokens_per_update < n or options.tokens_per_update % n:
        allowed = f"allowed: a multiple of --tokens-per-sample {n}"
        parser.error(f"--tokens-per-update {options.tokens_per_update} is not allowed; {allowed}")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.compile = on_gpu if options.compile is None else options.compile
    if options.data != RECALL:
        options.data = str(Path(options.data).resolve())
    options.save_dir = options.save_dir and options.save_dir.resolve()
    if options.recall_gap is None:
        options.recall_gap = options.chunk_size
    named = "candidates_recall.csv" if options.data == RECALL else "candidates.csv"
    options.output = options.output or ROOT / "scripts" / "results" / named
    options.systems = list(dict.fromkeys(options.systems))
    try:
        options.lr = rates(options.lr, options.systems)
        changed = [name for name in options.systems if parse_system(name).choice]
        if options.save_dir and (changed or options.data == RECALL):
            found = ", ".join(changed) or "what recall trained"
            raise ValueError(f"--save-dir cannot keep {found}; allowed: bases without changes, on a text")
        data_of(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    with stoppable("candidates.py"):
        common = {**provenance(options.device, options.dtype), "jobs": options.jobs}
        data = data_of(options)
        common["data"] = data.name
        columns, shown = ((*names, *data.measures, "status") for names in (COLUMNS, SHOWN))
        table = Table(options.output, columns, KEY, shown, common)
        if options.retry:
            table.forget(lambda row: row["status"] != "ok")
        Trainings(options, table).carry_out(plan(options))


if __name__ == "__main__":
    main()
