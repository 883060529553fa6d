"""Runs fairseq-train as a process that never outlives its parent, and measures it."""

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import IO

__all__ = ["die_with_parent", "locked", "train"]

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps a second run out of the folder, also while a child of a killed run is still at work.

    Yields:
        A file descriptor; a child that keeps it open keeps the folder locked.

    Raises:
        SystemExit: another run is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        sys.exit(f"another run is at work in {folder}")
    finally:
        os.close(lock)


def train(words: list[str], log: Path, lock: int) -> dict[str, float | str]:
    """Runs the command to its end; fairseq's progress bar shows on a terminal, elsewhere a line now and then.

    Args:
        words: The command.
        log: File that the output is added to.
        lock: File descriptor that the process keeps open.

    Returns:
        ``updates``, ``tokens_per_second``, and ``peak_mb`` of ``memory`` ("RAM" or "GPU memory").

    Raises:
        SystemExit: the command failed.
        KeyboardInterrupt: interrupted; the process has been ended.
    """
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output, log.open(encoding="utf-8", errors="replace") as written:
        written.seek(start)
        # stderr is where fairseq draws its bar; without a terminal it draws none and the log holds all
        errors = None if sys.stderr.isatty() else output
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            pass_fds=[lock],
            start_new_session=True,  # so that Ctrl-C reaches the parent only, which ends the child silently
            preexec_fn=die_with_parent,
        )
        peak_kb = _wait(child, written if errors else None)
        written.seek(start)
        text = written.read()
    if child.returncode:
        sys.exit("".join(text.splitlines(keepends=True)[-30:]) + f"\nthe training failed; see {log}")
    return _measure(text, peak_kb)


def die_with_parent() -> None:
    """Called in a new process: it is killed when the thread that started it ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(child: subprocess.Popen, log: IO[str] | None) -> float:
    """Waits for the child, echoing its progress from ``log``; returns its peak memory in kB."""
    try:
        while True:
            if log:
                _echo(log)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
            time.sleep(0.2)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def _echo(log: IO[str]) -> None:
    for line in log:
        found = re.search(r"\| (train_inner|valid) \| (.*)", line)
        if found:
            numbers = re.findall(r"\b(loss|ppl|wps|num_updates)[= ]([\d.]+)", found[2])
            print(f"  {found[1]:12}", "  ".join(f"{name} {value}" for name, value in numbers), flush=True)


def _measure(text: str, peak_kb: float) -> dict[str, float | str]:
    epochs = re.findall(r"\| train \|.*\| wps ([\d.]+).*\| num_updates (\d+)", text)
    if not epochs:
        sys.exit("the training made no update: give more text or more --minutes")
    total = re.search(r"total memory = ([\d.]+) GB", text)
    free = [float(value) for value in re.findall(r"\| gb_free ([\d.]+)", text)]
    on_gpu = bool(total and free)
    return {
        "updates": int(epochs[-1][1]),
        "tokens_per_second": median(float(speed) for speed, _ in epochs),
        "peak_mb": (float(total[1]) - min(free)) * 1024 if on_gpu else peak_kb / 1024,
        "memory": "GPU memory" if on_gpu else "RAM",
    }
