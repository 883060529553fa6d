"""A causal Transformer layer: what FLASH is compared with, on the same rows, states and positions."""

from __future__ import annotations

from typing import Optional, Unpack

import torch
from torch import nn

from fairseq_flash.modules.alignment import Rows
from fairseq_flash.modules.attention import LayerState, MixedChunk, Softmax
from fairseq_flash.modules.checks import check_choice, check_flags, check_rates, check_sizes
from fairseq_flash.modules.layer import AttentionLayer, LayerOptions
from fairseq_flash.modules.normalization import build_norm
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.ops import Options, Pair, apply_rotary

__all__ = ["TransformerBlock"]


def default_ffn_embed_dim(embed_dim: int, glu: bool) -> int:
    """Width of the feed-forward network where none is given: 4 d, or about 8 d / 3, equal in parameters."""
    return 8 * -(-embed_dim // 3) if glu else 4 * embed_dim


class TransformerBlock(AttentionLayer):
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
        attention_dropout: Of the normalised scores, 0 to below 1.
        options: ``chunk_size``, ``linear_norm``, ``norm``, ``init``, ``dropout`` and ``backend``, as
            :class:`LayerOptions`; this attention has one implementation, ``"reference"``.

    Raises:
        ValueError: an argument has a value that is not allowed.

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
        attention_dropout: float = 0.0,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__(embed_dim, attention, attention_dim, **options)
        check_choice("backend", self.backend, ("auto", "reference"))
        check_flags(glu=glu)
        if ffn_embed_dim is None:
            ffn_embed_dim = default_ffn_embed_dim(embed_dim, glu)
        check_sizes(ffn_embed_dim=ffn_embed_dim)
        if attention_dim % 2 or embed_dim % attention_dim:
            raise ValueError(
                f"attention_dim={attention_dim}, the size of a head, is not allowed; allowed: even divisors "
                f"of embed_dim={embed_dim}"
            )
        check_rates(attention_dropout=attention_dropout)
        self.glu, self.heads = glu, embed_dim // attention_dim
        if attention == "quadratic":
            self.attend = Softmax(attention_dropout)
        else:
            chunked = Options(self.chunk_size, True, self.linear_norm, True, attention_dropout, self.branches)
            self.attend = MixedChunk(chunked)
        self.ffn_norm = build_norm(self.norm_name, embed_dim)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.ffn_in = nn.Linear(embed_dim, 2 * ffn_embed_dim if glu else ffn_embed_dim)
        self.ffn_out = nn.Linear(ffn_embed_dim, embed_dim)
        if "lin" in self.branches:
            self.q_scale, self.k_scale = OffsetScale(embed_dim, 1), OffsetScale(embed_dim, 1)
        self._reset_parameters()

    def empty_state(self, like: torch.Tensor) -> LayerState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device."""
        if self.attention == "quadratic":
            width = self.heads * self.attention_dim
            return self.attend.empty_state(like, width, width)
        folded = like.new_empty(like.shape[0] * self.heads, 0)
        return self.attend.empty_state(folded, self.attention_dim, self.attention_dim).unfold(self.heads)

    def aligned(
        self, x: torch.Tensor, rows: Rows, state: Optional[LayerState]
    ) -> tuple[torch.Tensor, Optional[LayerState]]:
        """As :meth:`Layer.aligned`."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        out, state = self.attend(self._pairs(q, k, rows), self._heads(v), None, rows, state, self.training)
        x = x + self.dropout(self.out(out.transpose(1, 2).flatten(2)))
        return x + self.dropout(self._feed_forward(self.ffn_norm(x))), state

    def _reset_parameters(self) -> None:
        for linear in (self.qkv, self.out, self.ffn_in, self.ffn_out):
            nn.init.normal_(linear.weight, std=0.02 if self.init == "paper" else linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if "lin" in self.branches and self.init == "fan_in":
            for scale in (self.q_scale, self.k_scale):
                nn.init.normal_(scale.gamma, std=0.3)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.ffn_in(x)
        if self.glu:
            gate, value = hidden.chunk(2, dim=-1)
            return self.ffn_out(nn.functional.silu(gate) * value)
        return self.ffn_out(hidden.relu())

    def _pairs(self, q: torch.Tensor, k: torch.Tensor, rows: Rows) -> tuple[Optional[Pair], Optional[Pair]]:
        quad = lin = None
        if "quad" in self.branches:
            quad = Pair(self._rotated(q, rows), self._rotated(k, rows))
        if "lin" in self.branches:
            lin = Pair(self._rotated(self.q_scale(q)[0], rows), self._rotated(self.k_scale(k)[0], rows))
        return quad, lin

    def _rotated(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(b, n, d) to heads (b, heads, n, r) at their positions."""
        return apply_rotary(self._heads(x), rows.cos.unsqueeze(-3), rows.sin.unsqueeze(-3))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
