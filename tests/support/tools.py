"""fairseq's own tools on tiny real text: in this process, where it is quick, and as a user starts them."""

import contextlib
import csv
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from unittest import mock

import torch
from fairseq import checkpoint_utils

REPOSITORY = Path(__file__).resolve().parents[2]
USER_DIR = REPOSITORY / "fairseq_flash"
CONFIGS = USER_DIR / "configs"
SMALL = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16")
TINY = ("--arch", "flash_lm_tiny", *SMALL)
CHUNKS = ("--chunk-size", "8")
QUICK = (
    *("--batch-size", "4", "--cpu", "--lr", "0.003", "--dropout", "0", "--clip-norm", "1.0"),
    *("--num-workers", "0", "--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "1"),
)
RECIPE = ("--task", "language_modeling", "--tokens-per-sample", "32", *QUICK)
ADAM = ("--optimizer", "adam")


def real_lines() -> list[str]:
    """Lines of the documentation that comes with Python, as lower-case words and signs."""
    lines = (re.findall(r"\w+|[^\w\s]", line.lower()) for line in "\n".join(topics.values()).splitlines())
    return [" ".join(words) for words in lines if 4 <= len(words) <= 24]


def load_script(name: str) -> ModuleType:
    """``scripts/<name>.py`` as a module."""
    path = REPOSITORY / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_texts(folder: Path, **splits: list[str]) -> None:
    """Writes one text file a split; by default 400, 24 and 12 lines of real text."""
    lines = real_lines()
    splits = splits or {"train": lines[:400], "valid": lines[400:424], "test": lines[424:436]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        (folder / name).write_text("".join(line + "\n" for line in split))


def preprocess_arguments(folder: Path, splits: list[str]) -> list[str]:
    """The arguments that turn ``folder / split`` into ``folder / "bin"``, with about 200 words."""
    texts = [word for split in splits for word in (f"--{split}pref", str(folder / split))]
    limits = ["--nwordssrc", "200", "--workers", "1"]
    return ["--only-source", *texts, "--destdir", str(folder / "bin"), *limits]


def call(tool: str, *arguments) -> str:
    """Runs ``fairseq-<tool>`` in this process: what it printed and logged; raises what it raised."""
    module = importlib.import_module(f"fairseq_cli.{tool.replace('-', '_')}")
    text, root = io.StringIO(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = [*handlers, logging.StreamHandler(text)]
    root.setLevel(logging.INFO)
    # fairseq keeps the best score of a process here, and would hold back the next run's best checkpoint.
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    argv = mock.patch.object(sys, "argv", [f"fairseq-{tool}", *map(str, arguments)])
    try:
        with argv, contextlib.redirect_stdout(text):
            module.cli_main()
    finally:
        # fairseq-validate takes away the handlers of everyone.
        root.handlers = handlers
        root.setLevel(level)
    return text.getvalue()


def run(tool: str, *arguments, cwd: Path = REPOSITORY, stdin: str = "", **environment: str):
    """Runs a program of this environment as a user does; output and errors are one text."""
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "SYSTEMROOT")
    clean = {name: os.environ[name] for name in kept if name in os.environ}
    program = sys.executable if tool == "python" else str(Path(sys.executable).parent / tool)
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def binarize(folder: Path, part: str, splits: dict[str, list[str]], *options) -> None:
    """Writes lines by split as one of the parts of sentence_prediction's data: ``folder / "bin" / part``."""
    write_texts(folder / part, **splits)
    texts = [word for split in splits for word in (f"--{split}pref", folder / part / split)]
    where = ("--destdir", folder / "bin" / part, "--workers", "1", "--only-source")
    call("preprocess", *texts, *where, *options)


def train(data_bin: Path, save_dir: Path, *arguments, updates: int = 3, recipe=(*RECIPE, *ADAM)) -> str:
    """Trains flash_lm in this process for ``updates`` in all; resumes if ``save_dir`` has a checkpoint."""
    model = () if "--arch" in arguments else (*TINY, *CHUNKS)
    base = (data_bin, "--user-dir", USER_DIR, "--save-dir", save_dir, *recipe, *model)
    return call("train", *base, "--max-update", updates, *arguments)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The records of a CSV file, as any other program reads them."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def perturbed(path: Path, seed: int) -> Path:
    """Writes the checkpoint with noise on its weights, so that its greedy text has many words."""
    content = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    noise = torch.Generator().manual_seed(seed)
    for name, weight in content["model"].items():
        # What a model remembers of its training is no weight.
        if weight.is_floating_point() and not name.endswith(("_extra_state", "n_ref")):
            scale = 20 if "output_projection" in name else 1
            weight.add_(0.1 * torch.randn(weight.shape, generator=noise)).mul_(scale)
    torch.save(content, path.with_name(f"perturbed_{seed}.pt"))
    return path.with_name(f"perturbed_{seed}.pt")


def losses(output: str) -> list[tuple[str, str]]:
    """What a training run logged at each update: its number and its loss."""
    rows = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '"num_updates"' in line]
    return [(row["num_updates"], row["loss"]) for row in rows if "loss" in row]


def perplexity(output: str) -> float:
    """What fairseq-eval-lm found."""
    return float(re.search(r"Perplexity: ([\d.]+)", output)[1])


def rows(output: str, kind: str) -> dict[str, list[list[str]]]:
    """The rows of fairseq-generate that begin with ``kind``, such as "H", by number of the sentence."""
    found = {}
    for number, row in re.findall(rf"^{kind}-(\d+)\t(.*)$", output, flags=re.MULTILINE):
        found.setdefault(number, []).append(row.split("\t"))
    return found
