"""Embeddings, blocks and final norm: the body that all models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import distributed, nn

from fairseq_flash.modules.alignment import Rows, align_rows, restore_rows
from fairseq_flash.modules.checks import (
    check_flags,
    check_instance,
    check_numbers,
    check_rates,
    check_shared,
    check_sizes,
    check_tensor,
    require,
)
from fairseq_flash.modules.layer import Layer
from fairseq_flash.modules.normalization import build_norm
from fairseq_flash.modules.positions import ScaledSin
from fairseq_flash.modules.state import DecodingState, check_state
from fairseq_flash.ops import ChunkState

__all__ = ["Stack"]

#: Tokens of a prompt that are read at a time.
PIECE = 4096
#: Pieces that are read as one on a GPU, those of all rows counted.
GPU_PIECES = 8


class Stack(nn.Module):
    """Token embedding, blocks, final norm.

    Every row is aligned on its first real token, so that positions and chunks count from it.

    Args:
        embed_tokens: From tokens ``(b, n)`` to ``(b, n, d)``.
        blocks: Layers called as :class:`~fairseq_flash.modules.GatedAttentionUnit` is.
        embed_dim: ``d``, even.
        attention_dim: ``s`` of the blocks, or the size of a head where there are several.
        norm: Of the final norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        scaled_sin: Whether to add absolute positions to the embedding, as the paper does; the blocks know
            relative positions without.
        embed_scale: Factor of the token embeddings.
        dropout: Of the embeddings, 0 to below 1.

    Raises:
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        embed_tokens: nn.Module,
        blocks: list[Layer],
        *,
        embed_dim: int,
        attention_dim: int,
        norm: str = "layernorm",
        scaled_sin: bool = False,
        embed_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_instance("embed_tokens", embed_tokens, nn.Module)
        check_sizes(embed_dim=embed_dim, attention_dim=attention_dim)
        check_flags(scaled_sin=scaled_sin)
        check_rates(dropout=dropout)
        check_numbers(embed_scale=embed_scale)
        _check_blocks(blocks, embed_dim=embed_dim, attention_dim=attention_dim)
        self.embed_tokens = embed_tokens
        self.embed_positions = ScaledSin(embed_dim) if scaled_sin else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = build_norm(norm, embed_dim)
        self.embed_dim, self.attention_dim, self.embed_scale = embed_dim, attention_dim, embed_scale
        self._description: Optional[tuple[torch.dtype, DecodingState]] = None

    def empty_state(self, like: torch.Tensor, **source: Optional[torch.Tensor]) -> DecodingState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in device, in the weights' dtype.

        Args:
            like: Tells rows and device.
            source: As for :meth:`forward`; the state holds it from here on.

        Returns:
            The state.

        Raises:
            ValueError: the blocks are bidirectional.
        """
        self._described()
        rows = torch.empty(like.shape[0], 0, dtype=self._dtype(), device=like.device)
        return DecodingState(tuple(block.empty_state(rows, **source) for block in self.blocks))

    def forward(
        self,
        tokens: torch.Tensor,
        padding_mask: Optional[torch.Tensor] = None,
        state: Optional[DecodingState] = None,
        *,
        group: Optional[distributed.ProcessGroup] = None,
        **source: Optional[torch.Tensor],
    ) -> tuple[torch.Tensor, Optional[DecodingState]]:
        """Turns tokens into features.

        Args:
            tokens: Indices, ``(b, n)``.
            padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding.
            state: What came before, from :meth:`empty_state` or an earlier call; None for whole rows.
                Outside of autograd its tensors may be overwritten: use only the state that comes back.
            group: The processes that each hold a part of the rows, as for :class:`Layer`; None for whole
                rows.
            source: ``source`` and ``source_padding_mask`` of blocks that are
                :class:`~fairseq_flash.modules.DecoderLayer`, unless there is a state; of others, nothing.

        Returns:
            ``(b, n, d)``, zero at padding, and the state after each row's last real token, None if none came
            in.

        Raises:
            ValueError: tokens that are none or not in the dictionary (on a CPU), padding in the middle of a
                row, a row beyond the table of a Toeplitz bias, a state that is not this stack's or not of
                these rows, or a group as for :class:`Layer`.
        """
        return self._features(tokens, padding_mask, state, None, group, source)

    def _features(
        self,
        tokens: torch.Tensor,
        padding_mask: Optional[torch.Tensor],
        state: Optional[DecodingState],
        begins: Optional[int],
        group: Optional[distributed.ProcessGroup],
        source: dict[str, Optional[torch.Tensor]],
    ) -> tuple[torch.Tensor, Optional[DecodingState]]:
        """As :meth:`forward`; ``begins`` as of :class:`Rows`."""
        words = getattr(self.embed_tokens, "num_embeddings", None)
        if words is not None:
            device: torch.device = self.embed_tokens.weight.device  # type: ignore[assignment]
            check_tensor("tokens", tokens, (None, None), [torch.long, torch.int], device)
        if state is not None and not torch.compiler.is_compiling():
            check_state(state, self._described(), tokens)
        if group is not None:
            check_shared(self.blocks, state, tokens.shape[1], group)
        start = None if state is None else state.position
        tokens, rows = align_rows(tokens, padding_mask, start, self.attention_dim, self._dtype(), group)
        rows = rows._replace(begins=begins)
        if words is not None and tokens.is_cpu:
            known = ((tokens >= 0) & (tokens < words)).all()
            require(known, f"tokens has indices out of range; allowed: 0 to {words - 1}")
        x = self.embed_tokens(tokens) * self.embed_scale
        if x.shape[-1] != self.embed_dim:
            found = f"embed_tokens gives vectors of {x.shape[-1]} numbers"
            raise ValueError(f"{found}; allowed: embed_dim={self.embed_dim}")
        if self.embed_positions is not None:
            x = x + self.embed_positions(rows.positions)
        x, state = self.through(self.dropout(x), state, rows, source)
        return restore_rows(self.final_norm(x), rows), state

    def through(
        self,
        x: torch.Tensor,
        state: Optional[DecodingState],
        rows: Rows,
        source: dict[str, Optional[torch.Tensor]],
    ) -> tuple[torch.Tensor, Optional[DecodingState]]:
        """The blocks alone, on aligned vectors ``(b, n, d)``: the vectors and the state after them."""
        layers = []
        for index, block in enumerate(self.blocks):
            x, layer = block(x, state=None if state is None else state.layers[index], rows=rows, **source)
            layers.append(layer)
        return x, None if state is None else DecodingState(tuple(layers))

    @torch.no_grad()
    def read(
        self,
        tokens: torch.Tensor,
        state: Optional[DecodingState] = None,
        *,
        piece: Optional[int] = None,
        use: Callable[[torch.Tensor], None] = lambda features: None,
    ) -> DecodingState:
        """Reads tokens of any number, piece by piece: their number does not enter the memory.

        Args:
            tokens: Indices ``(b, n)``, without padding.
            state: What came before; None for an empty one, from which on pieces of whole chunks are read as
                fast as whole rows.
            piece: Tokens of each row that are read at a time; None for 4096, and on a GPU, for states of
                constant size, for a multiple of it, of all rows together up to 32 768: there the host, not
                their number, decides what a piece takes.
            use: Called with the features ``(b, m, d)`` of each piece, in order.

        Returns:
            The state after the tokens.

        Raises:
            ValueError: as :meth:`forward`, or ``piece`` is below 1.
        """
        begins = 0 if state is None else None
        state = self.empty_state(tokens) if state is None else state
        if piece is None:
            wide = tokens.is_cuda and all(isinstance(layer, ChunkState) for layer in state.layers)
            piece = PIECE * (max(1, GPU_PIECES // max(1, len(tokens))) if wide else 1)
        check_sizes(piece=piece)
        for part in tokens.split(piece, dim=1) if tokens.shape[1] else ():
            features, state = self._features(part, None, state, begins, None, {})
            begins = None if begins is None else begins + part.shape[1]
            use(features)
        return state

    def _described(self) -> DecodingState:
        """An empty state without numbers, made once for each dtype."""
        dtype = self._dtype()
        if self._description is None or self._description[0] != dtype:
            like = torch.empty(1, 0, dtype=dtype, device="meta")
            layers = tuple(block.describe_state(like) for block in self.blocks)
            self._description = dtype, DecodingState(layers)
        return self._description[1]

    def _dtype(self) -> torch.dtype:
        return next(self.final_norm.parameters()).dtype


def _check_blocks(blocks: Any, **sizes: int) -> None:
    check_instance("blocks", blocks, Sequence)
    if not blocks:
        raise ValueError("blocks is empty; allowed: 1 layer or more")
    wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for index, block in enumerate(blocks):
        check_instance(f"blocks[{index}]", block, Layer)
        found = ", ".join(f"{name}={getattr(block, name)}" for name in sizes)
        if found != wanted:
            raise ValueError(f"blocks[{index}] has {found}; allowed: {wanted}, as the stack")
