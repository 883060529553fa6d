"""Training begins only where something is left to do, goes on as if it had not stopped, and ends cleanly."""

import contextlib
import logging
import math
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Optional

from fairseq_flash._compat.healing import check_first, wrap, wrap_in_tool

__all__ = ["prepare"]

logger = logging.getLogger(__name__)


def prepare() -> None:
    """Applies every healing of this file."""
    _know_before_training_that_it_is_complete()
    _save_before_the_best_is_missed()
    _begin_an_average_at_any_time()
    _stop_loading_at_the_end()
    _tell_what_is_not_finite()
    check_first(_refuse_sharded_weights)


def _know_before_training_that_it_is_complete() -> None:
    """Asks before the first update what fairseq 0.12 asks only after it: is the training at its end?

    Without it a training that is complete makes one update more each time that it is started again, beyond
    the end of its schedule. How long it has waited for a better validation (``--patience``) is saved for it.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager
    from fairseq.trainer import Trainer

    def heal_save(save: Callable) -> Callable:
        def healed(self, filename: str, extra_state: dict[str, Any]) -> Any:
            waited = [dict(vars(stop)) for stop in _early_stops() if vars(stop)]
            return save(self, filename, {**extra_state, "patience": waited[0]} if waited else extra_state)

        return healed

    def heal_load(load: Callable) -> Callable:
        def healed(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
            path = cfg.restore_file.replace(".pt", f"{trainer.checkpoint_suffix or ''}.pt")
            if cfg.restore_file != "checkpoint_last.pt" and not PathManager.isfile(path):
                logger.warning(f"--restore-file {path} is no file: training begins anew")
            once = cfg.continue_once
            if once is not None and not PathManager.isfile(once):
                logger.warning(f"--continue-once {once} is no file: it is not begun with")
            extra_state, epochs = load(cfg, trainer, **kwargs)
            goes_on = extra_state is not None and trainer.get_num_updates() > 0
            waited = extra_state.get("patience") if goes_on and not cfg.reset_meters else None
            for stop in _early_stops():
                # What another training of this process has left is nothing to this one.
                vars(stop).clear()
                vars(stop).update(waited or {})
            reason = _complete(cfg, trainer, waited or {}) if goes_on else None
            if reason:
                logger.info(f"training is complete, nothing is left to do: {reason}")
            return extra_state, _NoEpochs(epochs) if reason else epochs

        return healed

    wrap(Trainer, "save_checkpoint", heal_save)
    wrap(checkpoint_utils, "load_checkpoint", heal_load)


def _early_stops() -> list[Callable]:
    """The function of fairseq-train that counts, in its own attributes, for ``--patience``."""
    modules = map(sys.modules.get, ("fairseq_cli.train", "__main__"))
    return [module.should_stop_early for module in modules if hasattr(module, "should_stop_early")]


def _complete(cfg: Any, trainer: Any, waited: dict[str, Any]) -> Optional[str]:
    """Why there is nothing to be done; None if there is."""
    limits, updates, runs = trainer.cfg.optimization, trainer.get_num_updates(), waited.get("num_runs", 0)
    hours = trainer.cumulative_training_time() / 3600
    if limits.max_update and updates >= limits.max_update:
        return f"{updates} updates of --max-update {limits.max_update}"
    if 0 < limits.stop_time_hours < hours:
        return f"{hours:.2f} hours of --stop-time-hours {limits.stop_time_hours}"
    if 0 < cfg.patience <= runs:
        return f"{runs} validations without a better one, with --patience {cfg.patience}"
    return None


class _NoEpochs:
    """Stands for the epochs of a training that is complete."""

    #: fairseq trains while this is at most the last epoch, or infinity; NaN is at most nothing.
    next_epoch_idx = math.nan

    def __init__(self, epochs: Any) -> None:
        self._epochs = epochs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epochs, name)


class _NoSuchMetric(ValueError):
    """Validation does not measure what the best checkpoint is chosen by."""


def _save_before_the_best_is_missed() -> None:
    """Names a ``--best-checkpoint-metric`` that validation lacks, once a checkpoint is saved.

    fairseq 0.12 ends in a KeyError at the end of the first epoch, which is lost. What a task measures is not
    known before.
    """
    from fairseq import checkpoint_utils

    def heal_load(load: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> Any:
            wrap_in_tool("train", "get_valid_stats", _heal_get_valid_stats)
            wrap_in_tool("train", "validate_and_save", _keep_the_work)
            return load(*args, **kwargs)

        return healed

    wrap(checkpoint_utils, "load_checkpoint", heal_load)


def _heal_get_valid_stats(get_valid_stats: Callable) -> Callable:
    def healed(cfg: Any, trainer: Any, stats: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        name = cfg.checkpoint.best_checkpoint_metric
        if name not in stats:
            raise _NoSuchMetric(
                f"--best-checkpoint-metric {name} is not allowed: validation does not measure it; allowed: "
                f"{', '.join(sorted(stats)) or 'none, as no batch was validated'}"
            )
        return get_valid_stats(cfg, trainer, stats, *args, **kwargs)

    return healed


def _keep_the_work(validate_and_save: Callable) -> Callable:
    from fairseq import checkpoint_utils

    def healed(cfg: Any, trainer: Any, task: Any, epoch_itr: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return validate_and_save(cfg, trainer, task, epoch_itr, *args, **kwargs)
        except _NoSuchMetric:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            raise

    return healed


def _begin_an_average_at_any_time() -> None:
    """Lets ``--store-ema`` be added to a run, or to fine-tuning: the average begins with the weights read.

    fairseq 0.12 means to do so, but has dropped the weights by then: KeyError 'model'.
    """
    from fairseq.trainer import Trainer

    def heal(load: Callable) -> Callable:
        def healed(self, filename: str, *args: Any, **kwargs: Any) -> Any:
            options = self.cfg.ema
            if not options.store_ema:
                return load(self, filename, *args, **kwargs)
            options.store_ema = False
            try:
                extra_state = load(self, filename, *args, **kwargs)
            finally:
                options.store_ema = True
            if extra_state is not None:
                self.ema.restore(_average(filename, extra_state, self.get_model()))
                if options.ema_fp32:
                    self.ema.build_fp32_params(extra_state.get("ema_fp32_params"))
            return extra_state

        return healed

    wrap(Trainer, "load_checkpoint", heal)


def _average(filename: str, extra_state: dict[str, Any], model: Any) -> dict[str, Any]:
    if "ema" in extra_state:
        return extra_state["ema"]
    logger.warning(f"checkpoint {filename!r} holds no average: --store-ema begins with its weights")
    return model.state_dict()


def _stop_loading_at_the_end() -> None:
    """Stops and joins the thread that loads batches, where nobody takes them any more; any version.

    A training that reaches ``--max-update`` within an epoch leaves fairseq's thread at work. Where the
    interpreter ends while the thread is inside torch, the process aborts with status 134, "terminate called
    without an active exception", after all is saved.
    """
    from fairseq.data.iterators import BufferedIterator

    def heal(create: Callable) -> Callable:
        def healed(self) -> None:
            create(self)
            # Called when the iterator is dropped, and for those that are left before the interpreter ends.
            weakref.finalize(self, _stop, self._consumer, self._queue)

        return healed

    wrap(BufferedIterator, "_create_consumer", heal)


def _stop(consumer: Any, batches: queue.Queue) -> None:
    consumer._max_len = 0  # it ends after the batch at hand
    while consumer.is_alive() and consumer is not threading.current_thread():
        with contextlib.suppress(queue.Empty):
            batches.get_nowait()
        consumer.join(0.01)


def _tell_what_is_not_finite() -> None:
    """Names the update and the layer where a loss or gradients are not finite.

    fairseq 0.12 makes the update again with hooks that log each layer; its error, "gradients are Nan/Inf",
    says neither. Its backward hooks fail on a module that returns a dictionary, as encoders do: those of its
    parts tell enough.
    """
    from fairseq.nan_detector import NanDetector
    from fairseq.trainer import Trainer

    found: list[str] = []

    def heal_hooks(add_hooks: Callable) -> Callable:
        def healed(self, module: Any) -> None:
            backward, self.backward = self.backward, self.backward and next(module.children(), None) is None
            add_hooks(self, module)
            self.backward = backward

        return healed

    def heal_detect(detect: Callable) -> Callable:
        def healed(self, *args: Any) -> Any:
            message = detect(self, *args)
            if message:
                found.append(message)
            return message

        return healed

    def heal_step(step: Callable) -> Callable:
        def healed(self, *args: Any, **kwargs: Any) -> Any:
            found.clear()
            try:
                return step(self, *args, **kwargs)
            except FloatingPointError as error:
                if str(error).startswith("update "):
                    raise
                first = f"; first: {found[0]}" if found else ""
                raise FloatingPointError(f"update {self.get_num_updates() + 1}: {error}{first}") from error

        return healed

    wrap(NanDetector, "add_hooks", heal_hooks)
    wrap(NanDetector, "_detect", heal_detect)
    wrap(Trainer, "train_step", heal_step)


def _refuse_sharded_weights(cfg: Any) -> None:
    """Refuses ``--ddp-backend fully_sharded`` for models of this package, before anything is built.

    fairseq 0.12 takes fairscale's, which ended before the torch that is needed here: what it computes there
    has never been compared. ``--zero-sharding os``, of the same package, has.
    """
    from fairseq.models import ARCH_MODEL_REGISTRY

    model = ARCH_MODEL_REGISTRY.get(getattr(getattr(cfg, "model", None), "_name", None))
    ours = getattr(model, "__module__", "").startswith("fairseq_flash.")
    if ours and cfg.distributed_training.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded is not allowed: fairscale's sharded weights have not been kept up "
            "with torch; allowed: pytorch_ddp, legacy_ddp, no_c10d, and --zero-sharding os, by which "
            "processes share the optimizer's state"
        )
