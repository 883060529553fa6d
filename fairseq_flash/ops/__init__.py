"""Pure functions of tensors: the attention of FLASH, with no parameters and no fairseq.

Letters in shapes: b batch, n length, m another length, g chunk (p an earlier one), c chunk size, i query and
j key position in a chunk, d model dimension, e expanded dimension, s query/key dimension of the single head,
h copies made by offset-scale, r size of one head where there are several.
"""

from fairseq_flash.ops.backend import BACKENDS, check_backend
from fairseq_flash.ops.chunk_state import ChunkState, mixed_chunk_step
from fairseq_flash.ops.cross import cross_attention
from fairseq_flash.ops.linear import (
    LINEAR_NORMS,
    chunk_summaries,
    exclusive_sum,
    linear_attention,
    linear_denominator,
)
from fairseq_flash.ops.mixed_chunk import mixed_chunk_attention
from fairseq_flash.ops.positions import (
    apply_rotary,
    rotary,
    rotary_angles,
    rotary_bias,
    scaled_sin,
    toeplitz_bias,
)
from fairseq_flash.ops.quadratic import NEVER, QuadraticState, quadratic_attention
from fairseq_flash.ops.softmax import softmax_attention

__all__ = [
    "BACKENDS",
    "LINEAR_NORMS",
    "NEVER",
    "ChunkState",
    "QuadraticState",
    "apply_rotary",
    "check_backend",
    "chunk_summaries",
    "cross_attention",
    "exclusive_sum",
    "linear_attention",
    "linear_denominator",
    "mixed_chunk_attention",
    "mixed_chunk_step",
    "quadratic_attention",
    "rotary",
    "rotary_angles",
    "rotary_bias",
    "scaled_sin",
    "softmax_attention",
    "toeplitz_bias",
]
