"""What the benchmarks share: a clock, peak memory, and a summary of times."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch

if sys.platform == "linux":
    import resource

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

    def attempt(self, work: Callable[[], Any]) -> str:
        """Does ``work`` within the limits; returns the status of its record."""
        try:
            with self.limited():
                work()
        except MemoryError:
            return "out of memory"
        except FloatingPointError as error:
            return str(error)
        return "ok"

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


def add_ratios(records: list[dict], baseline: str) -> None:
    """Each median over the baseline's, the fastest where it has several, if both were measured."""
    timed = [record for record in records if "median_ms" in record]
    bases = [float(record["median_ms"]) for record in timed if record["name"] == baseline]
    for record in timed if bases else ():
        record["ratio"] = f"{float(record['median_ms']) / min(bases):.3f}"


def clock(device: str) -> float:
    """Milliseconds, when all work is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()
