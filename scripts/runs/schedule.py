"""Plans of trainings by fairseq-train: each in a process of its own, several at a time, each done once."""

import contextlib
import hashlib
import json
import math
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Optional

import torch
from tqdm import tqdm

from runs.checkpoints import mend_checkpoints
from runs.process import die_with_parent, locked
from runs.provenance import ROOT
from runs.table import Table

__all__ = [
    "CURVE_COLUMNS",
    "MEASURED",
    "Finished",
    "TrainingRun",
    "carry_out",
    "fairseq_command",
    "progress_bar",
    "readable",
]

#: Columns that :func:`carry_out` fills; losses in nats per token, memory in bytes.
MEASURED = (
    *("parameters", "updates", "tokens", "seconds", "tokens_per_second", "peak_memory"),
    *("train_loss", "valid_loss", "status"),
)
#: Columns of a loss curve, beside those that tell the run.
CURVE_COLUMNS = ("updates", "tokens", "seconds", "split", "loss")


class Interrupted(KeyboardInterrupt):
    """A run was ended with the whole plan."""


@dataclass(frozen=True)
class Finished:
    """A training that has ended, for what is measured of it afterwards.

    Attributes:
        checkpoint: The last one.
        valid: The numbers of the last validation, as fairseq logged them, without ``valid_``.
        call: Runs a command to its end, or until the plan is interrupted, and returns what it wrote.
    """

    checkpoint: Path
    valid: dict[str, Any]
    call: Callable[[list[str]], str]


@dataclass(frozen=True)
class TrainingRun:
    """One training.

    Attributes:
        words: Arguments of fairseq-train but for ``--max-update``, ``--save-dir`` and the log's.
        updates: ``--max-update``.
        row: The columns that tell the run in the CSV, ``name`` among them.
        weight: Of the run in the plan's progress, such as its tokens.
        measure: Called at the end for more columns.
    """

    words: tuple[str, ...]
    updates: int
    row: dict[str, Any]
    weight: float = 1.0
    measure: Optional[Callable[[Finished], dict[str, Any]]] = None

    def command(self, save_dir: Any, log_interval: int = 10) -> list[str]:
        """The command line of fairseq-train, with checkpoints in ``save_dir``."""
        words = [*self.words, "--max-update", self.updates, "--save-dir", save_dir, "--log-format", "json"]
        return fairseq_command("train", *words, "--log-interval", min(log_interval, self.updates))

    @property
    def folder_name(self) -> str:
        """Readable, and another one for other arguments."""
        digest = hashlib.sha256(json.dumps([self.words, self.updates]).encode()).hexdigest()[:10]
        readable = "-".join(str(value) for value in self.row.values())
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', readable)[:80]}-{digest}"


