"""What the benchmarks share: a clock, peak memory, a summary of times, and a CSV file that is resumed."""

import csv
import ctypes
import gc
import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch

if sys.platform == "linux":
    import resource

ROOT = Path(__file__).resolve().parent.parent
CGROUP = Path("/sys/fs/cgroup")
#: Of the memory that is free, as the rest of the system needs some.
USABLE = 0.9


class Memory:
    """Peak memory of a stretch of work, beyond what was taken before it.

    Args:
        device: Where the work is done, as torch names it.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def available(self) -> int:
        """Bytes that can still be taken, within the limits of a container too."""
        if self.cuda:
            return torch.cuda.mem_get_info()[0]
        free = _number("/proc/meminfo", "MemAvailable:", 1024)
        try:
            left = int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text())
        except (OSError, ValueError):
            return free or 1 << 62
        left += _number(CGROUP / "memory.stat", "inactive_file", 1) or 0
        return min(left, free or left)

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Makes work that takes too much raise, where the kernel would end the process.

        Raises:
            MemoryError: it does. Elsewhere than on CUDA and Linux, there is no such limit.
        """
        before = None if self.cuda or sys.platform != "linux" else resource.getrlimit(resource.RLIMIT_DATA)
        if before:
            taken = _number("/proc/self/status", "VmData:", 1024) or 0
            limit = taken + int(USABLE * self.available())
            resource.setrlimit(resource.RLIMIT_DATA, (min(limit, before[1] % (1 << 63)), before[1]))
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MemoryError from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise MemoryError from error
        finally:
            if before:
                resource.setrlimit(resource.RLIMIT_DATA, before)

    def peak_of(self, work: Callable[[], Any]) -> Optional[int]:
        """Does ``work``; returns bytes, or None where the system does not tell."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return torch.cuda.max_memory_allocated() - before
        try:
            # Freed memory goes back to the system, and the highest mark down to what is taken now.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            work()
            return None
        before = _number("/proc/self/status", "VmRSS:", 1024)
        work()
        after = _number("/proc/self/status", "VmHWM:", 1024)
        return None if before is None or after is None else max(0, after - before)


def _number(path: Path | str, name: str, unit: int) -> Optional[int]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((unit * int(line.split()[1]) for line in lines if line.split()[0] == name), None)


class Table:
    """A CSV file: cells that are there are not measured again.

    Args:
        path: Of the file, which need not exist.
        columns: Of the file.
        key: The columns that tell a cell, beside ``name``.
        shown: The columns that are printed when a row is added; empty for no print.
        common: What all rows say.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(
        self, path: Path, columns: Iterable[str], key: Iterable[str], shown: Iterable[str], common: dict
    ) -> None:
        self.path, self.common = path, common
        self.columns, self.key, self.shown = tuple(columns), tuple(key), tuple(shown)
        rows: list[dict] = []
        if path.exists():
            drop_torn_line(path)
            with path.open(newline="") as stream:
                reader = csv.DictReader(stream)
                found = tuple(reader.fieldnames or ())
                rows = list(reader)
            if found and found != self.columns:
                raise ValueError(
                    f"--output {path} has the columns {','.join(found)}; "
                    f"allowed: {','.join(self.columns)}, or a new file"
                )
        self._known = {self._cell(row) for row in rows}

    def _cell(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("name", *self.key))

    def has(self, names: Iterable[str], **cell: Any) -> bool:
        """Whether all of ``names`` have been measured there."""
        return all(self._cell({**self.common, **cell, "name": name}) in self._known for name in names)

    def add(self, rows: list[dict]) -> None:
        """Appends the rows of one cell, so that a kill leaves whole cells."""
        whole = [{**dict.fromkeys(self.columns, ""), **self.common, **row} for row in rows]
        new = not self.path.exists() or not self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if new:
                writer.writeheader()
            writer.writerows(whole)
        self._known |= {self._cell(row) for row in whole}
        for row in rows if self.shown else ():
            print("  ".join(f"{name}={row[name]}" for name in row if name in self.shown), flush=True)


def drop_torn_line(path: Path) -> None:
    """Cuts a last line without an end, which a kill while writing leaves."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def summary(times: list[float]) -> dict:
    """Median and spread (half the distance of the quartiles) of ``times`` in ms, as columns."""
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    return {
        "median_ms": f"{median:.4g}",
        "spread_ms": f"{(high - low) / 2:.2g}",
        "repeats": len(times),
        "status": "ok",
    }


def clock(device: str) -> float:
    """Milliseconds, when all work is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def device_name(device: str) -> str:
    """As rows name it: the model of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def precision(dtype: str, device: str) -> str:
    """As rows name it: ``dtype``, or "tf32" where a GPU may round the factors of float32 products."""
    rounds = device.startswith("cuda") and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounds and dtype == "float32" else dtype


def data_name(folder: Path) -> str:
    """A prepared folder as rows name it: its name, and a digest of its dictionaries and indices.

    So that results of another text, in a folder of the same name, are never taken for its own.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".idx" or (path.name.startswith("dict.") and path.suffix == ".txt"):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return f"{folder.name}-{digest.hexdigest()[:8]}"


def commit() -> str:
    """Of this repository, with a plus if files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
