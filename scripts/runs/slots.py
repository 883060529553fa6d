"""Work of processes, several at a time: each has its share of the cores, and one of the GPUs."""

import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch

from runs.provenance import ROOT

__all__ = ["Slot", "do_at_once", "environment"]


def environment(jobs: int, slot: int) -> dict[str, str]:
    """Of a process that shares the cores with ``jobs - 1`` others and has one of the GPUs, if any."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(paths)}
    # A log line in the middle of a buffered line of output would spoil both.
    found["PYTHONUNBUFFERED"] = "1"
    gpus = torch.cuda.device_count()
    if gpus:
        # Named by number or UUID where they were chosen, else counted.
        visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
        found["CUDA_VISIBLE_DEVICES"] = (visible or [str(gpu) for gpu in range(gpus)])[slot % gpus]
    return found


class Slot(NamedTuple):
    """What a thread of :func:`do_at_once` has: an environment for processes, and whether to stop."""

    environment: dict[str, str]
    stop: threading.Event


def do_at_once(jobs: int, items: Iterable[Any], do: Callable[[Any, Slot], None]) -> None:
    """Calls ``do`` for each of some items, so many at a time, each in a thread with a slot of its own.

    Args:
        jobs: At a time.
        items: In the order in which they are begun.
        do: Given an item and its slot. Once an item fails, or Ctrl-C is pressed, the others are asked to stop
            and no more are begun.

    Raises:
        BaseException: what the first item that failed has raised.
    """
    stop, free = threading.Event(), queue.SimpleQueue[int]()
    for number in range(jobs):
        free.put(number)

    def one(item: Any) -> None:
        number = free.get()
        try:
            do(item, Slot(environment(jobs, number), stop))
        finally:
            free.put(number)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(one, item) for item in items]):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