@dataclass
class Log:
    """What fairseq-train has logged so far; a resumed training repeats updates, of which the last count."""

    path: Path
    intervals: list[dict] = field(default_factory=list)
    valid: list[dict] = field(default_factory=list)
    parameters: Optional[int] = None
    total_gb: Optional[float] = None
    updates: int = 0
    _offset: int = 0

    def read(self) -> None:
        """Takes in the whole lines that are new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        for line in text.decode(errors="replace").splitlines():
            self._take(line)

    def _take(self, line: str) -> None:
        if found := re.search(r"num\. shared model params: ([\d,]+)", line):
            self.parameters = int(found[1].replace(",", ""))
        elif found := re.search(r"total memory = ([\d.]+)", line):
            self.total_gb = float(found[1])
        elif found := re.search(r"\| (train_inner|train|valid) \| (\{.*\})", line):
            numbers = json.loads(found[2]).items()
            point = {name.removeprefix(f"{found[1]}_"): _number(value) for name, value in numbers}
            self.updates = int(point["num_updates"])
            if found[1] != "train":
                known = self.intervals if found[1] == "train_inner" else self.valid
                known[:] = [old for old in known if old["num_updates"] < self.updates]
                known.append(point)

    def tokens_per_update(self) -> float:
        """The mean of the intervals."""
        return mean(interval["wpb"] for interval in self.intervals)

    def speed(self) -> float:
        """Tokens a second: the median of the intervals, without the first, in which everything is set up."""
        return median(interval["wps"] for interval in self.intervals[1:] or self.intervals)

    def curve(self) -> list[dict]:
        """Loss by update, tokens and seconds; seconds are tokens at the median speed."""
        points = [("train", point) for point in self.intervals] + [("valid", point) for point in self.valid]
        return [
            {**self._place(point["num_updates"]), "split": split, "loss": loss(point)}
            for split, point in points
        ]

    def _place(self, updates: float) -> dict[str, Any]:
        tokens = updates * self.tokens_per_update()
        return {"updates": int(updates), "tokens": round(tokens), "seconds": f"{tokens / self.speed():.4g}"}

    def measured(self, peak_bytes: int) -> dict[str, Any]:
        """The columns of ``MEASURED``."""
        free = [interval["gb_free"] for interval in self.intervals if "gb_free" in interval]
        if self.total_gb and free:
            peak_bytes = int((self.total_gb - min(free)) * 2**30)
        last = self.intervals[-max(1, len(self.intervals) // 10) :]
        return dict(
            parameters=self.parameters,
            **self._place(self.updates),
            tokens_per_second=f"{self.speed():.4g}",
            peak_memory=peak_bytes,
            train_loss=f"{mean(map(loss, last)):.5g}",
            valid_loss=f"{loss(self.valid[-1]):.5g}" if self.valid else "",
            status="ok",
        )


def loss(point: dict) -> float:
    """Nats per token of a logged point; fairseq logs bits, and the loss without label smoothing apart."""
    return round(point.get("nll_loss", point["loss"]) * math.log(2), 5)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def fairseq_command(tool: str, *words: Any) -> list[str]:
    """The command line of one of fairseq's tools in this environment.

    Args:
        tool: Its module, such as ``"train"`` or ``"eval_lm"``.
        words: Its arguments.
    """
    return [sys.executable, "-m", f"fairseq_cli.{tool}", *map(str, words)]


def readable(words: Iterable[Any], names: dict[Path, Any]) -> str:
    """A command for people to read, without paths of this machine.

    Args:
        words: The program and its arguments; paths in the repository become relative to it.
        names: What to write in place of other paths.

    Returns:
        One line, quoted for a shell.
    """
    line = shlex.join(map(str, words))
    for path, name in names.items():
        line = line.replace(str(path), str(name))
    return line.replace(f"{ROOT}/", "")


def environment(jobs: int, slot: int) -> dict[str, str]:
    """Of a process that shares the cores with ``jobs - 1`` others and has one of the GPUs, if any."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(paths)}
    # A log line in the middle of a buffered line of output would spoil both.
    found["PYTHONUNBUFFERED"] = "1"
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        found["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus] if len(visible) == gpus else str(slot % gpus)
    return found


def progress_bar(total: float, unit: str = "token") -> tqdm:
    """A line with the time left, by the mean speed so far; only on a terminal.

    Args:
        total: Sum of the runs' weights.
        unit: Of the weights.
    """
    return tqdm(total=total, unit=unit, unit_scale=True, smoothing=0, mininterval=0.5, disable=None)


def carry_out(
    runs: Iterable[TrainingRun],
    table: Table,
    folder: Path,
    *,
    curves: Optional[Table] = None,
    jobs: int = 1,
    log_interval: int = 10,
    keep: bool = False,
    progress: Optional[tqdm] = None,
) -> None:
    """Carries out the runs that the table does not have yet.

    A run that fails is a row with its error. Killed at any point, the next call goes on: finished runs are
    rows, an unfinished one resumes from its last checkpoint, where its arguments make it save any.

    Args:
        runs: The plan, in order.
        table: Where rows go: the runs' own columns, ``MEASURED``, and what ``measure`` adds.
        folder: For checkpoints and logs.
        curves: Where loss curves go, as rows of the run's own columns and ``CURVE_COLUMNS``.
        jobs: Runs at a time; with more than one, their speeds cannot be compared.
        log_interval: Updates between points of the curves.
        keep: Whether checkpoints stay when their run is finished.
        progress: From :func:`progress_bar`, where these runs are a part of a longer plan.

    Raises:
        KeyboardInterrupt: interrupted; all processes have been ended.
    """
    runs = list(runs)
    waiting = [run for run in runs if not table.has([run.row["name"]], **run.row)]
    folder.mkdir(parents=True, exist_ok=True)
    writing, stop = threading.Lock(), threading.Event()
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    done = sum(run.weight for run in runs) - sum(run.weight for run in waiting)
    bar = progress_bar(sum(run.weight for run in runs)) if progress is None else progress
    if not bar.disable:
        # What was done before tells nothing about the time that is left.
        bar.n, bar.initial = bar.n + done, bar.initial + done
    bar.set_description(f"{len(runs) - len(waiting)} of {len(runs)} runs")

    def one(run: TrainingRun) -> None:
        shown = 0.0

        def show(share: float) -> None:
            nonlocal shown
            with writing:
                bar.update(run.weight * (share - shown))
            shown = share

        place = folder / run.folder_name
        slot = slots.get()
        try:
            row, curve = _finish_run(run, place, show, stop, environment(jobs, slot), log_interval)
        finally:
            slots.put(slot)
        with writing:
            if curves is not None:
                curves.add([{**run.row, **point} for point in curve])
            table.add([{**run.row, **row}])
            bar.set_description(f"{bar.desc.split()[0]} of {len(runs)} runs, last {run.row['name']}")
        if not keep and row["status"] == "ok":
            shutil.rmtree(place, ignore_errors=True)
        show(1.0)

    with locked(folder), ThreadPoolExecutor(jobs) as pool, contextlib.ExitStack() as ends:
        if progress is None:
            ends.enter_context(bar)
        futures = [pool.submit(one, run) for run in waiting]
        try:
            for count, future in enumerate(as_completed(futures), start=len(runs) - len(waiting) + 1):
                future.result()
                with writing:
                    bar.set_description(f"{count} of {len(runs)} runs")
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _finish_run(
    run: TrainingRun,
    folder: Path,
    show: Callable[[float], None],
    stop: threading.Event,
    process_environment: dict[str, str],
    log_interval: int,
) -> tuple[dict[str, Any], list[dict]]:
    """The measured columns of a run and its curve; an error is a row too."""
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "train.log")
    try:
        peak = _train(run, folder, log, show, stop, process_environment, log_interval)
        row = log.measured(peak)
        if run.measure is not None:
            valid = log.valid[-1] if log.valid else {}
            call = partial(_call, folder / "measure.log", stop, process_environment)
            row.update(run.measure(Finished(folder / "checkpoint_last.pt", valid, call)))
        return row, log.curve()
    except Interrupted:
        raise
    except Exception as error:
        return {"parameters": log.parameters or "", "updates": log.updates, "status": f"error: {error}"}, []


