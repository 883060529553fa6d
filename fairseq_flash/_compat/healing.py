"""How a function of fairseq is replaced by a healed one, or has something looked at before."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["check_first", "wrap", "wrap_in_tool"]


def wrap(owner: Any, name: str, heal: Callable[[Callable], Callable]) -> None:
    """Replaces ``owner.name`` by ``heal`` of it, once; static and class methods stay what they are."""
    raw = inspect.getattr_static(owner, name)
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind else raw
    known = getattr(original, "_healed_by_fairseq_flash", ())
    if heal.__qualname__ in known:
        return
    healed = functools.wraps(original)(heal(original))
    healed._healed_by_fairseq_flash = (*known, heal.__qualname__)
    setattr(owner, name, kind(healed) if kind else healed)


def wrap_in_tool(tool: str, name: str, heal: Callable[[Callable], Callable]) -> None:
    """As :func:`wrap`, a function of one of fairseq's tools: a module, or the program that runs."""
    for module in map(sys.modules.get, (f"fairseq_cli.{tool}", "__main__")):
        if hasattr(module, name):
            wrap(module, name, heal)


def check_first(check: Callable[[Any], None]) -> None:
    """Lets ``check`` look at the configuration before the work of fairseq's tools, and raise."""
    from fairseq.distributed import utils as distributed_utils

    def heal(call: Callable) -> Callable:
        def healed(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            check(cfg)
            return call(cfg, *args, **kwargs)

        return healed

    # By this name wrap knows that it has been done.
    heal.__qualname__ = f"{check.__module__}.{check.__qualname__}"
    wrap(distributed_utils, "call_main", heal)
