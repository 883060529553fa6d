"""The only place that chooses an implementation, or says why one cannot run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Optional

__all__ = ["BACKENDS", "IMPLEMENTATIONS", "STEPS", "check_backend", "choose"]

#: Implementations of :func:`~fairseq_flash.ops.gated_mixed_chunk`, the fastest first: modules with
#: ``run(projected, options, carry)`` and ``objections(projected, options) -> list[str]``, which may ask
#: for device, dtype and sizes, never for values. A module is imported when it is first asked.
IMPLEMENTATIONS = {
    "triton": "fairseq_flash.ops.mixed_chunk.kernel",
    "recomputed": "fairseq_flash.ops.mixed_chunk.recomputed",
    "reference": "fairseq_flash.ops.mixed_chunk.gated",
}

#: Likewise of :func:`~fairseq_flash.ops.gated_mixed_chunk_step`, with ``(projected, options, state)``.
STEPS = {
    "triton": "fairseq_flash.ops.mixed_chunk.step_kernel",
    "reference": "fairseq_flash.ops.mixed_chunk.step",
}

BACKENDS = ("auto", *IMPLEMENTATIONS)

_modules: dict[str, Any] = {}


def check_backend(backend: str) -> None:
    """Refuses a backend that does not exist, and imports what it may be.

    Args:
        backend: ``"auto"`` for the fastest that can run, or the name of one to insist on.

    Raises:
        ValueError: the name is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    # Here and not in the first pass: a compiler that traces that one cannot import.
    for path in IMPLEMENTATIONS.values() if backend == "auto" else (IMPLEMENTATIONS[backend],):
        _module(path)


def choose(backend: str, *arguments: Any, among: Optional[Mapping[str, str]] = None) -> Callable[..., Any]:
    """The implementation that shall run.

    Args:
        backend: ``"auto"`` for the first without objections, or a name, which insists.
        arguments: What the candidates may object to.
        among: The candidates by name; None for those of whole rows.

    Returns:
        Its ``run``.

    Raises:
        ValueError: the name is unknown, or there are objections; the message lists all of all candidates.
    """
    if backend not in BACKENDS:
        check_backend(backend)
    among = IMPLEMENTATIONS if among is None else among
    refused = []
    for name in among if backend == "auto" else (backend,):
        module = _module(among[name])
        objections = module if isinstance(module, list) else module.objections(*arguments)
        if not objections:
            return module.run
        refused.append(f"backend={name!r} cannot run: {'; '.join(objections)}")
    raise ValueError(". ".join(refused) + ("" if backend == "auto" else "; allowed: auto"))


def _module(path: str) -> Any:
    """The module, or what it lacks, which is not looked for again with every token."""
    # A dictionary, which the compiler can look into; it cannot import.
    if path not in _modules:
        try:
            _modules[path] = importlib.import_module(path)
        except ImportError as error:
            _modules[path] = [str(error)]
    return _modules[path]
