"""Tiny data and tiny commands for the tests that run fairseq's own tools."""

import os
import random
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
USER_DIR = REPOSITORY / "fairseq_flash"
LETTERS = "abcdefghijklmnop"


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
