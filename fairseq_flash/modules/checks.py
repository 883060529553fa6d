"""What constructors refuse, each kind of argument in one way."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch

from fairseq_flash.ops import check_backend, check_even

__all__ = ["check_backend", "check_choice", "check_even", "check_rates", "check_sizes", "require"]


def check_sizes(**sizes: Any) -> None:
    """Refuses sizes, by name, that are not integers of 1 or more.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            integers = "" if isinstance(size, Integral) else ", an integer"
            raise ValueError(f"{name}={size} is not allowed; allowed: 1 or more{integers}")


def check_rates(**rates: float) -> None:
    """Refuses rates of dropout, by name, outside of 0 to below 1.

    Raises:
        ValueError: one is.
    """
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name}={rate} is not allowed; allowed: 0 to below 1")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuses a ``value`` of the argument ``name`` that is not ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")


def require(condition: torch.Tensor, message: str, **numbers: torch.Tensor) -> None:
    """Refuses numbers, without waiting for a device.

    Args:
        condition: One truth value.
        message: What is wrong, and what is allowed, with ``{name}`` in place of each of the ``numbers``.
        numbers: Known to the message on a CPU alone.

    Raises:
        ValueError: ``condition`` is False on a CPU. A GPU stops with its own error, as does a compiled graph.
    """
    if torch.compiler.is_compiling() or not condition.is_cpu:
        torch._assert_async(condition, message.format(**{name: name for name in numbers}))
        return
    try:
        torch._assert_async(condition, message)
    except RuntimeError as error:
        raise ValueError(message.format(**{name: int(x) for name, x in numbers.items()})) from error
