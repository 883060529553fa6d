"""Why a small checkpoint builds no huge model.

A model is built from the configuration in its checkpoint before the weights beside it are looked at: a few
bytes could ask for any memory. So it is built first of tensors without content, and counted.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils, models, tasks
from fairseq.models import BaseFairseqModel

from fairseq_flash._compat.choices import known_name
from fairseq_flash._compat.healing import wrap

__all__ = ["count_before_building"]

#: A model may have half as many numbers again as the checkpoint that it is built from, and these.
ALLOWANCE = 2**22
#: While fairseq builds models from checkpoints: path, numbers and tensors of the one read last.
_read: Optional[list[tuple[str, int, int]]] = None
#: Whether the task is built from the checkpoint as well, and not given.
_with_task = False


def count_before_building(
    classes: tuple[type[BaseFairseqModel], ...], config_of: Callable[[Any], Optional[type]]
) -> None:
    """Refuses a model of these classes, built from a checkpoint, that has more numbers than its weights.

    ``config_of`` gives the dataclass of their options, of a whole configuration.

    All doors lead through ``load_model_ensemble_and_task``; training builds its model from options.
    """
    wrap(checkpoint_utils, "load_model_ensemble_and_task", _remembering)
    wrap(
        checkpoint_utils,
        "load_checkpoint_to_cpu",
        functools.wraps(_counting)(functools.partial(_counting, config_of)),
    )
    for model in classes:
        wrap(model, "build_model", _comparing)


def _remembering(load: Callable) -> Callable:
    def healed(*args: Any, **kwargs: Any) -> Any:
        global _read, _with_task
        before, _read = _read, []
        _with_task = kwargs.get("task", args[2] if len(args) > 2 else None) is None
        try:
            return load(*args, **kwargs)
        finally:
            _read = before

    return healed


def _counting(config_of: Callable, load: Callable) -> Callable:
    def healed(path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = load(path, *args, **kwargs)
        if _read is not None:
            weights = [weight for weight in state["model"].values() if isinstance(weight, torch.Tensor)]
            if _with_task:
                known_name(path, "task", state["cfg"], tasks.TASK_REGISTRY)
            known_name(path, "model", state["cfg"], {*models.MODEL_REGISTRY, *models.ARCH_MODEL_REGISTRY})
            _check_values(path, state, config_of(state["cfg"]))
            _read[:] = [(str(path), sum(weight.numel() for weight in weights), len(weights))]
        return state

    return healed


def _check_values(path: Any, state: dict[str, Any], config: Optional[type]) -> None:
    """Refuses options that are not of their type: what comes of them would be said without their name."""
    for option in dataclasses.fields(config) if config else ():
        value, kind = state["cfg"].model.get(option.name), option.type
        fitting = {int: {int}, float: {int, float}, bool: {bool}}.get(kind)
        if fitting and value is not None and type(value) not in fitting:
            raise ValueError(
                f"checkpoint {str(path)!r} is refused: its --{option.name.replace('_', '-')} is {value!r}; "
                f"allowed: {kind.__name__}"
            )


def _comparing(build: Callable) -> Callable:
    def healed(cls: type, cfg: Any, task: Any) -> Any:
        for path, numbers, tensors in _read or ():
            asked = _asked(lambda: build(cls, cfg, task), cfg, numbers, tensors)
            if asked:
                raise ValueError(
                    f"checkpoint {path!r} is refused: its options ask for a model of {asked}, its weights "
                    f"are {numbers:,} numbers in {tensors} tensors; allowed: those that it was trained with"
                )
        return build(cls, cfg, task)

    return healed


def _asked(build: Callable, cfg: Any, numbers: int, tensors: int) -> Optional[str]:
    """What the options ask for, if that is more than the weights can be."""
    # Layers without content take memory too, and each has weights of its own.
    layers = sum(getattr(cfg, name, 0) for name in ("layers", "encoder_layers", "decoder_layers"))
    if layers > tensors:
        return f"{layers} layers"
    try:
        with torch.device("meta"):
            found = sum(weight.numel() for weight in build().parameters())
    except RuntimeError as error:
        return f"more numbers than can be counted ({str(error).partition(chr(10))[0]})"
    return f"{found:,} numbers" if found > numbers + numbers // 2 + ALLOWANCE else None
