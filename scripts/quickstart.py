"""Prepares text, trains flash_lm_tiny on it, evaluates it and lets it write, by fairseq's own commands.

Without --text it takes the help pages that every Python carries (half a megabyte): nothing is downloaded. A
second run with the same text reuses what is there. Ctrl-C is safe: the same command goes on from the last
checkpoint.

    bash scripts/quickstart.sh                                  the help pages, three minutes of training
    bash scripts/quickstart.sh --text my-book.txt --more 20     twenty minutes more on one's own text
    bash scripts/quickstart.sh -- --lr 1e-3 --layers 12         what stands behind -- goes to fairseq-train
"""

import argparse
import hashlib
import json
import math
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import process
from runs.command_line import command_line, split_off
from runs.log import Log
from text.read import find_text_files

ROOT = Path(__file__).resolve().parent.parent
USER_DIR = ROOT / "fairseq_flash"
ARCHITECTURE = "flash_lm_tiny"
MINUTES = 200 / 60
TOKENS_PER_SAMPLE = 512
VALID_TOKENS = 20000  # of a larger validation text, about as many are evaluated
TOKENS_PER_UPDATE = 2048
SAMPLE_BYTES = 4_000_000  # of a larger text, the vocabulary is learned from as many
#: Tokens after which models are compared in docs/results.md; fewer tell little of what a model can.
JUDGED = 5_000_000
STATE = "quickstart.json"


class Run:
    """One text with its options: the folder that holds everything about it, and what has been done so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        self.checkpoints = folder / "checkpoints"
        self.tensorboard = folder / "tensorboard"
        self.log = folder / "train.log"
        path = folder / STATE
        self.state = json.loads(path.read_text()) if path.exists() else {"trained": 0.0, "goal": 0.0}

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation loss."""
        return self.checkpoints / "checkpoint_best.pt"

    def save(self, **changes: Any) -> None:
        """Notes what has been done; a kill leaves the old note or the new one."""
        self.state.update(changes)
        process.write_whole(self.folder / STATE, json.dumps(self.state, indent=2) + "\n")


def command(name: str, *arguments: Any) -> list[str]:
    """A command of fairseq, beside this Python."""
    return [str(Path(sys.executable).with_name(name)), *map(str, arguments)]


def show(words: list[str]) -> str:
    """A command as one would type it."""
    return shlex.join([Path(words[0]).name, *words[1:]])


