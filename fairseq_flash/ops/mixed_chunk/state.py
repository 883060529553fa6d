"""What a causal layer remembers between calls: the ring, and all of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch

from fairseq_flash.ops.mixed_chunk.inputs import Carry
from fairseq_flash.ops.mixed_chunk.linear import chunk_summaries, exclusive_sum
from fairseq_flash.ops.precision import widened
from fairseq_flash.ops.shown import shown

__all__ = ["ChunkState", "Grid", "in_columns", "swap"]


class ChunkState(NamedTuple):
    """What a causal layer remembers of each row: constant in size, whatever the position.

    The last ``c`` tokens lie in a ring: the token at position ``p`` in slot ``p % c``. Slots before
    ``position % c`` hold the open chunk; those from there on still hold the chunk before it, which
    ``kv_sum`` takes up slot by slot as they are overwritten. So a step does the same work at every position,
    with no branch and no flush.

    Attributes:
        kv_sum: Sum of ``k_lin^T v`` over the tokens that left the ring, ``(b, s, e)``, float32 or wider; None
            without a linear branch. A fading one fades when the first token of a chunk comes.
        k_quad: Quadratic keys in the ring, ``(b, c, s)``; None without a quadratic branch.
        k_lin: Linear keys in the ring, ``(b, c, s)``; None without a linear branch.
        v: Values in the ring, ``(b, c, e)``.
        position: Valid tokens so far, ``(b,)``.
        before: Base of the last token, before SiLU, ``(b, 1, s)``; None without shifted keys.
    """

    kv_sum: Optional[torch.Tensor]
    k_quad: Optional[torch.Tensor]
    k_lin: Optional[torch.Tensor]
    v: torch.Tensor
    position: torch.Tensor
    before: Optional[torch.Tensor] = None

    def __repr__(self) -> str:
        return shown(self)

    @classmethod
    def empty(
        cls,
        like: torch.Tensor,
        chunk_size: int,
        attention_dim: int,
        expanded_dim: int,
        branches: tuple[str, ...] = ("quad", "lin"),
    ) -> ChunkState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device."""
        b, linear = like.shape[0], "lin" in branches
        keys = (b, chunk_size, attention_dim)
        return cls(
            like.new_zeros(b, attention_dim, expanded_dim, dtype=widened(like.dtype)) if linear else None,
            like.new_zeros(keys) if "quad" in branches else None,
            like.new_zeros(keys) if linear else None,
            like.new_zeros(b, chunk_size, expanded_dim),
            torch.zeros(b, dtype=torch.long, device=like.device),
        )

    @property
    def fill(self) -> torch.Tensor:
        """Tokens in the open chunk, and the slot of the next token: ``(b,)``, below ``c``."""
        return self.position % self.v.shape[-2]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ChunkState:
        """Applies ``function`` to every tensor."""
        return ChunkState(*(None if x is None else function(x) for x in self))

    def reorder(self, order: torch.Tensor) -> ChunkState:
        """Picks rows ``order`` ``(b',)``; shares no memory with this state."""
        return self.map(lambda x: x.index_select(0, order))

    def start_anew(self, rows: torch.Tensor) -> ChunkState:
        """Sets the rows that are True in ``rows`` ``(b,)`` back to before their first token."""
        return self.map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), 0))

    def fold(self) -> ChunkState:
        """From rows of several heads ``(b, heads, ...)`` to a row for each head: views but for positions."""
        heads = self.v.shape[1]
        folded = (None if x is None else x.flatten(0, 1) for x in self[:4])
        return ChunkState(*folded, self.position.repeat_interleave(heads))

    def unfold(self, heads: int) -> ChunkState:
        """Undoes :meth:`fold`: views."""
        unfolded = (None if x is None else x.unflatten(0, (-1, heads)) for x in self[:4])
        return ChunkState(*unfolded, self.position[::heads])

    def grid(self, n: int, lengths: Optional[torch.Tensor]) -> Grid:
        """Where ``n`` tokens go, each row from its own slot on.

        Args:
            n: Tokens of the piece.
            lengths: Valid ones of each row, ``(b,)``, all padding trails; None for ``n``.

        Returns:
            Their places, long enough for the fullest open chunk: its length needs no look at the device.
        """
        c, fill = self.v.shape[1], self.fill.unsqueeze(1)
        end = fill + (n if lengths is None else lengths.unsqueeze(1))
        slots = torch.arange(-(-(c - 1 + n) // c) * c, device=fill.device)
        source = torch.where(slots < fill, slots, slots - fill + c)
        return Grid(c, slots, fill, end, torch.where(slots < end, source, c + n))

    def carry(self, grid: Grid, kept: Optional[torch.Tensor] = None) -> Carry:
        """What every chunk of the grid sees: all that left the ring, and the chunk before the open one."""
        rest = (grid.slots[: grid.c] >= grid.fill).unsqueeze(-1)
        left = _faded(self.kv_sum, kept, grid.fill == 0)
        return Carry(left + _ring_summary(self.k_lin, self.v, rest), self.position - grid.fill.squeeze(1))

    def carry_at_border(self, kept: Optional[torch.Tensor]) -> Carry:
        """As :meth:`carry`, of rows whose next token begins a chunk."""
        left = self.kv_sum if kept is None else self.kv_sum * in_columns(kept, self.kv_sum)
        return Carry(left + chunk_summaries(self.k_lin[:, None], self.v[:, None])[:, 0], self.position)

    def after_border(
        self,
        k_quad: Optional[torch.Tensor],
        k_lin: Optional[torch.Tensor],
        v: torch.Tensor,
        kept: Optional[torch.Tensor],
    ) -> ChunkState:
        """The state once a piece without padding has passed, whose first token began a chunk.

        Args:
            k_quad: Quadratic keys of the piece, ``(b, n, s)``; or None.
            k_lin: Linear keys, likewise.
            v: Values, ``(b, n, e)``.
            kept: From :func:`~fairseq_flash.ops.kept_of_chunks`.

        Returns:
            A state that shares no memory with this one, but for ``before``, which is not changed.
        """
        n, c = v.shape[1], self.v.shape[1]

        def ring(old: Optional[torch.Tensor], new: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            """The last c tokens, each in its slot."""
            if old is None:
                return None
            return torch.cat((old, new[:, -c:].to(old.dtype)), dim=1)[:, -c:].roll(n % c, dims=1)

        rings = (ring(self.k_quad, k_quad), ring(self.k_lin, k_lin), ring(self.v, v))
        kv_sum = self.kv_sum
        if kv_sum is not None:
            # The first n tokens of ring and piece leave.
            size, pairs = n if kept is None else c, ((self.k_lin, k_lin), (self.v, v))
            leaving = (torch.cat((old, new.to(old.dtype)), dim=1)[:, :n] for old, new in pairs)
            chunks = (torch.nn.functional.pad(x, (0, 0, 0, -n % size)) for x in leaving)
            kv = chunk_summaries(*(x.unflatten(1, (-1, size)) for x in chunks))
            kv_sum = exclusive_sum(kv, kv_sum, kept)[:, -1].clone()
        return ChunkState(kv_sum, *rings, self.position + n, self.before)

    def after(
        self,
        grid: Grid,
        k_quad: Optional[torch.Tensor],
        k_lin: Optional[torch.Tensor],
        v: torch.Tensor,
        kv_sum: Optional[torch.Tensor],
        kept: Optional[torch.Tensor] = None,
    ) -> ChunkState:
        """The state once the tokens on the grid have passed.

        Args:
            grid: From :meth:`grid`.
            k_quad: Quadratic keys on the grid with the open chunk before them, ``(b, g, c, s)``; or None.
            k_lin: Linear keys, likewise.
            v: Values, likewise, ``(b, g, c, e)``.
            kv_sum: What each chunk of the grid sees, ``(b, g, s, e)``; None without a linear branch.
            kept: From :func:`~fairseq_flash.ops.kept_of_chunks`.

        Returns:
            A state that shares no memory with this one, but for ``before``, which is not changed.
        """
        c = grid.c
        chunk = grid.end // c
        start, slots = chunk * c, grid.slots[:c]
        new_fill = grid.end - start

        def ring(
            old: Optional[torch.Tensor], new: torch.Tensor, first: torch.Tensor
        ) -> Optional[torch.Tensor]:
            """The ring whose slots follow ``first``, of what it held and of the grid."""
            return None if old is None else _take(torch.cat((old, new.flatten(1, 2)), dim=1), first + slots)

        # One index serves every slot: `c` tokens on from a slot of the previous chunk lies its successor.
        new_slot = start + torch.where(slots < new_fill, c, 0)
        position = self.position + (grid.end - grid.fill).squeeze(1)
        rings = (ring(self.k_quad, k_quad, new_slot), ring(self.k_lin, k_lin, new_slot))
        new = ChunkState(None, *rings, ring(self.v, v, new_slot), position, self.before)
        if kv_sum is None:
            return new
        sums = torch.cat((self.kv_sum.unsqueeze(1), kv_sum), dim=1)
        base = sums.gather(1, chunk[:, :, None, None].expand(-1, 1, *sums.shape[2:])).squeeze(1)
        base = _faded(base, kept, (new_fill > 0) & ((chunk > 0) | (grid.fill == 0)))
        # In the first chunk, what lies before `fill` had left the ring before this piece.
        left = (slots < new_fill) & ((chunk > 0) | (slots >= grid.fill))
        leaving = _ring_summary(ring(self.k_lin, k_lin, start), ring(self.v, v, start), left.unsqueeze(-1))
        return new._replace(kv_sum=base + leaving)


class Grid(NamedTuple):
    """Places of a piece of ``n`` tokens in chunks that its rows have begun at different slots.

    Attributes:
        c: Chunk size.
        slots: ``0, 1, ...``, as many as the grid is long, ``(g c,)``.
        fill: First slot of the piece in each row, ``(b, 1)``.
        end: Slot behind the last valid token, ``(b, 1)``.
        source: For each slot its column in ``[ring | piece | zeros]``, ``(b, g c)``.
    """

    c: int
    slots: torch.Tensor
    fill: torch.Tensor
    end: torch.Tensor
    source: torch.Tensor

    def place(self, x: torch.Tensor, ring: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Puts a piece ``(b, n, .)`` behind the open chunk of a ``ring`` ``(b, c, .)``: ``(b, g, c, .)``."""
        b, _, width = x.shape
        ring = x.new_zeros(b, self.c, width) if ring is None else ring
        tokens = torch.cat((ring, x, x.new_zeros(b, 1, width)), dim=1)
        return _take(tokens, self.source).unflatten(1, (-1, self.c))

    def take(self, out: torch.Tensor, n: int) -> torch.Tensor:
        """The ``n`` tokens of the piece, out of ``(b, g, c, .)``: ``(b, n, .)``."""
        return _take(out.flatten(1, 2), self.fill + torch.arange(n, device=out.device))


def in_columns(kept: torch.Tensor, kv_sum: torch.Tensor) -> torch.Tensor:
    """``kept`` of groups ``(h,)`` for the columns of a sum ``(b, s, e)``: ``(e,)`` in its dtype."""
    return kept.repeat_interleave(kv_sum.shape[-1] // len(kept)).to(kv_sum.dtype)


def swap(ring: torch.Tensor, slot: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Puts ``new`` (b, 1, .) into ``slot`` (b, 1, 1) of each row of a ring; returns what lay there."""
    index = slot.expand(-1, 1, ring.shape[2])
    # For the backward pass, gather would keep the ring itself, which is overwritten here.
    old = (ring.clone() if torch.is_grad_enabled() else ring).gather(1, index)
    ring.scatter_(1, index, new.to(ring.dtype))
    return old


def _faded(kv_sum: torch.Tensor, kept: Optional[torch.Tensor], fades: torch.Tensor) -> torch.Tensor:
    """A sum (b, s, e) for the chunk to come, in rows where ``fades`` (b, 1)."""
    if kept is None:
        return kv_sum
    return torch.where(fades.unsqueeze(-1), kv_sum * in_columns(kept, kv_sum), kv_sum)


def _ring_summary(k_lin: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``k^T v`` over the chosen slots (b, c, 1) of a ring: (b, s, e)."""
    return chunk_summaries(k_lin.unsqueeze(1), (v * chosen).unsqueeze(1)).squeeze(1)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Picks columns ``index`` (b, m) of ``x`` (b, n, .), another set for each row."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
