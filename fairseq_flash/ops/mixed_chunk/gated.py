"""Everything that a unit does between its two dense layers: what fast implementations do in one go."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import distributed
from torch.utils.checkpoint import checkpoint

from fairseq_flash.ops.dispatch import choose
from fairseq_flash.ops.mixed_chunk.inputs import Carry, Inputs, Options, Pair, check_options
from fairseq_flash.ops.mixed_chunk.reference import blanked, on_grid, part_summary, to_chunks
from fairseq_flash.ops.mixed_chunk.sharded import check_part, kept_of_parts, seen_elsewhere
from fairseq_flash.ops.projections import rotated_copies, split_silu

__all__ = ["Projected", "gated_mixed_chunk", "objections", "run"]


class Projected(NamedTuple):
    """Pre-activations, and what turns them into queries and keys.

    Attributes:
        uvz: Output of the dense layer, before SiLU, in the order u, v, z: ``(b, n, 2e + s)``.
        gamma: Of the offset-scale, ``(h, s)``, in the order ``q_quad``, ``k_quad``, ``q_lin``, ``k_lin``, of
            the branches there are.
        beta: Likewise.
        cos: Rotary cosines, ``(n, s/2)`` or ``(b, n, s/2)``, float32 or wider.
        sin: Rotary sines, likewise.
        bias: Relative position bias, ``(min(c, n), min(c, n))``; None without a quadratic branch.
        lengths: Valid tokens of each row, ``(b,)``, all padding trails; None for ``n``.
        keys: Base of the keys, before SiLU, ``(b, n, s)``, where it is another than that of the queries, as
            :func:`~fairseq_flash.ops.shifted` makes it; None for ``z``.
    """

    uvz: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    bias: Optional[torch.Tensor]
    lengths: Optional[torch.Tensor] = None
    keys: Optional[torch.Tensor] = None

    @property
    def key_base(self) -> Optional[torch.Tensor]:
        """The base of the keys after SiLU; None where it is that of the queries."""
        return None if self.keys is None else torch.nn.functional.silu(self.keys)


def gated_mixed_chunk(
    projected: Projected,
    options: Options,
    *,
    carry: Optional[Carry] = None,
    group: Optional[distributed.ProcessGroup] = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Mixed chunk attention from pre-activations, gated.

    .. math::
        u, v, z = \mathrm{split}(\mathrm{silu}(uvz)), \quad
        q_h, k_h = \mathrm{rope}(\gamma_h z + \beta_h), \quad
        u \odot \mathrm{attention}(q, k, v)

    Args:
        projected: The tensors.
        options: Without softmax and dropout.
        carry: What the linear branch sees beside these rows; None at the start of a row. The rows then start
            at a chunk.
        group: In place of a carry, the processes that hold the parts of these rows, in their order; each is
            whole chunks long, and padding trails the whole row. All call at the same time.
        backend: ``"auto"`` for the first implementation in :mod:`~fairseq_flash.ops.dispatch` that can run,
            or a name, which insists.

    Returns:
        ``(b, n, e)`` in the dtype of ``uvz``, finite and meaningless at padding.

    Raises:
        ValueError: sizes do not fit together, ``linear_norm`` is unknown or not for these rows, the backend
            cannot run, a part is not of whole chunks, or a carry and a group are both given.

    Source: Hua et al. 2022, sections 3.1 and 3.2.
    """
    copies = 2 * len(options.branches)
    if projected.gamma.shape[0] != copies or projected.uvz.shape[-1] <= projected.gamma.shape[1]:
        raise ValueError(
            f"gamma has shape {tuple(projected.gamma.shape)} and uvz {tuple(projected.uvz.shape)}; allowed "
            f"for branches {', '.join(options.branches)}: ({copies}, s) and (b, n, 2e + s)"
        )
    check_options(options)
    run = choose(backend, projected, options)
    if group is not None:
        if carry is not None:
            raise ValueError("carry and group are both given; allowed is one of them")
        check_part(projected.uvz.shape[1], options.chunk_size, group)
        carry = _from_others(projected, options, group)
    return run(projected, options, carry)


def objections(projected: Projected, options: Options) -> list[str]:
    """Why the reference cannot run: it always can."""
    return []


def _from_others(projected: Projected, options: Options, group: distributed.ProcessGroup) -> Optional[Carry]:
    if "lin" not in options.branches:
        return None
    n, lengths = projected.uvz.shape[1], projected.lengths
    # Computed again in the backward pass, as all implementations but the reference do with what is cheap.
    kv_sum = checkpoint(_summary, projected, options, use_reentrant=False, preserve_rng_state=False)
    count = n if lengths is None else lengths
    return seen_elsewhere(kv_sum, count, options.causal, group, kept_of_parts(options, n, kv_sum))


def _summary(projected: Projected, options: Options) -> torch.Tensor:
    """``k^T v`` of the linear branch over whole rows: (b, s, e)."""
    uvz, gamma, beta, cos, sin, _, lengths, _ = projected
    s, keys = gamma.shape[1], projected.key_base
    e = (uvz.shape[2] - s) // 2
    v, z = split_silu(uvz[..., e:], [e, s])
    k = rotated_copies(z if keys is None else keys, gamma[-1:], beta[-1:], cos, sin)[0]
    return part_summary(k, v, lengths, options)


def run(projected: Projected, options: Options, carry: Optional[Carry]) -> torch.Tensor:
    """The reference: the pieces one after the other."""
    n, s = projected.uvz.shape[1], projected.gamma.shape[1]
    e, c = (projected.uvz.shape[2] - s) // 2, options.chunk_of(n)
    u, v, z = split_silu(projected.uvz, [e, e, s])
    copies = rotated_copies(z, *projected[1:5], projected.key_base)
    # Cut into chunks once, all copies together.
    pairs = (Pair(q, k) for q, k in to_chunks(copies, c).unflatten(0, (-1, 2)))
    branches = dict(zip(options.branches, pairs, strict=True))
    v = to_chunks(blanked(v, projected.lengths), c)
    grid = Inputs(branches.get("quad"), branches.get("lin"), v, projected.bias, projected.lengths)
    return u * on_grid(grid, options, carry, n)
