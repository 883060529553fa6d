"""Mixed chunk attention: quadratic inside the chunk, linear across chunks; README.md derives it."""

from __future__ import annotations

from typing import Optional

import torch
from torch import distributed

from fairseq_flash.ops.mixed_chunk.gated import Projected, gated_mixed_chunk
from fairseq_flash.ops.mixed_chunk.inputs import Carry, Inputs, Options, Pair, check_options
from fairseq_flash.ops.mixed_chunk.piece import gated_mixed_chunk_piece
from fairseq_flash.ops.mixed_chunk.reference import continued, part_summary, whole
from fairseq_flash.ops.mixed_chunk.sharded import (
    check_part,
    from_previous,
    gathered,
    kept_of_parts,
    seen_elsewhere,
)
from fairseq_flash.ops.mixed_chunk.state import ChunkState
from fairseq_flash.ops.mixed_chunk.step import gated_mixed_chunk_step, mixed_chunk_step

__all__ = [
    "Carry",
    "ChunkState",
    "Inputs",
    "Options",
    "Pair",
    "Projected",
    "check_options",
    "check_part",
    "from_previous",
    "gated_mixed_chunk",
    "gated_mixed_chunk_piece",
    "gated_mixed_chunk_step",
    "gathered",
    "mixed_chunk_attention",
    "mixed_chunk_step",
]


def mixed_chunk_attention(
    inputs: Inputs,
    options: Options,
    *,
    state: Optional[ChunkState] = None,
    carry: Optional[Carry] = None,
    group: Optional[distributed.ProcessGroup] = None,
) -> tuple[torch.Tensor, Optional[ChunkState]]:
    r"""Attends inside the chunk and, linearly, to other chunks.

    .. math::
        \hat V_g = \mathrm{relu}^2\bigl(Q^{quad}_g {K^{quad}_g}^\top / c + B\bigr) V_g
            + Q^{lin}_g \Bigl(\sum_{p<g} {K^{lin}_p}^\top V_p\Bigr) / c

    The sum runs over strictly earlier chunks if causal, over all chunks if not.

    Args:
        inputs: Queries, keys and values; the branches that are None are not computed.
        options: What is fixed when a layer is built.
        state: What came before, for causal attention; None at the start of a row if no state is wanted back.
        carry: In place of a state, what the linear branch sees beside these rows, which start at a chunk.
        group: In place of either, the processes that hold the parts of these rows, in their order; each is
            whole chunks long, and padding trails the whole row. All call at the same time.

    Returns:
        ``(b, n, e)`` in the dtype of the values, not yet gated, finite and meaningless at padding; and the
        state after the last valid token of each row, None if none came in.

    Raises:
        ValueError: neither branch has queries, a state, softmax attention or a fading mean without
            ``causal``, two of state, carry and group, a part that is not of whole chunks, or ``linear_norm``
            is unknown.

    Source: Hua et al. 2022, section 3.2, mixed chunk attention.
    """
    if inputs.quad is None and inputs.lin is None:
        raise ValueError("quad and lin are both None; one branch is needed")
    if options.softmax and not options.causal:
        raise ValueError("softmax=True with causal=False is not allowed; allowed: causal=True")
    check_options(options)
    if group is not None:
        if state is not None or carry is not None:
            raise ValueError("group is given with a state or a carry; allowed is one of them")
        check_part(inputs.v.shape[1], options.chunk_size, group)
        carry = _from_others(inputs, options, group)
    if state is None:
        return whole(inputs, options, carry), None
    if not options.causal:
        raise ValueError("state is given with causal=False; only causal attention can be continued")
    if carry is not None:
        raise ValueError("state and carry are both given; allowed is one of them, as a state holds its sum")
    return continued(inputs, options, state)


def _from_others(inputs: Inputs, options: Options, group: distributed.ProcessGroup) -> Optional[Carry]:
    if inputs.lin is None:
        return None
    n = inputs.v.shape[1]
    kv_sum = part_summary(inputs.lin.k, inputs.v, inputs.lengths, options)
    count, kept = n if inputs.lengths is None else inputs.lengths, kept_of_parts(options, n, kv_sum)
    return seen_elsewhere(kv_sum, count, options.causal, group, kept)
