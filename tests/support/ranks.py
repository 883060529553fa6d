"""Several processes on this machine that share rows, as torchrun starts them."""

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """What ``function(group, *arguments)`` returns in each of so many gloo processes, in float64."""
    with tempfile.TemporaryDirectory() as folder:
        words = (function, ranks, arguments, Path(folder))
        torch.multiprocessing.spawn(_run, words, nprocs=ranks)
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _run(rank: int, function: Callable[..., Any], ranks: int, arguments: tuple, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = torch.distributed.FileStore(str(folder / "store"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = function(torch.distributed.group.WORLD, *arguments)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # What is to be told is told: gloo's threads have ended a process that was about to end by SIGABRT.
    os._exit(0)
