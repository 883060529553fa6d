"""A causal Transformer layer: what FLASH is compared with, on the same rows, states and positions."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from fairseq_flash.modules.gated_attention_unit import ATTENTIONS, INITS, check_choice
from fairseq_flash.modules.normalization import build_norm
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.modules.rows import Rows, align_rows, restore_rows
from fairseq_flash.modules.state import LayerState
from fairseq_flash.ops import (
    LINEAR_NORMS,
    ChunkState,
    QuadraticState,
    apply_rotary,
    check_backend,
    mixed_chunk_attention,
    mixed_chunk_step,
    softmax_attention,
)

__all__ = ["TransformerBlock"]


class TransformerBlock(nn.Module):
    r"""Multi-head attention and a feed-forward network, each with a residual and a norm before it.

    :math:`x' = x + \mathrm{heads}(q, k, v) W_o` with :math:`q, k, v` from :math:`\mathrm{norm}(x)`, and
    :math:`y = x' + f(\mathrm{norm}'(x') W_1) W_2`; queries and keys are rotated. With ``"mixed_chunk"``, each
    head adds to the softmax inside its chunk a linear branch across chunks, whose queries and keys are
    offset-scaled copies (MC-TFM++).

    Args:
        embed_dim: ``d``, a multiple of ``attention_dim``.
        attention: ``"quadratic"`` (softmax over the whole past), ``"mixed_chunk"``, ``"local"`` (softmax
            inside the chunk alone) or ``"global"`` (linear branch alone).
        attention_dim: ``r`` of each of the ``d / r`` heads, even.
        ffn_embed_dim: Width ``f`` of the feed-forward network; None for ``4 d``, or with ``glu``
            ``8 d / 3``, of as many parameters, in steps of 8.
        glu: Whether ``f`` is a gated linear unit, ``silu(a) * b``, in place of ``relu(a)`` (Shazeer 2020).
        chunk_size: ``c``; unused by ``"quadratic"``.
        linear_norm: ``"chunk"`` or ``"mean"``: what the linear branch is divided by.
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        init: ``"fan_in"`` or ``"paper"``, all weights N(0, 0.02).
        dropout: Of each branch's output, 0 to below 1.
        attention_dropout: Of the normalised scores, 0 to below 1.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``, for the linear branch.

    Raises:
        ValueError: an argument has a value that is not allowed, or the backend cannot run.

    Source: Vaswani et al. 2017; Hua et al. 2022, section 4 (Transformer+, Transformer++, MC-TFM++).
    """

    causal = True

    def __init__(
        self,
        embed_dim: int,
        *,
        attention: str = "quadratic",
        attention_dim: int = 64,
        ffn_embed_dim: Optional[int] = None,
        glu: bool = False,
        chunk_size: int = 256,
        linear_norm: str = "mean",
        norm: str = "layernorm",
        init: str = "fan_in",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        check_choice("linear_norm", linear_norm, LINEAR_NORMS)
        check_choice("init", init, INITS)
        check_backend(backend)
        if ffn_embed_dim is None:
            ffn_embed_dim = 8 * -(-embed_dim // 3) if glu else 4 * embed_dim
        sizes = dict(
            embed_dim=embed_dim,
            attention_dim=attention_dim,
            ffn_embed_dim=ffn_embed_dim,
            chunk_size=chunk_size,
        )
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} is not allowed; allowed: 1 or more")
        if attention_dim % 2 or embed_dim % attention_dim:
            raise ValueError(
                f"attention_dim={attention_dim}, the size of a head, is not allowed; allowed: even divisors "
                f"of embed_dim={embed_dim}"
            )
        for name, rate in dict(dropout=dropout, attention_dropout=attention_dropout).items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name}={rate} is not allowed; allowed: 0 to below 1")
        self.attention, self.linear_norm, self.backend, self.glu = attention, linear_norm, backend, glu
        self.branches = ATTENTIONS[attention]
        self.attention_dim, self.heads = attention_dim, embed_dim // attention_dim
        self.chunk_size, self.attention_dropout = chunk_size, attention_dropout
        self.norm, self.ffn_norm = build_norm(norm, embed_dim), build_norm(norm, embed_dim)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.ffn_in = nn.Linear(embed_dim, 2 * ffn_embed_dim if glu else ffn_embed_dim)
        self.ffn_out = nn.Linear(ffn_embed_dim, embed_dim)
        if "lin" in self.branches:
            self.q_scale, self.k_scale = OffsetScale(embed_dim, 1), OffsetScale(embed_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self._reset_parameters(init)

    def empty_state(self, like: torch.Tensor) -> LayerState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device."""
        if self.attention == "quadratic":
            width = self.heads * self.attention_dim
            return QuadraticState.empty(like, width, width)
        r = self.attention_dim
        rows = like.new_empty(like.shape[0] * self.heads, 0)
        quadratic, linear = ("quad" in self.branches), ("lin" in self.branches)
        return self._unfold(ChunkState.empty(rows, self.chunk_size, r, r, quadratic=quadratic, linear=linear))

    def forward(
        self,
        x: torch.Tensor,
        padding_mask: Optional[torch.Tensor] = None,
        state: Optional[LayerState] = None,
        *,
        rows: Optional[Rows] = None,
    ) -> tuple[torch.Tensor, Optional[LayerState]]:
        """Applies the layer.

        Args:
            x: ``(b, n, d)``; anything, even NaN, at padding.
            padding_mask: ``(b, n)``, True at padding, leading or trailing; None without padding.
            state: What came before, from :meth:`empty_state` or an earlier call; None for whole rows.
                Outside of autograd its tensors may be overwritten: use only the state that comes back.
            rows: Geometry of rows that a stack has aligned already, in place of ``padding_mask``.

        Returns:
            ``(b, n, d)``, zero at padding (anything there if ``rows`` was given), and the state after each
            row's last real token, None if none came in.

        Raises:
            ValueError: padding in the middle of a row.
        """
        aligned = rows is not None
        if not aligned:
            start = None if state is None else state.position
            x, rows = align_rows(x, padding_mask, start, self.attention_dim, x.dtype)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        attend = self._quadratic if self.attention == "quadratic" else self._chunked
        out, state = attend(q, k, v, rows, state)
        x = x + self.dropout(self.out(out))
        y = x + self.dropout(self._feed_forward(self.ffn_norm(x)))
        return (y if aligned else restore_rows(y, rows)), state

    def _reset_parameters(self, init: str) -> None:
        for linear in (self.qkv, self.out, self.ffn_in, self.ffn_out):
            nn.init.normal_(linear.weight, std=0.02 if init == "paper" else linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if "lin" in self.branches and init == "fan_in":
            for scale in (self.q_scale, self.k_scale):
                nn.init.normal_(scale.gamma, std=0.3)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.ffn_in(x)
        if self.glu:
            gate, value = hidden.chunk(2, dim=-1)
            return self.ffn_out(nn.functional.silu(gate) * value)
        return self.ffn_out(hidden.relu())

    def _rotated(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(b, n, d) to heads (b, heads, n, r) at their positions."""
        return apply_rotary(self._heads(x), rows.cos.unsqueeze(-3), rows.sin.unsqueeze(-3))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _quadratic(self, q, k, v, rows, state):
        q, k, visible = self._rotated(q, rows), self._rotated(k, rows), None
        if state is not None:
            begins = state.columns == 0
            positions = rows.positions.expand(v.shape[:2])
            state = state.extend(k.transpose(1, 2).flatten(2), v, positions, rows.padding_mask)
            if not begins:
                k, v, _ = state.used()
                k, visible = self._heads(k), state.visible(positions).unsqueeze(1)
        out = softmax_attention(q, k, self._heads(v), visible, dropout=self._attention_dropout())
        return out.transpose(1, 2).flatten(2), state

    def _chunked(self, q, k, v, rows, state):
        # Each head of each row is a row of its own, of which all operations are the same.
        pairs = dict.fromkeys(("quad", "lin"), (None, None))
        if "quad" in self.branches:
            pairs["quad"] = q, k
        if "lin" in self.branches:
            pairs["lin"] = self.q_scale(q)[0], self.k_scale(k)[0]
        inputs = [
            None if x is None else self._rotated(x, rows).flatten(0, 1)
            for x in (*pairs["quad"], *pairs["lin"])
        ]
        inputs += [self._heads(v).flatten(0, 1), None]
        options = dict(linear_norm=self.linear_norm, softmax=True, backend=self.backend)
        if state is not None:
            options["state"] = self._fold(state)
        # The step overwrites the state, which activation checkpointing needs again for the backward pass.
        if state is not None and v.shape[1] == 1 and rows.padding_mask is None and not self.training:
            out, state = mixed_chunk_step(*inputs, **options)
        else:
            padding_mask = rows.padding_mask
            if padding_mask is not None:
                padding_mask = padding_mask.repeat_interleave(self.heads, dim=0)
            out, state = mixed_chunk_attention(
                *inputs,
                causal=True,
                chunk_size=self.chunk_size,
                padding_mask=padding_mask,
                attention_dropout=self._attention_dropout(),
                **options,
            )
        out = out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return out, None if state is None else self._unfold(state)

    def _attention_dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _fold(self, state: ChunkState) -> ChunkState:
        """From rows of several heads, tensors (b, heads, ...), to (b heads, ...): views."""
        folded = (None if x is None else x.flatten(0, 1) for x in state[:-1])
        return ChunkState(*folded, state.position.repeat_interleave(self.heads))

    def _unfold(self, state: ChunkState) -> ChunkState:
        unfolded = (None if x is None else x.unflatten(0, (-1, self.heads)) for x in state[:-1])
        return ChunkState(*unfolded, state.position[:: self.heads])
