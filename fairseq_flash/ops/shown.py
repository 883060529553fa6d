"""How states are printed: by their shapes, as nobody reads a million numbers."""

from typing import Any

import torch

__all__ = ["shown"]


def shown(state: Any) -> str:
    """A named tuple as one line, each tensor as its shape and dtype; alike layers are counted.

    Args:
        state: A named tuple of tensors, None, plain values and tuples of such.

    Returns:
        Such as ``ChunkState(kv_sum=(1, 128, 1024) float32, ..., position=(1,) int64)``.
    """
    fields = (f"{name}={_value(value)}" for name, value in state._asdict().items() if value is not None)
    return f"{type(state).__name__}({', '.join(fields)})"


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        found = [_value(each) for each in value]
        alike = len(found) > 1 and len(set(found)) == 1
        return f"{len(found)} x {found[0]}" if alike else f"({', '.join(found)})"
    return repr(value)
