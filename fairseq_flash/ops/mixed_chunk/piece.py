"""A piece of a row that begins a chunk: what implementations of whole rows do, and the state behind it."""

from __future__ import annotations

import torch

from fairseq_flash.ops.mixed_chunk.gated import Projected, gated_mixed_chunk
from fairseq_flash.ops.mixed_chunk.inputs import Options
from fairseq_flash.ops.mixed_chunk.linear import kept_of_chunks
from fairseq_flash.ops.mixed_chunk.state import ChunkState
from fairseq_flash.ops.projections import rotated_copies, split_silu

__all__ = ["gated_mixed_chunk_piece"]


def gated_mixed_chunk_piece(
    projected: Projected, options: Options, state: ChunkState, *, backend: str = "auto"
) -> tuple[torch.Tensor, ChunkState]:
    """Causal :func:`~fairseq_flash.ops.gated_mixed_chunk` of rows that go on where a chunk begins.

    Args:
        projected: Of one token or more, without lengths.
        options: Causal; of its chunk size are the rings.
        state: What came before, in each row a multiple of ``c`` tokens, which nobody checks.
        backend: As for whole rows.

    Returns:
        ``(b, n, e)``, gated, and the state after the last token.

    Raises:
        ValueError: as for whole rows.
    """
    s = projected.gamma.shape[1]
    e = (projected.uvz.shape[2] - s) // 2
    kept = kept_of_chunks(options.linear_norm, e, projected.uvz.device)
    carry = state.carry_at_border(kept) if "lin" in options.branches else None
    out = gated_mixed_chunk(projected, options, carry=carry, backend=backend)
    v, z = split_silu(projected.uvz[..., e:], [e, s])
    keys = z if projected.keys is None else projected.key_base
    found = rotated_copies(keys, projected.gamma[1::2], projected.beta[1::2], projected.cos, projected.sin)
    of = dict(zip(options.branches, found, strict=True))
    return out, state.after_border(of.get("quad"), of.get("lin"), v, kept)
