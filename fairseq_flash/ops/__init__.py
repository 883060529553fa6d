"""Pure functions of tensors: the attention of FLASH, with no parameters and no fairseq.

Letters in shapes: b batch, n length, m another length, g chunk (p an earlier one), c chunk size, i query and
j key position in a chunk, d model dimension, e expanded dimension, s query/key dimension of the single head,
h copies made by offset-scale, r size of one head where there are several.
"""

from fairseq_flash.ops.cross import cross_attention
from fairseq_flash.ops.dispatch import BACKENDS, check_backend
from fairseq_flash.ops.mixed_chunk import (
    Carry,
    ChunkState,
    Inputs,
    Options,
    Pair,
    Projected,
    check_options,
    check_part,
    from_previous,
    gated_mixed_chunk,
    gated_mixed_chunk_piece,
    gated_mixed_chunk_step,
    gathered,
    mixed_chunk_attention,
    mixed_chunk_step,
)
from fairseq_flash.ops.mixed_chunk.linear import (
    LINEAR_NORMS,
    chunk_summaries,
    exclusive_sum,
    kept_of_chunks,
    linear_attention,
    linear_denominator,
)
from fairseq_flash.ops.positions import (
    apply_rotary,
    check_even,
    rotary,
    rotary_angles,
    rotary_bias,
    rotary_bias_by_distance,
    scaled_sin,
    toeplitz_bias,
    trailing_padding,
)
from fairseq_flash.ops.precision import widened
from fairseq_flash.ops.projections import offset_scale, rotated_copies, shifted, split_silu
from fairseq_flash.ops.quadratic import NEVER, KeyValueCache, quadratic_attention, quadratic_scores
from fairseq_flash.ops.softmax import softmax_attention

__all__ = [
    "BACKENDS",
    "LINEAR_NORMS",
    "NEVER",
    "Carry",
    "ChunkState",
    "Inputs",
    "KeyValueCache",
    "Options",
    "Pair",
    "Projected",
    "apply_rotary",
    "check_backend",
    "check_even",
    "check_options",
    "check_part",
    "chunk_summaries",
    "cross_attention",
    "exclusive_sum",
    "from_previous",
    "gated_mixed_chunk",
    "gated_mixed_chunk_piece",
    "gated_mixed_chunk_step",
    "gathered",
    "kept_of_chunks",
    "linear_attention",
    "linear_denominator",
    "mixed_chunk_attention",
    "mixed_chunk_step",
    "offset_scale",
    "quadratic_attention",
    "quadratic_scores",
    "rotary",
    "rotary_angles",
    "rotary_bias",
    "rotary_bias_by_distance",
    "rotated_copies",
    "scaled_sin",
    "shifted",
    "softmax_attention",
    "split_silu",
    "toeplitz_bias",
    "trailing_padding",
    "widened",
]