def _train(run, folder, log, show, stop, process_environment, log_interval) -> int:
    """Runs fairseq-train to its end; returns its peak memory in bytes."""
    mend_checkpoints(folder)

    def follow() -> None:
        log.read()
        show(min(1.0, log.updates / run.updates))

    words = run.command(folder, log_interval)
    status, usage = _run_process(words, log.path, stop, process_environment, follow)
    log.read()
    if status or not log.intervals:
        raise RuntimeError(f"status {status}: {_last_line(log.path)}; {log.path}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _call(log: Path, stop: threading.Event, process_environment: dict[str, str], words: list[str]) -> str:
    """Runs a command to its end; returns what it wrote."""
    log.unlink(missing_ok=True)
    status, _ = _run_process(words, log, stop, process_environment, lambda: None)
    if status:
        raise RuntimeError(f"status {status}: {_last_line(log)}; {log}")
    return log.read_text(errors="replace")


def _run_process(words, log, stop, process_environment, follow) -> tuple[int, resource.struct_rusage]:
    """Runs a command whose output is added to ``log``; returns its status and what it used."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            words,
            cwd=ROOT,
            env=process_environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    child.returncode = os.waitstatus_to_exitcode(status)
                    return child.returncode, usage
                if stop.is_set():
                    raise Interrupted
                follow()
                time.sleep(0.2)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "nothing was logged")
