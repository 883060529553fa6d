"""One process of scripts/train_distributed.sh: fairseq-train under torchrun, and a check that it trained.

fairseq counts GPUs to find its processes: on CPUs plain torchrun divides by zero, and an init method alone
ends with status 0 and no training. So rank, world size, backend and start-up method are given here, fairseq
spawns nothing, and the process fails unless it made updates or restored a checkpoint that was complete.
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

# fairseq gathers Python objects through a CUDA buffer unless one is there: its size in bytes per process.
_GATHER_BYTES = 1 << 20
_DDP_BACKENDS_ON_CPU = ("legacy_ddp", "no_c10d")


def _value_of(arguments: list[str], option: str) -> str | None:
    """The last value of ``option`` in either spelling, as argparse would take it."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(option + "="):
            value = argument.split("=", 1)[1]
    return value


def distributed_arguments(arguments: list[str], environment: dict[str, str], gpus: int) -> list[str]:
    """What is appended to the user's arguments for fairseq-train.

    Args:
        arguments: The user's own.
        environment: torchrun's: ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``.
        gpus: GPUs of this machine.

    Raises:
        ValueError: An argument contradicts what is appended, or there are fewer GPUs than processes.
    """
    taken = [argument for argument in arguments if argument.startswith(("--distributed-", "--device-id"))]
    if taken:
        message = f"{taken[0]} is set by train_distributed.sh: leave it out; --nproc and NNODES say how many"
        raise ValueError(message)
    on_cpu = "--cpu" in arguments or gpus == 0
    processes = int(environment["LOCAL_WORLD_SIZE"])
    if not on_cpu and processes > gpus:
        raise ValueError(f"--nproc is {processes}; allowed are 1 to {gpus}, the GPUs here, or add --cpu")
    added = ["--distributed-rank", environment["RANK"], "--distributed-world-size", environment["WORLD_SIZE"]]
    added += ["--distributed-no-spawn", "--distributed-init-method", "env://"]
    if not on_cpu:
        return [*added, "--distributed-backend", "nccl", "--device-id", environment["LOCAL_RANK"]]
    backend = _value_of(arguments, "--ddp-backend")
    if backend not in (None, *_DDP_BACKENDS_ON_CPU):
        raise ValueError(f"--ddp-backend is {backend}; on CPUs allowed: {', '.join(_DDP_BACKENDS_ON_CPU)}")
    return [*added, "--distributed-backend", "gloo", "--ddp-backend", backend or "legacy_ddp"]


def _end_with_parent() -> None:
    """Has Linux end this process when torchrun dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_at_most(seconds: int) -> None:
    """Bounds every wait for another process, in groups that are made later too; fairseq has no option."""
    limit = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit


def _gather_on_cpu(world_size: int) -> None:
    """Gives ``all_gather_list`` buffers in main memory; its own are CUDA and pinned."""
    from fairseq.distributed.utils import all_gather_list

    all_gather_list._buffer = torch.zeros(_GATHER_BYTES * world_size, dtype=torch.uint8)
    all_gather_list._cpu_buffer = torch.zeros(_GATHER_BYTES, dtype=torch.uint8)


class TrainingRecord:
    """Sees where fairseq's training starts, and tells at the end whether it did what was asked."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.first_update = 0
        self.first_epoch = 1

    def watch(self) -> None:
        """Notes the trainer once fairseq has looked for a checkpoint, and the updates that this gave."""
        from fairseq import checkpoint_utils

        load_checkpoint = checkpoint_utils.load_checkpoint

        def load_and_note(cfg: Any, trainer: Any, **arguments: Any) -> tuple:
            extra_state, epochs = load_checkpoint(cfg, trainer, **arguments)
            self.trainer, self.first_update = trainer, trainer.get_num_updates()
            self.first_epoch = epochs.next_epoch_idx
            return extra_state, epochs

        checkpoint_utils.load_checkpoint = load_and_note

    def objection(self, world_size: int) -> str | None:
        """Why this does not count as training; None if it does."""
        if self.trainer is None:
            return "fairseq-train ended before it built a trainer"
        if self.trainer.data_parallel_world_size != world_size:
            return f"fairseq trained with {self.trainer.data_parallel_world_size} of {world_size} processes"
        limits = self.trainer.cfg.optimization
        if self.trainer.get_num_updates() > self.first_update:
            return None
        if limits.max_update and self.first_update >= limits.max_update:
            return None
        if limits.max_epoch and self.first_epoch > limits.max_epoch:
            return None
        return (
            f"no update was made: training stands at {self.first_update}, with --max-update "
            f"{limits.max_update} and --max-epoch {limits.max_epoch}; look at the data, the batch size and "
            "--stop-min-lr"
        )


def main() -> None:
    """Trains as one of torchrun's processes; exits 2 for a wrong argument, 3 if there was no training."""
    if "WORLD_SIZE" not in os.environ:
        print(f"{__doc__}\ntorchrun starts it; train_distributed.sh --help explains")
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    _end_with_parent()
    if os.environ.get("TIMEOUT"):
        _wait_at_most(int(os.environ["TIMEOUT"]))
    from fairseq_cli.train import cli_main

    arguments, world_size = sys.argv[1:], int(os.environ["WORLD_SIZE"])
    try:
        added = distributed_arguments(arguments, dict(os.environ), torch.cuda.device_count())
    except ValueError as error:
        sys.exit(_said(str(error), 2))
    if "gloo" in added:
        _gather_on_cpu(world_size)
        added += [] if "--cpu" in arguments else ["--cpu"]
    sys.argv = ["fairseq-train", *arguments, *added]
    record = TrainingRecord()
    record.watch()
    cli_main()
    objection = record.objection(world_size)
    if objection:
        sys.exit(_said(objection, 3))
    torch.distributed.destroy_process_group()


def _said(message: str, status: int) -> int:
    if os.environ["RANK"] == "0":
        print(f"train_distributed.sh: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
