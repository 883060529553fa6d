"""A GPU gets the next update's work before the host has read whether the last one's norm was finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Optional
from weakref import WeakKeyDictionary

import torch

from fairseq_flash._compat.healing import wrap, wrap_in_tool

__all__ = ["prepare"]


class _Norm(torch.Tensor):
    """A norm that passes for finite, as the host would wait for the device to know."""

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: Optional[dict] = None
    ) -> Any:
        if function is torch.isfinite:
            return torch.ones((), dtype=torch.bool)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class _NotFiniteError(Exception):
    """The update before had gradients that are not finite."""


class _Update(NamedTuple):
    """An update whose kernels are queued.

    Attributes:
        number: Of updates before it.
        samples: Its batches.
        broken: 1 if its gradients are not finite, else 0; on the host, once ``known`` has passed.
        known: None on a CPU.
    """

    number: int
    samples: list
    broken: torch.Tensor
    known: Optional[torch.cuda.Event]


class _Course:
    """How the updates of a trainer go.

    Attributes:
        samples: Batches of the update at hand.
        adam: Its optimizer; None where the host waits, or there is no update at hand.
        open: The last update that was queued.
        waits: Whether an update is made again.
    """

    samples: list
    adam: Optional[torch.optim.AdamW] = None
    open: Optional[_Update] = None
    waits: bool = False


_courses: WeakKeyDictionary = WeakKeyDictionary()


def _course_of(trainer: Any) -> _Course:
    return _courses.setdefault(trainer, _Course())


def prepare() -> None:
    """Lets the host run one update ahead of a GPU, with ``--optimizer fused_adam`` in one process.

    fairseq 0.12 reads the norm of the gradients before it starts the optimizer, and the loss at the end of
    each update. Until Python has then started the next kernels the GPU has nothing to do, which is an eighth
    of an update of 32 768 tokens on an H200, of a model of 110 M parameters. Here the optimizer looks at the
    norm on the device and, where it is not finite, leaves weights and moments as they are; the host looks
    one update later, and before each checkpoint, each validation and the end. An update that failed is then
    made again in fairseq's own way, which reports it; it has been logged before, with its norm that is no
    number. Losses and weights stay the same to the bit; ``train_step`` returns no loss, which it would have
    to wait for. Criterions that divide by a number of the device, as ``masked_lm``, still wait for that.
    """
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    def heal_load(load: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> Any:
            wrap_in_tool("train", "validate_and_save", _look_at_the_end)
            return load(*args, **kwargs)

        return healed

    wrap(checkpoint_utils, "load_checkpoint", heal_load)
    wrap(Trainer, "train_step", _heal_step)
    wrap(Trainer, "clip_grad_norm", _heal_norm)
    wrap(Trainer, "_reduce_and_log_stats", _heal_log)
    wrap(Trainer, "save_checkpoint", _look_first)
    wrap(Trainer, "begin_valid_epoch", _look_first)
    wrap(Trainer, "load_checkpoint", _forget_first)


def _is_asynchronous(trainer: Any) -> bool:
    return trainer.cuda


def _adam(trainer: Any) -> Any:
    """The optimizer that is to look by itself; None where the host has to wait."""
    from fairseq_flash.optim import FusedAdam

    cfg, optimizer = trainer.cfg, trainer.optimizer
    inner = getattr(optimizer, "fp32_optimizer", optimizer)
    looks = isinstance(inner, FusedAdam) and isinstance(inner.optimizer, torch.optim.AdamW)
    waits = (
        not _is_asynchronous(trainer)
        or trainer.data_parallel_world_size > 1
        or getattr(optimizer, "scaler", None) is not None
        or cfg.ema.store_ema
    )
    return inner.optimizer if looks and not waits else None


def _heal_step(step: Callable) -> Callable:
    def healed(self: Any, samples: list, *args: Any, **kwargs: Any) -> Any:
        course, adam = _course_of(self), _adam(self)
        if course.waits or adam is None:
            return step(self, samples, *args, **kwargs)
        course.samples, course.adam = samples, adam
        try:
            return step(self, samples, *args, **kwargs)
        except _NotFiniteError:
            pass  # what is raised next is no consequence of it
        finally:
            course.adam = adam.found_inf = None
        return _make_again(self, course)

    return healed


def _heal_norm(clip: Callable) -> Callable:
    def healed(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm, course = clip(self, *args, **kwargs), _course_of(self)
        if course.waits or course.adam is None:
            return norm
        if course.open is not None and _is_broken(course.open):
            raise _NotFiniteError
        broken, known = (~norm.isfinite()).float(), None
        course.adam.found_inf = broken
        if broken.is_cuda:
            broken = torch.empty_like(broken, device="cpu", pin_memory=True).copy_(broken, non_blocking=True)
            known = torch.cuda.Event()
            known.record()
        course.open = _Update(self.get_num_updates(), course.samples, broken, known)
        return norm.as_subclass(_Norm)

    return healed


def _is_broken(update: _Update) -> bool:
    if update.known is not None:
        update.known.synchronize()
    return bool(update.broken.item())


def _make_again(trainer: Any, course: _Course) -> NoReturn:
    """Makes the open update in fairseq's way.

    Raises:
        FloatingPointError: its gradients are not finite, or were not.
    """
    update, course.open, course.waits = course.open, None, True
    if hasattr(trainer.optimizer, "_multiply_factor"):
        # What an update that was given up has left there.
        trainer.optimizer._multiply_factor = 1.0
    trainer.set_num_updates(update.number)
    try:
        trainer.train_step(update.samples)
    finally:
        course.waits = False
    raise FloatingPointError(
        f"update {update.number + 1}: gradients are Nan/Inf, and were finite when the update was made again"
    )


def _heal_log(log: Callable) -> Callable:
    from fairseq.logging import metrics

    def healed(self: Any, outputs: Any, sample_size: Any, norm: Any = None) -> dict[str, Any]:
        if not isinstance(norm, _Norm):
            return log(self, outputs, sample_size, norm)
        norm, most = norm.as_subclass(torch.Tensor), self.cfg.optimization.clip_norm
        metrics.log_speed("ups", 1.0, priority=100, round=2)
        metrics.log_scalar("gnorm", norm, priority=400, round=3)
        if most > 0:
            metrics.log_scalar("clip", torch.where(norm > most, 100.0, 0.0), priority=500, round=1)
        # What it returns is rounded on the host, but for a TPU.
        tpu, self.tpu = self.tpu, True
        try:
            return {**log(self, outputs, sample_size), "sample_size": sample_size}
        finally:
            self.tpu = tpu

    return healed


def _look(trainer: Any) -> None:
    course = _course_of(trainer)
    if course.open is not None and _is_broken(course.open):
        _make_again(trainer, course)
    course.open = None


def _forget_first(load: Callable) -> Callable:
    def healed(self: Any, *args: Any, **kwargs: Any) -> Any:
        _courses.pop(self, None)
        return load(self, *args, **kwargs)

    return healed


def _look_first(call: Callable) -> Callable:
    def healed(self: Any, *args: Any, **kwargs: Any) -> Any:
        _look(self)
        return call(self, *args, **kwargs)

    return healed


def _look_at_the_end(validate_and_save: Callable) -> Callable:
    def healed(cfg: Any, trainer: Any, task: Any, epochs: Any, subsets: Any, end_of_epoch: bool) -> Any:
        losses, should_stop = validate_and_save(cfg, trainer, task, epochs, subsets, end_of_epoch)
        if should_stop or end_of_epoch:
            _look(trainer)
        return losses, should_stop

    return healed
