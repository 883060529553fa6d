"""Saving: one training a folder, whole files in it, and nothing in them that cannot be read again."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Optional

import numpy
import torch

from fairseq_flash._compat.healing import wrap

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["prepare"]

_TRIES, _PAUSE = 3, 2.5  # as fairseq: so often, and so many seconds between
_locks: dict[str, int] = {}  # file descriptors of the folders that this process saves in


def prepare() -> None:
    """Applies every healing of this file."""
    _lock_save_folder()
    _leave_no_cut_file()
    _copy_checkpoints_atomically()
    _keep_arrays_out_of_checkpoints()


def _lock_save_folder() -> None:
    """Lets one training at a time save in a folder; any version.

    Of two that save in one folder, each renames the other's files: one dies with a FileNotFoundError, and
    what is left is of either. The lock is the system's own (``flock`` on the folder), leaves no file and ends
    with the process. Where a file system has no locks, all is as before.
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils

    def heal_load(load: Callable) -> Callable:
        def healed(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
            if not cfg.no_save and distributed_utils.is_master(trainer.cfg.distributed_training):
                _lock(cfg.save_dir)
            return load(cfg, trainer, **kwargs)

        return healed

    def heal_call(call: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            finally:
                while _locks:
                    os.close(_locks.popitem()[1])

        return healed

    wrap(checkpoint_utils, "load_checkpoint", heal_load)
    wrap(distributed_utils, "call_main", heal_call)


def _lock(folder: str) -> None:
    """Takes the folder, and removes what a killed training left half written in it."""
    folder = os.path.realpath(folder)
    if fcntl is None or folder in _locks or not os.path.isdir(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"--save-dir {folder} is in use by another training; allowed: another folder, or to wait until "
            "that one has ended"
        ) from None
    except OSError:
        os.close(descriptor)
        return
    _locks[folder] = descriptor
    for name in ("checkpoint*.pt.tmp", "crash*.pt.tmp"):
        for cut in pathlib.Path(folder).glob(name):
            cut.unlink(missing_ok=True)


def _leave_no_cut_file() -> None:
    """Removes what could not be written to its end, such as on a full disk, which it would keep full.

    fairseq 0.12 leaves it; and where a second try succeeds, it has written that behind the first one's part,
    in a file that nobody can read.
    """
    from fairseq import checkpoint_utils

    def heal_save(save: Callable) -> Callable:
        def healed(obj: Any, filename: str, async_write: bool = False) -> Any:
            try:
                return save(obj, filename, async_write)
            except (OSError, RuntimeError) as error:
                raise OSError(f"{filename} cannot be written: {_system_error(error)}") from error
            finally:
                _remove(f"{filename}.tmp")

        return healed

    def heal_write(write: Callable) -> Callable:
        def healed(obj: Any, file: Any) -> Any:
            if isinstance(file, str):
                return write(obj, file)
            begin = file.tell()
            for left in reversed(range(_TRIES)):
                try:
                    return torch.save(obj, file)
                except Exception:
                    # First on the disk: the buffer may hold more that needs room.
                    os.ftruncate(file.fileno(), begin)
                    file.seek(begin)
                    file.truncate()
                    if not left:
                        raise
                    time.sleep(_PAUSE)

        return healed

    wrap(checkpoint_utils, "torch_persistent_save", heal_save)
    wrap(checkpoint_utils, "_torch_persistent_save", heal_write)


def _system_error(error: BaseException) -> BaseException:
    """The cause that torch's own error hides."""
    found: Optional[BaseException] = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def _copy_checkpoints_atomically() -> None:
    """Copies ``checkpoint_last.pt`` and its like beside the target and renames; any version.

    ``PathManager.copy`` writes into the target itself: a kill in between leaves a truncated file and a run
    that can not be resumed. (fairseq already renames the first file it writes.
    ``--write-checkpoints-asynchronously`` makes no copies, and its one file is not atomic.)
    """
    from fairseq.file_io import PathManager

    def heal(copy: Callable) -> Callable:
        def healed(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
            refused = os.path.exists(dst_path) and not overwrite
            if refused or PathManager.path_requires_pathmanager(dst_path):
                return copy(src_path, dst_path, overwrite)
            try:
                done = copy(src_path, dst_path + ".tmp", True)
                os.replace(dst_path + ".tmp", dst_path)
            except BaseException:
                _remove(dst_path + ".tmp")
                raise
            return done and dst_path

        return healed

    wrap(PathManager, "copy", heal)


def _keep_arrays_out_of_checkpoints() -> None:
    """Writes the counts of ``--eval-bleu`` as tensors: as numpy arrays, torch >= 2.6 refuses to read them.

    So nothing more needs to be allowed in a checkpoint; a meter that is restored counts on with arrays.
    """
    from fairseq.logging.meters import AverageMeter

    def write(state_dict: Callable) -> Callable:
        def healed(self) -> dict[str, Any]:
            state = state_dict(self).items()
            return {k: torch.from_numpy(v) if isinstance(v, numpy.ndarray) else v for k, v in state}

        return healed

    def read(load_state_dict: Callable) -> Callable:
        def healed(self, state: dict[str, Any]) -> None:
            arrays = {k: v.numpy() for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}
            load_state_dict(self, {**state, **arrays})

        return healed

    wrap(AverageMeter, "state_dict", write)
    wrap(AverageMeter, "load_state_dict", read)
