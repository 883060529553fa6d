"""The gated attention unit: attention inside a gated linear unit, instead of attention and feed-forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

import torch
from torch import nn

from fairseq_flash.modules.normalization import build_norm
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.modules.positions import RotaryBias, ToeplitzBias, build_relative_bias
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
    quadratic_attention,
)

__all__ = ["ATTENTIONS", "INITS", "GatedAttentionUnit", "check_choice"]

#: Attention kinds, each with the branches it computes.
ATTENTIONS = {"mixed_chunk": ("quad", "lin"), "quadratic": ("quad",), "local": ("quad",), "global": ("lin",)}

#: Starts of the weights: all branches and gradients of a like size, or the paper's N(0, 0.02).
INITS = ("fan_in", "paper")


class GatedAttentionUnit(nn.Module):
    r"""One layer of FLASH, :math:`y = x + (u \odot \mathrm{attention}(q, k, v)) W_o`, with a residual.

    :math:`u, v, z = \mathrm{split}(\mathrm{silu}(\mathrm{norm}(x) W + \mathrm{bias}))`; queries and keys are
    offset-scaled, rotated copies of ``z``. What a token gets depends only on what it may see, never on the
    length of the row, of the batch or of the padding.

    Args:
        embed_dim: ``d``.
        attention: ``"mixed_chunk"`` (FLASH), ``"quadratic"`` (FLASH-Quad), ``"local"`` (quadratic branch
            inside the chunk alone) or ``"global"`` (linear branch across chunks alone).
        expansion_factor: ``e = expansion_factor * d``.
        attention_dim: ``s``, even.
        chunk_size: ``c``; unused by ``"quadratic"``.
        causal: Whether a token sees only tokens before it.
        linear_norm: ``"chunk"`` or ``"mean"``: what the linear branch is divided by.
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        relative_bias: ``"rotary"``, or ``"toeplitz"``, a table that limits the length of a chunk, or of a row
            if attention is ``"quadratic"``, to ``c`` or ``n_ref``; None for rotary.
        n_ref: Length that causal quadratic scores are divided by; needed for ``"quadratic"`` and fixed for
            the life of the weights. Bidirectional scores are divided by the valid tokens of the row.
        init: ``"fan_in"``, under which all branches and gradients start at a like size, or ``"paper"``.
        dropout: Of the branch's output, 0 to below 1.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: an argument has a value that is not allowed, or the backend cannot run.

    Source: Hua et al. 2022, sections 3.1 and 3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        attention: str = "mixed_chunk",
        expansion_factor: int = 2,
        attention_dim: int = 128,
        chunk_size: int = 256,
        causal: bool = True,
        linear_norm: str = "mean",
        norm: str = "layernorm",
        relative_bias: Optional[str] = None,
        n_ref: Optional[int] = None,
        init: str = "fan_in",
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        check_choice("linear_norm", linear_norm, LINEAR_NORMS)
        check_choice("init", init, INITS)
        check_backend(backend)
        sizes = dict(
            embed_dim=embed_dim,
            expansion_factor=expansion_factor,
            attention_dim=attention_dim,
            chunk_size=chunk_size,
        )
        if attention == "quadratic":
            sizes["n_ref"] = n_ref
        for name, size in sizes.items():
            if size is None or size < 1:
                raise ValueError(f"{name}={size} is not allowed; allowed: 1 or more")
        if attention_dim % 2:
            raise ValueError(f"attention_dim={attention_dim} is odd; rotary positions need an even number")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not allowed; allowed: 0 to below 1")
        self.attention, self.causal, self.linear_norm, self.backend = attention, causal, linear_norm, backend
        self.branches = ATTENTIONS[attention]
        self.attention_dim, self.chunk_size = attention_dim, chunk_size
        self.expanded_dim = expansion_factor * embed_dim
        self.norm = build_norm(norm, embed_dim)
        self.uvz = nn.Linear(embed_dim, 2 * self.expanded_dim + attention_dim)
        self.offset_scale = OffsetScale(attention_dim, 2 * len(self.branches))
        self.out = nn.Linear(self.expanded_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.bias = None
        if "quad" in self.branches:
            limit = n_ref if attention == "quadratic" else chunk_size
            self.bias = build_relative_bias(relative_bias or "rotary", limit, attention_dim)
        if attention == "quadratic":
            self.register_buffer("n_ref", torch.tensor(0))
            self.set_n_ref(n_ref)
        self._reset_parameters(init)

    def set_n_ref(self, n_ref: int) -> None:
        """Changes what causal scores are divided by, and where a table ends, before loading weights."""
        self.n_ref.fill_(n_ref)
        # Read once here: the buffer may lie on a device.
        self._denominator = float(n_ref)
        if isinstance(self.bias, ToeplitzBias) and self.bias.limit != n_ref:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # Wrapped for several processes, the old table would go on being the one that is averaged.
                raise ValueError(
                    f"the table of relative_bias='toeplitz' ends at {self.bias.limit}, the checkpoint's at "
                    f"{n_ref}; allowed in several processes: n_ref={n_ref}"
                )
            self.bias = ToeplitzBias(n_ref).to(self.bias.table)

    def empty_state(self, like: torch.Tensor) -> LayerState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device.

        Raises:
            ValueError: the layer is bidirectional.
        """
        if not self.causal:
            raise ValueError("a bidirectional layer has no state; allowed: causal=True")
        if self.attention == "quadratic":
            return QuadraticState.empty(like, self.attention_dim, self.expanded_dim)
        return ChunkState.empty(
            like,
            self.chunk_size,
            self.attention_dim,
            self.expanded_dim,
            quadratic="quad" in self.branches,
            linear="lin" in self.branches,
        )

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
            ValueError: padding in the middle of a row, a state for a bidirectional layer, or a row beyond the
                table of a Toeplitz bias.
        """
        aligned = rows is not None
        if not aligned:
            start = None if state is None else state.position
            x, rows = align_rows(x, padding_mask, start, self.attention_dim, x.dtype)
        u, v, z = self._uvz(x)
        copies = self.copies(z, rows)
        if self.attention == "quadratic":
            out, state = self._quadratic(copies, v, rows, state)
        else:
            out, state = self._chunked(copies, v, rows, state)
        y = x + self.dropout(self.out(u * out))
        return (y if aligned else restore_rows(y, rows)), state

    def _reset_parameters(self, init: str) -> None:
        for linear in (self.uvz, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if init == "fan_in":
            # The paper's 0.02 starts the linear branch at 1/100 of the quadratic one, and both near zero.
            for linear in (self.uvz, self.out):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if "lin" in self.branches:
                nn.init.normal_(self.offset_scale.gamma[-2:], std=0.1)
            if isinstance(self.bias, RotaryBias):
                self.bias.start_near()

    def _uvz(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes = [self.expanded_dim, self.expanded_dim, self.attention_dim]
        return nn.functional.silu(self.uvz(self.norm(x))).split(sizes, dim=-1)

    def copies(self, z: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Queries and keys of each branch, from the base ``(b, n, s)``: ``(h, b, n, s)``, rotated."""
        return apply_rotary(self.offset_scale(z), rows.cos, rows.sin)

    def _chunked(self, copies, v, rows, state):
        pairs = dict(zip(self.branches, copies.unflatten(0, (-1, 2)), strict=True))
        q_quad, k_quad = pairs.get("quad", (None, None))
        q_lin, k_lin = pairs.get("lin", (None, None))
        # The step overwrites the state, which activation checkpointing needs again for the backward pass.
        if state is not None and v.shape[1] == 1 and rows.padding_mask is None and not self.training:
            bias = None
            if self.bias is not None:
                slot = (state.position % self.chunk_size).unsqueeze(1)
                bias = self.bias(slot, torch.arange(self.chunk_size, device=v.device))
            options = dict(linear_norm=self.linear_norm, state=state, backend=self.backend)
            return mixed_chunk_step(q_quad, k_quad, q_lin, k_lin, v, bias, **options)
        length = self.chunk_size if state is not None else min(self.chunk_size, v.shape[1])
        return mixed_chunk_attention(
            q_quad,
            k_quad,
            q_lin,
            k_lin,
            v,
            None if self.bias is None else self.bias.square(length),
            causal=self.causal,
            chunk_size=self.chunk_size,
            linear_norm=self.linear_norm,
            padding_mask=rows.padding_mask,
            state=state,
            backend=self.backend,
        )

    def _quadratic(self, copies, v, rows, state):
        q, k = copies
        if state is not None:
            return self._quadratic_continued(q, k, v, rows, state)
        denominator = self._denominator
        if rows.padding_mask is not None:
            v = v.masked_fill(rows.padding_mask.unsqueeze(-1), 0)
        if not self.causal:
            denominator = torch.full(v.shape[:1], float(v.shape[1]), device=v.device)
            if rows.padding_mask is not None:
                denominator = (~rows.padding_mask).sum(1).clamp(min=1)
        out = quadratic_attention(
            q.unsqueeze(1),
            k.unsqueeze(1),
            v.unsqueeze(1),
            self.bias.square(v.shape[1]),
            causal=self.causal,
            denominator=denominator,
            backend=self.backend,
        )
        return out.squeeze(1), None

    def _quadratic_continued(self, q, k, v, rows, state):
        if not self.causal:
            raise ValueError("state is given to a bidirectional layer; allowed: causal=True")
        state = state.extend(k, v, rows.positions, rows.padding_mask)
        k, v, key_positions = state.used()
        if self.bias.limit is not None and k.shape[1] > self.bias.limit:
            # Columns count padding too; only the rows themselves must fit the table.
            self.bias.check_length(int(state.position.max()))
        hidden = ~state.visible(rows.positions)
        bias = self.bias(rows.positions, key_positions).masked_fill(hidden, -torch.inf)
        out = quadratic_attention(
            q.unsqueeze(1),
            k.unsqueeze(1),
            v.unsqueeze(1),
            bias.unsqueeze(1),
            causal=False,
            denominator=self._denominator,
            backend=self.backend,
        )
        return out.squeeze(1), state

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(prefix + "n_ref")
        if self.attention == "quadratic" and stored is not None and int(stored) != int(self.n_ref):
            raise ValueError(
                f"n_ref={int(self.n_ref)} differs from the checkpoint's; allowed: {int(stored)}, the length "
                "that its scores were divided by in training"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuses a ``value`` of the argument ``name`` that is not ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")
