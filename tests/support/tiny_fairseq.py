"""Tiny data and tiny commands for the tests that run fairseq's own tools."""

import os
import random
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
USER_DIR = REPOSITORY / "fairseq_flash"
LETTERS = "abcdefghijklmnop"
DISTRIBUTED = REPOSITORY / "scripts" / "train_distributed.sh"
ARCH_ARGS = (
    *("--arch", "flash_lm_tiny", "--embed-dim", "16", "--layers", "2"),
    *("--attention-dim", "8", "--chunk-size", "4"),
)
TINY = (
    *("--task", "language_modeling", "--tokens-per-sample", "16", "--batch-size", "4", "--dropout", "0"),
    *("--optimizer", "adam", "--lr", "1e-3", "--no-epoch-checkpoints", "--log-format", "simple", "--cpu"),
    *("--num-workers", "0"),
)


def write_data_bin(
    folder: Path, sentences: dict[str, list[str]] | None = None, dictionary: Path | None = None
) -> Path:
    """Writes random text, or ``sentences`` by split, as a language-modelling data-bin below ``folder``."""
    from fairseq import options
    from fairseq_cli import preprocess

    folder.mkdir(parents=True, exist_ok=True)
    sentences = sentences or {"train": random_sentences(200), "valid": random_sentences(20, seed=1)}
    arguments = ["--only-source", "--workers", "1", "--destdir", str(folder / "bin")]
    for split, lines in sentences.items():
        (folder / split).write_text("\n".join(lines) + "\n")
        arguments += [f"--{split}pref", str(folder / split)]
    if dictionary:
        arguments += ["--srcdict", str(dictionary)]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    return folder / "bin"


def random_sentences(count: int, seed: int = 0) -> list[str]:
    """Lines of 5 to 20 random letters."""
    source = random.Random(seed)
    return [" ".join(source.choices(LETTERS, k=source.randint(5, 20))) for _ in range(count)]


def run(command: list, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command of this environment, such as ``fairseq-train``; output and errors are one text."""
    program = Path(sys.executable).parent / command[0]
    words = [str(program) if program.exists() else str(command[0]), *map(str, command[1:])]
    return subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def arguments(data_bin: Path, folder: Path) -> list:
    """Those of fairseq-train for a tiny flash_lm."""
    return [data_bin, "--user-dir", USER_DIR, "--save-dir", folder, *ARCH_ARGS, *TINY]


def train_in_two(data_bin: Path, folder: Path, *extra, **environment: str) -> subprocess.CompletedProcess:
    """Trains in two processes, by scripts/train_distributed.sh."""
    environment = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", **environment}
    return run([DISTRIBUTED, "--nproc", "2", *arguments(data_bin, folder), *extra], **environment)
