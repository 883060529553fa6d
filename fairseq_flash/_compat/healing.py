"""How a function of fairseq is replaced by a healed one."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["wrap"]


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
