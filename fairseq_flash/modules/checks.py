"""What constructors and calls refuse, each kind of argument in one way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Optional, Union

import torch
from torch import distributed

from fairseq_flash.ops import check_backend, check_even, check_part

__all__ = [
    "check_backend",
    "check_choice",
    "check_even",
    "check_flags",
    "check_instance",
    "check_numbers",
    "check_rates",
    "check_shared",
    "check_sizes",
    "check_tensor",
    "check_vectors",
    "require",
]


def check_sizes(**sizes: Any) -> None:
    """Refuses sizes, by name, that are not integers of 1 or more.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            integers = "" if isinstance(size, Integral) else ", an integer"
            raise ValueError(f"{name}={size!r} is not allowed; allowed: 1 or more{integers}")


def check_rates(**rates: Any) -> None:
    """Refuses rates of dropout, by name, outside of 0 to below 1.

    Raises:
        ValueError: one is.
    """
    for name, rate in rates.items():
        if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise ValueError(f"{name}={rate!r} is not allowed; allowed: 0 to below 1")


def check_numbers(**numbers: Any) -> None:
    """Refuses numbers, by name, that are none or not finite.

    Raises:
        ValueError: one is.
    """
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
            raise ValueError(f"{name}={number!r} is not allowed; allowed: finite numbers")


def check_flags(**flags: Any) -> None:
    """Refuses switches, by name, that are neither True nor False: every text would count as True.

    Raises:
        ValueError: one is not.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r} is not allowed; allowed: True, False")


def check_instance(name: str, value: Any, kind: type) -> None:
    """Refuses a ``value`` of the argument ``name`` that is not of its ``kind``.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}; allowed: {kind.__name__}")


def check_shared(layers: Iterable[Any], state: Any, n: int, group: Any) -> None:
    """Refuses rows over the processes of a ``group`` where ``layers`` cannot share them.

    Args:
        layers: All of a stack, or one.
        state: What came before the rows.
        n: Length of this process's part.
        group: As the argument came.

    Raises:
        ValueError: so it is.
    """
    check_instance("group", group, distributed.ProcessGroup)
    for layer in layers:
        kind = getattr(layer, "attention", None)
        if kind in (None, "quadratic"):
            found = type(layer).__name__ if kind is None else f"attention={kind!r}"
            raise ValueError(f"{found} cannot share a row in a group; allowed: mixed_chunk, local, global")
        check_part(n, layer.chunk_size, group)
    if state is not None:
        raise ValueError("group and state are both given; allowed is one of them")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuses a ``value`` of the argument ``name`` that is not ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")


def check_tensor(
    name: str,
    x: Any,
    shape: Sequence[Optional[int]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Refuses what is no tensor of a ``shape``, whose None stands for any size, of such a dtype, or there.

    Raises:
        ValueError: so it is.
    """
    check_instance(name, x, torch.Tensor)
    if x.dim() != len(shape) or any(b is not None and a != b for a, b in zip(x.shape, shape, strict=True)):
        shown = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: ({shown})")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} has device {x.device}; allowed: {device}")


def check_vectors(name: str, x: Any, shape: Sequence[Optional[int]], weight: torch.Tensor) -> None:
    """As :func:`check_tensor`, of vectors that ``weight`` is applied to; autocast takes any floating dtype.

    Raises:
        ValueError: they do not fit.
    """
    dtypes = [weight.dtype]
    if torch.is_autocast_enabled(weight.device.type):
        dtypes += [torch.float32, torch.float16, torch.bfloat16]
    check_tensor(name, x, shape, dtypes, weight.device)


def require(condition: torch.Tensor, message: str, **numbers: Union[int, torch.Tensor]) -> None:
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
