"""Processes that never outlive their parent, and folders that one run at a time works in."""

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

__all__ = ["Ended", "locked", "run", "stoppable", "write_whole"]

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies
#: Seconds that a run waits for the folder of one that was killed a moment ago.
PATIENCE = 5.0


class Ended(NamedTuple):
    """What a process left: its status, negative for a signal, and the bytes it had at its peak.

    On Linux, the peak is at least what this process had when it started the other.
    """

    status: int
    peak_bytes: int


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps a second run out of the folder, also while a child of a killed run is still at work.

    Args:
        folder: Made where it is missing.

    Yields:
        A file descriptor; a child that keeps it open keeps the folder locked.

    Raises:
        ValueError: another run is at work in the folder.
    """
    end = time.monotonic() + PATIENCE
    while (lock := _lock(folder)) is None:
        if time.monotonic() > end:
            raise ValueError(f"another run is at work in {folder}")
        time.sleep(0.1)
    try:
        yield lock
    finally:
        os.close(lock)


def _lock(folder: Path) -> Optional[int]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one that held it may have taken the folder away.
        if folder.exists() and os.path.samestat(folder.stat(), os.fstat(lock)):
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def run(
    words: Iterable[Any],
    log: Optional[Path] = None,
    *,
    follow: Callable[[], object] = lambda: None,
    keep_open: Iterable[int] = (),
    environment: Optional[dict[str, str]] = None,
    **options: Any,
) -> Ended:
    """Runs a command to its end; it dies with this process (on Linux), or with the thread that called.

    Args:
        words: The command.
        log: File that its output is added to; None for this terminal, whose Ctrl-C it then gets as well.
        follow: Called several times a second meanwhile; what it raises ends the command.
        keep_open: File descriptors that the command keeps open, such as that of :func:`locked`.
        environment: Of the command; None for this one's.
        options: Of ``subprocess.Popen``.

    Raises:
        BaseException: whatever ``follow`` raised, or KeyboardInterrupt; the command has been ended.
    """
    with contextlib.ExitStack() as files:
        if log is not None:
            output = files.enter_context(log.open("ab"))
            options = {"stdout": output, "stderr": output, "start_new_session": True, **options}
        child = subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.DEVNULL,
            pass_fds=keep_open,
            env=environment,
            preexec_fn=_die_with_parent,
            **options,
        )
        try:
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    child.returncode = os.waitstatus_to_exitcode(status)
                    return Ended(child.returncode, _bytes_of(usage))
                follow()
                time.sleep(0.2)
        except BaseException:
            _end(child, alone=log is not None)
            raise


@contextlib.contextmanager
def stoppable(program: str) -> Iterator[None]:
    """Ends a command in one clear sentence: for a mistake (2), and for Ctrl-C, SIGTERM or SIGHUP (130)."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        yield
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one ended", file=sys.stderr)
        sys.exit(130)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file; a kill leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(child: subprocess.Popen, alone: bool) -> None:
    if alone:
        os.killpg(child.pid, signal.SIGKILL)
    else:
        # It shares the terminal and has got the signal itself: let it tidy up.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=PATIENCE)
        child.kill()
    child.wait()


def _bytes_of(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
