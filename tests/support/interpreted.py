"""Mends Triton's interpreter (3.6): loops under NumPy 2.4, products and rounding of bfloat16."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """To be called before a kernel runs."""
    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        # NumPy 2.4 has no int(x) of an array of one element, which loops ask for.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        # The interpreter cuts the lower half off; a GPU rounds to the nearest, ties to even.
        bits = data.astype(np.float32).view(np.uint32)
        upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), upper)

    def create_dot(self, a, b, d, *rest):
        # It would multiply the bits of bfloat16 numbers.
        a, b = (
            interpreter.TensorHandle(
                convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
            )
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return multiply(self, a, b, d, *rest)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = create_dot
