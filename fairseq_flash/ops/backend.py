"""Which implementation runs: the PyTorch reference or a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["BACKENDS", "check_backend", "without_autocast"]

BACKENDS = ("auto", "reference", "triton")

_Function = TypeVar("_Function", bound=Callable)


def check_backend(backend: str) -> None:
    """Refuses a backend that does not exist or cannot run.

    Args:
        backend: ``"auto"`` for the fastest that can run, or ``"reference"`` or ``"triton"`` to insist on one.

    Raises:
        ValueError: the name is unknown, or the backend is asked for by name and cannot run; the message
            lists every objection.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if backend == "triton":
        objections = "; ".join(_triton_objections())
        raise ValueError(f"backend='triton' cannot run: {objections}; allowed: auto, reference")


def without_autocast(function: _Function) -> _Function:
    """Runs ``function`` in the dtype of its arguments: under autocast a float16 product could overflow."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(device_type=device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def _triton_objections() -> list[str]:
    objections = ["this version has no Triton kernel"]
    if not torch.cuda.is_available():
        objections.append("there is no CUDA device")
    return objections
