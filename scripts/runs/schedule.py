"""Trainings by fairseq-train: each in a process of its own, several at a time, each done once."""

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from runs import process
from runs.log import Log
from runs.progress import Progress
from runs.provenance import ROOT
from runs.slots import Slot, do_at_once
from runs.table import Table, read

__all__ = [
    *("Finished", "TrainingRun", "carry_out", "fairseq_command", "readable"),
]


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
        record: The columns that tell the run in the CSV, ``name`` among them.
        weight: Of the run in the plan's progress, such as its tokens.
        measure: Called at the end for more columns.
    """

    words: tuple[str, ...]
    updates: int
    record: dict[str, Any]
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
        told = "-".join(str(value) for value in self.record.values())
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', told)[:80]}-{digest}"


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


def carry_out(
    runs: Iterable[TrainingRun],
    table: Table,
    folder: Path,
    *,
    curves: Optional[Table] = None,
    jobs: int = 1,
    log_interval: int = 10,
    keep: bool = False,
    progress: Optional[Progress] = None,
) -> None:
    """Carries out the runs that the table does not have yet.

    A run that fails is a record with its error; one that a signal has ended is tried again. Killed at any
    point, the next call goes on: finished runs are records, an unfinished one resumes from its last
    checkpoint, where its arguments make it save any, and one whose training has ended is only measured.

    Args:
        runs: The plan, in order.
        table: Where records go: the runs' own columns, ``MEASURED``, and what ``measure`` adds.
        folder: For checkpoints and logs.
        curves: Where loss curves go, as records of the run's own columns and ``CURVE_COLUMNS``.
        jobs: Runs at a time; with more than one, their speeds cannot be compared.
        log_interval: Updates between points of the curves.
        keep: Whether checkpoints stay when their run is finished.
        progress: Where these runs are a part of a longer plan.

    Raises:
        ValueError: another plan is at work in the folder, or the table has runs of other options.
        KeyboardInterrupt: interrupted; all processes have been ended.
    """
    runs = list(runs)
    with contextlib.ExitStack() as ends:
        ends.enter_context(process.locked(folder))
        table.forget_killed()
        waiting = [run for run in runs if not table.has([run.record["name"]], **run.record)]
        for run in runs:
            _check_same_options(run.record, table)
        if len(waiting) == len(runs):
            _tell_other_data(runs, table)
        if progress is None:
            progress = ends.enter_context(Progress(len(runs), sum(run.weight for run in runs)))
        if len(waiting) < len(runs):
            print(f"{len(runs) - len(waiting)} of {len(runs)} {progress.noun} are done already", flush=True)
        progress.skip(len(runs) - len(waiting), sum(r.weight for r in runs) - sum(r.weight for r in waiting))
        tables = (table, curves) if curves is not None else (table,)
        team = _Team(tables, folder, log_interval, keep, progress)
        do_at_once(jobs, waiting, team.carry_out)


def _tell_other_data(runs: list[TrainingRun], table: Table) -> None:
    """Says that records of a stage are of other data, which a file more or less in their folder makes."""
    stages, records = {run.record.get("stage") for run in runs}, read(table.path)
    known = {record.get("data") for record in records if record.get("stage") in stages} - {None, ""}
    mine = {{**table.common, **run.record}.get("data") for run in runs}
    if known and None not in mine and not mine & {record.get("data") for record in records}:
        told = f"{table.path} has records of {', '.join(sorted(known))}, none of {', '.join(sorted(mine))}"
        print(f"{told}: these runs begin anew", flush=True)


def _check_same_options(record: dict[str, Any], table: Table) -> None:
    """Refuses a run that the table has of a command with other options than the columns tell."""
    known = table.find(**record) if "command" in record else None
    if known is None:
        return
    old, new = (_options_of(each["command"]) for each in (known, record))
    for option in {**old, **new}:
        if old.get(option) != new.get(option):
            had = f"of {option} {old[option]}".rstrip() if option in old else f"without {option}"
            now = f", not {new[option]}" if option in old and new.get(option) else ""
            raise ValueError(
                f"--output {table.path} has {record['name']} {had}{now}; allowed: the same options, or "
                "another file"
            )


def _options_of(command: str) -> dict[str, str]:
    """Of a command line, but for where files are and what computes; a checkpoint is told by its name."""
    words = shlex.split(command)
    for at in (at for at, word in enumerate(words, start=1) if word == "--restore-file"):
        words[at] = Path(words[at]).name
    words = [word for word in words if "/" not in word and word != "--cpu"]
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {word: "" if value.startswith("--") else value for word, value in pairs if word.startswith("--")}


class _Team:
    """Does several runs at a time; records and progress are written by one at a time."""

    def __init__(
        self,
        tables: tuple[Table, ...],
        folder: Path,
        log_interval: int,
        keep: bool,
        progress: Progress,
    ) -> None:
        self.tables, self.folder = tables, folder
        self.log_interval, self.keep, self.progress = log_interval, keep, progress
        self.writing = threading.Lock()

    def carry_out(self, run: TrainingRun, slot: Slot) -> None:
        """One run, from its folder to its record."""
        shown = 0.0

        def show(share: float, worked: bool = True) -> None:
            """Takes in that so much of the run is done, by this call or without work of it."""
            nonlocal shown
            part, shown = run.weight * (share - shown), share
            with self.writing:
                if worked:
                    self.progress.work(part)
                else:
                    self.progress.skip(0, part)

        place = self.folder / run.folder_name
        record, curve = _Work(run, place, show, slot, self.log_interval).finish()
        show(1.0, worked=record["status"] == "ok")
        with self.writing:
            for curves in self.tables[1:]:
                curves.add([{**run.record, **point} for point in curve])
            self.tables[0].add([{**run.record, **record}])
            self.progress.end()
        if not self.keep and record["status"] == "ok":
            shutil.rmtree(place, ignore_errors=True)


@dataclass
class _Work:
    """A run in its folder."""

    run: TrainingRun
    folder: Path
    show: Callable[..., None]
    slot: Slot
    log_interval: int

    def finish(self) -> tuple[dict[str, Any], list[dict]]:
        """The measured columns of the run and its curve; an error is a record too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = Log(self.folder / "train.log")
        try:
            record = log.measured(self._train(log))
            if self.run.measure is not None:
                valid = log.valid[-1] if log.valid else {}
                record.update(
                    self.run.measure(Finished(self.folder / "checkpoint_last.pt", valid, self._call))
                )
            return record, log.curve()
        except Interrupted:
            raise
        except Exception as error:
            record = {"parameters": log.parameters or "", "updates": log.updates}
            return {**record, "status": f"error: {error}"}, []

    def _train(self, log: Log) -> int:
        """Runs fairseq-train to its end, unless that has been done; returns its peak memory in bytes."""
        note = self.folder / "trained.json"
        log.read()
        self.show(self._share(log), worked=False)
        if note.exists():
            return json.loads(note.read_text())["peak_bytes"]

        def follow() -> None:
            log.read()
            self.show(self._share(log))

        ended = self._process(self.run.command(self.folder, self.log_interval), log.path, follow)
        log.read()
        if ended.status or not log.intervals:
            raise RuntimeError(f"status {ended.status}: {log.tail()}; {log.path}")
        # fairseq asks for --max-update after an update: a training that is done must not be started again
        process.write_whole(note, json.dumps({"peak_bytes": ended.peak_bytes}))
        return ended.peak_bytes

    def _share(self, log: Log) -> float:
        return min(1.0, log.updates / self.run.updates)

    def _call(self, words: list[str]) -> str:
        """Runs a command to its end; returns what it wrote."""
        log = self.folder / "measure.log"
        log.unlink(missing_ok=True)
        ended = self._process(words, log, lambda: None)
        if ended.status:
            raise RuntimeError(f"status {ended.status}: {Log(log).tail()}; {log}")
        return log.read_text(errors="replace")

    def _process(self, words: list[str], log: Path, follow: Callable[[], None]) -> process.Ended:
        def watch() -> None:
            if self.slot.stop.is_set():
                raise Interrupted
            follow()

        return process.run(words, log, follow=watch, environment=self.slot.environment, cwd=ROOT)
