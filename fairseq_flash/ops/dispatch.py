"""The only place that chooses an implementation, or says why one cannot run."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BACKENDS", "IMPLEMENTATIONS", "check_backend", "choose"]

#: Implementations of :func:`~fairseq_flash.ops.gated_mixed_chunk`, the fastest first: modules with
#: ``run(projected, options, carry)`` and ``objections(projected, options) -> list[str]``, which may ask for
#: device, dtype and sizes, never for values. A module is imported when it is first asked.
IMPLEMENTATIONS = {
    "recomputed": "fairseq_flash.ops.mixed_chunk.recomputed",
    "reference": "fairseq_flash.ops.mixed_chunk.gated",
}

BACKENDS = ("auto", *IMPLEMENTATIONS)


def check_backend(backend: str) -> None:
    """Refuses a backend that does not exist.

    Args:
        backend: ``"auto"`` for the fastest that can run, or the name of one to insist on.

    Raises:
        ValueError: the name is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")


def choose(backend: str, *arguments: Any) -> Callable[..., torch.Tensor]:
    """The implementation that shall run.

    Args:
        backend: ``"auto"`` for the first without objections, or a name, which insists.
        arguments: What the candidates may object to.

    Returns:
        Its ``run``.

    Raises:
        ValueError: the name is unknown, or there are objections; the message lists all of all candidates.
    """
    check_backend(backend)
    refused = []
    for name in IMPLEMENTATIONS if backend == "auto" else (backend,):
        try:
            module = _module(name)
            objections = module.objections(*arguments)
        except ImportError as error:
            objections = [str(error)]
        if not objections:
            return module.run
        refused.append(f"backend={name!r} cannot run: {'; '.join(objections)}")
    raise ValueError(". ".join(refused))


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(IMPLEMENTATIONS[name])