def built_in_text(folder: Path) -> Path:
    """Writes Python's help pages as documents with a paragraph a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pydoc_data.topics.topics.items():
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", page))
        (folder / f"{name}.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    return folder


def identify(options: argparse.Namespace) -> str:
    """A name for text and options, the same wherever the text lies."""
    digest = hashlib.sha256(json.dumps([options.vocab_size, options.extra]).encode())
    if not options.text:
        digest.update(json.dumps(pydoc_data.topics.topics).encode())
        return f"python-help-{digest.hexdigest()[:8]}"
    for file in find_text_files(options.text, "--text"):
        with file.path.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    stem = options.text[0].resolve().name.split(".")[0]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', stem) or 'text'}-{digest.hexdigest()[:8]}"


def prepare(run: Run, options: argparse.Namespace, lock: int) -> None:
    """Makes the data folder, unless it is there."""
    if run.data.exists():
        print(f"data: {run.data} (already prepared)")
        return
    text = options.text or [built_in_text(run.folder / "text")]
    words = [sys.executable, str(ROOT / "scripts" / "prepare_lm.py"), "--text", *map(str, text)]
    words += ["--output", str(run.data), "--vocab-size", str(options.vocab_size)]
    words += ["--sample-bytes", str(SAMPLE_BYTES)]
    print(f"\n$ {show(words)}", flush=True)
    ended = process.run(words, keep_open=[lock])
    if ended.status:
        sys.exit(ended.status)


def training_command(run: Run, minutes: float, extra: list[str]) -> list[str]:
    """fairseq-train with what suits a small model and a few minutes; ``extra`` comes last and so decides."""
    # Each save validates as well: often on a CPU, where an update takes a second, seldom on a GPU; always
    # on fewer tokens than it has trained on since.
    interval = 200 if shutil.which("nvidia-smi") else 10
    words = command("fairseq-train", run.data, "--user-dir", USER_DIR, "--task", "language_modeling")
    words += ["--arch", ARCHITECTURE, "--share-decoder-input-output-embed"]
    words += ["--tokens-per-sample", str(TOKENS_PER_SAMPLE), "--max-tokens", str(TOKENS_PER_UPDATE)]
    words += ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0"]
    words += ["--lr", "4e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "50"]
    words += ["--save-dir", str(run.checkpoints), "--tensorboard-logdir", str(run.tensorboard)]
    words += ["--save-interval-updates", str(interval), "--keep-interval-updates", "1"]
    words += ["--no-epoch-checkpoints", "--max-valid-steps", "4", "--num-workers", "0"]
    words += ["--log-format", "json", "--log-interval", "5", "--seed", "1"]
    # fairseq counts the time of earlier runs as well, so this is a total
    return [*words, "--stop-time-hours", f"{minutes / 60:.6f}", *extra]


def train_up_to(run: Run, goal: float, extra: list[str], lock: int) -> None:
    """Trains until ``goal`` minutes in all are reached, from the last checkpoint if there is one."""
    if run.state["trained"] >= goal and run.best.exists():
        print(f"training: {goal:.1f} minutes are done already; --more MINUTES goes on")
        return
    run.save(goal=goal)
    words = training_command(run, goal, extra)
    print(f"\n$ {show(words)}\n(the log goes to {run.log})", flush=True)
    log = Log(run.log, offset=run.log.stat().st_size if run.log.exists() else 0)

    def follow() -> None:
        for kind, point in log.read():
            shown = [name for name in ("loss", "ppl", "wps", "num_updates") if name in point]
            told = "  ".join(f"{name} {point[name]:g}" for name in shown)
            print(f"  {kind:12} {told}", flush=True)

    ended = process.run(words, run.log, follow=follow, keep_open=[lock])
    log.read()
    if ended.status:
        sys.exit(f"the training failed: {log.tail()}; see {run.log}")
    if not log.epochs or not run.best.exists():
        sys.exit(f"the training made no update: give more text or more --minutes; see {run.log}")
    gpu = log.gpu_bytes()
    kind = {"peak_mb": (gpu or ended.peak_bytes) / 2**20, "memory": "GPU memory" if gpu else "RAM"}
    seen = round(log.updates * log.tokens_per_update())
    run.save(trained=goal, updates=log.updates, seen=seen, tokens_per_second=log.speed(), **kind)


def evaluate(run: Run) -> None:
    """Notes the validation loss of the best checkpoint, unless that is known."""
    changed = run.best.stat().st_mtime_ns
    if run.state.get("evaluated") == changed:
        return
    tokens = json.loads((run.data / "prepare.json").read_text())["splits"]["valid"]["tokens"]
    words = command("fairseq-eval-lm", run.data, "--user-dir", USER_DIR, "--path", run.best)
    words += ["--gen-subset", "valid", "--tokens-per-sample", str(TOKENS_PER_SAMPLE), "--max-tokens", "2048"]
    words += ["--num-shards", str(max(1, tokens // VALID_TOKENS)), "--shard-id", "0", "--num-workers", "0"]
    output = capture(words)
    count = re.search(r"Evaluated ([\d,]+) tokens", output)
    loss = re.search(r"Loss \(base 2\): ([\d.]+)", output)
    if not count or not loss or count[1] == "0":
        sys.exit(f"fairseq-eval-lm evaluated nothing:\n{output}")
    run.save(bits=float(loss[1]), valid_tokens=int(count[1].replace(",", "")), evaluated=changed)


def sample(run: Run, prompt: str) -> tuple[str, list[str]]:
    """Lets the model go on from ``prompt``; returns the text and the command."""
    (run.folder / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    words = command("fairseq-interactive", run.data, "--user-dir", USER_DIR, "--path", run.best)
    words += ["--task", "language_modeling", "--bpe", "sentencepiece"]
    words += ["--sentencepiece-model", str(run.data / "sentencepiece.bpe.model")]
    words += ["--beam", "1", "--sampling", "--sampling-topk", "10", "--temperature", "0.8"]
    words += ["--max-len-b", "100", "--seed", "1"]
    output = capture([*words, "--input", str(run.folder / "prompt.txt")])
    found = re.search(r"^D-0\t\S+\t(.*)$", output, re.MULTILINE)
    if not found:
        sys.exit(f"fairseq-interactive wrote nothing:\n{output}")
    return found[1], words


def capture(words: list[str]) -> str:
    """Runs a command quietly; shows what it wrote only if it fails."""
    print(f"\n$ {show(words)}", flush=True)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, **streams, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{done.stdout}\n{Path(words[0]).name} failed with status {done.returncode}")
    return done.stdout


def print_table(run: Run, text: str, interactive: list[str]) -> None:
    """Prints the sample, what was measured, and what to try next."""
    state = run.state
    splits = json.loads((run.data / "prepare.json").read_text())["splits"]
    seen = state.get("seen", state["updates"] * TOKENS_PER_UPDATE)  # which older folders did not note
    valid, share = splits["valid"], 100 * seen / splits["train"]["tokens"]
    bits_per_byte = state["bits"] * valid["tokens"] / valid["bytes"]
    rows = {
        "valid perplexity": f"{2 ** state['bits']:.2f} per token, {bits_per_byte:.3f} bits per byte "
        f"({state['valid_tokens']:,} of {valid['tokens']:,} tokens)",
        "training": f"{state['trained']:.1f} minutes, {state['updates']:,} updates, {seen:,} tokens: "
        f"{share:.3g} % of the text",
        "speed": f"{state['tokens_per_second']:,.0f} tokens/s",
        "peak memory": f"{state['peak_mb']:,.0f} MB of {state['memory']}",
        "checkpoint": run.best,
        "TensorBoard log": run.tensorboard,
    }
    print(f"\n{text}\n")
    for name, value in rows.items():
        print(f"  {name:17} {value}")
    print(f"\n{outlook(seen, splits['train']['tokens'], state['tokens_per_second'])}")
    tensorboard = command("tensorboard", "--logdir", run.tensorboard)
    print("\nnext:\n  the same command with --more 10      ten minutes more")
    print(f"  {show(tensorboard)}\n  {show(interactive)}")
    print(f"  (these commands are in {shlex.quote(str(Path(sys.executable).parent))})")


def outlook(seen: int, text: int, speed: float) -> str:
    """What so much training is worth, and how much more would be good.

    Args:
        seen: Tokens that were trained on.
        text: Tokens of the training text.
        speed: Tokens a second.
    """
    if seen >= JUDGED:
        return f"{seen:,} tokens are enough to judge by: docs/results.md compares models after {JUDGED:,}"
    told = f"{seen:,} tokens show that it works and are too few to judge by"
    if 10 * text < JUDGED:
        return f"{told}; so is a text of {text:,}: give --text some megabytes"
    minutes = math.ceil((JUDGED - seen) / speed / 60)
    return f"{told}; {JUDGED:,}, after which docs/results.md compares models, take --more {minutes}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    own, extra = split_off(arguments)
    parser = command_line(__doc__, "quickstart.sh")
    add = parser.add_argument
    add("--text", type=Path, nargs="+", metavar="PATH", help="files, folders or archives (see prepare_lm.py)")
    add("--minutes", type=float, metavar="M", help=f"train for so long in all ({MINUTES:.1f})")
    add("--more", type=float, metavar="M", help="train for so much longer than up to now")
    add("--prompt", default="The value of", help="what the sample begins with")
    add("--vocab-size", type=int, default=2000, metavar="N", help="(2000)")
    place = ROOT / "quickstart"
    add("--folder", type=Path, default=place, metavar="DIR", help="for the results (quickstart/)")
    options = parser.parse_args(own)
    for name in ("minutes", "more"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} {value} must be positive")
    options.extra = extra
    return options


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    options = parse(arguments)
    with process.stoppable("quickstart.sh"):
        folder = options.folder.resolve() / identify(options)
        with process.locked(folder) as lock:
            run = Run(folder)
            prepare(run, options, lock)
            goal = options.minutes or run.state["goal"] or MINUTES
            if options.more:
                # an interrupted --more has raised the goal already: the same command must not raise it again
                goal = max(run.state["goal"], run.state["trained"] + options.more)
            train_up_to(run, goal, options.extra, lock)
            evaluate(run)
            print_table(run, *sample(run, options.prompt))


if __name__ == "__main__":
    main(sys.argv[1:])
