"""Training ends when a scheduler asks for it: with a checkpoint, from which the same command goes on."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fairseq_flash._compat.healing import wrap, wrap_in_tool

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

#: What a process returns that SIGTERM has ended, as a shell tells it.
STATUS = 128 + signal.SIGTERM
#: Seconds within which SIGTERM is the same request: Slurm sends it to all, and torchrun passes it on.
SAME_REQUEST = 10.0
#: Seconds for which a worker that loads data outlives SIGTERM.
GRACE = 60


class _Request:
    """Whether a process of this training was asked to end, as far as this one knows."""

    def __init__(self) -> None:
        self.here = self.anywhere = self.followed = self.watched = False
        self.since = 0.0

    def watch(self) -> None:
        """Takes SIGTERM, unless someone else does; a second request ends the process at once, as ever."""
        free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
            self.watched = True

    def _note(self, *_: Any) -> None:
        now = time.monotonic()
        if self.here and now - self.since > SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.since = self.since if self.here else now
        self.here = True

    def forget(self) -> None:
        """As before :meth:`watch`."""
        if self.watched:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.__init__()  # type: ignore[misc]


_request = _Request()


def prepare() -> None:
    """Applies every healing of this file."""
    _end_with_a_checkpoint()
    _let_workers_outlive_the_request()


def _end_with_a_checkpoint() -> None:
    """After SIGTERM: the update at hand is made, ``checkpoint_last.pt`` saved, and the process ends with 143.

    fairseq 0.12 ends at once, and loses all since its last checkpoint. That the processes of a training end
    at the same update costs no message: the request travels with the statistics of each update.
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils
    from fairseq.trainer import Trainer

    def heal_load(load: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> Any:
            wrap_in_tool("train", "validate_and_save", _heal_validate_and_save)
            _request.watch()
            return load(*args, **kwargs)

        return healed

    def heal_aggregate(aggregate: Callable) -> Callable:
        def healed(self, logging_outputs: Any, *stats: Any, **kwargs: Any) -> Any:
            found, (*stats, asked) = aggregate(self, logging_outputs, *stats, float(_request.here), **kwargs)
            _request.anywhere = bool(asked)
            return found, tuple(stats)

        return healed

    def heal_call(call: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> Any:
            try:
                result = call(*args, **kwargs)
                if _request.followed:
                    sys.exit(STATUS)
                return result
            finally:
                _request.forget()

        return healed

    wrap(checkpoint_utils, "load_checkpoint", heal_load)
    wrap(Trainer, "_aggregate_logging_outputs", heal_aggregate)
    wrap(distributed_utils, "call_main", heal_call)


def _heal_validate_and_save(validate_and_save: Callable) -> Callable:
    from fairseq import checkpoint_utils

    def healed(cfg: Any, trainer: Any, task: Any, epoch_itr: Any, *args: Any, **kwargs: Any) -> Any:
        # Asked of all processes alike, before anything that one of them may be asked in between.
        asked = _request.anywhere if trainer.data_parallel_world_size > 1 else _request.here
        losses, should_stop = validate_and_save(cfg, trainer, task, epoch_itr, *args, **kwargs)
        if asked and not should_stop:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            kept = "nothing is kept" if cfg.checkpoint.no_save else "the same command goes on from there"
            logger.info(f"SIGTERM: training ends after update {trainer.get_num_updates()}; {kept}")
            _request.followed = True
        return losses, should_stop or asked

    return healed


def _let_workers_outlive_the_request() -> None:
    """Keeps data coming for the update at hand; torch's loader is an error as soon as a worker is gone.

    Schedulers send SIGTERM to all processes. What the worker's own parent sends ends it at once.
    """
    from torch.utils.data._utils import signal_handling

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            signal.alarm(GRACE)
        os._exit(0)

    def heal(set_handlers: Callable) -> Callable:
        def healed() -> None:
            set_handlers()
            # Only who waits for a signal is told where it comes from.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=wait, daemon=True).start()

        return healed

    if hasattr(signal, "sigwaitinfo"):  # on Linux
        wrap(signal_handling, "_set_worker_signal_handlers", heal)
