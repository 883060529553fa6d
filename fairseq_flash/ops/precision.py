"""In which dtype something is computed, whatever autocast would make of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["ranged", "widened", "without_autocast"]

_Function = TypeVar("_Function", bound=Callable)


def widened(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 if it is narrower: for sums and positions."""
    return torch.promote_types(dtype, torch.float32)


def ranged(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 in place of float16: for products that could overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def without_autocast(function: _Function) -> _Function:
    """Runs ``function`` in the dtype of its arguments: under autocast a float16 product could overflow."""

    @functools.wraps(function)
    def in_own_dtype(*args: Any, **kwargs: Any) -> Any:
        """``function`` with autocast off on the device of its first tensor."""
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(device_type=device, enabled=False):
            return function(*args, **kwargs)

    return in_own_dtype  # type: ignore[return-value]
