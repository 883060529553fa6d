"""The gated attention unit: attention inside a gated linear unit, instead of attention and feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional, Union, Unpack

import torch
from torch import nn

from fairseq_flash.modules.alignment import Rows
from fairseq_flash.modules.attention import LayerState, MixedChunk, Quadratic, is_step
from fairseq_flash.modules.checks import check_backend, check_choice, check_even, check_flags, check_sizes
from fairseq_flash.modules.layer import AttentionLayer, LayerOptions
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.modules.positions import RELATIVE_BIASES, RotaryBias, ToeplitzBias, build_relative_bias
from fairseq_flash.ops import (
    ChunkState,
    Options,
    Pair,
    Projected,
    apply_rotary,
    check_options,
    from_previous,
    quadratic_scores,
    shifted,
    split_silu,
    widened,
)
from fairseq_flash.ops.dispatch import choose

__all__ = ["GatedAttentionUnit"]


class UnitOptions(LayerOptions, total=False):
    """Further keyword arguments of a gated attention unit.

    Attributes:
        shift_keys: Whether half of the columns of the keys are of the token before, so that one layer finds
            what came after an earlier token like this one; False unless given.
    """

    shift_keys: bool


class GatedAttentionUnit(AttentionLayer):
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
        causal: Whether a token sees only tokens before it.
        relative_bias: ``"rotary"``, or ``"toeplitz"``, a table that limits the length of a chunk, or of a row
            if attention is ``"quadratic"``, to ``c`` or ``n_ref``; None for rotary.
        n_ref: Length that causal quadratic scores are divided by; needed for ``"quadratic"`` and fixed for
            the life of the weights. Bidirectional scores are divided by the valid tokens of the row.
        adopt_n_ref: Whether weights that are loaded bring their own ``n_ref``, and the length of its table;
            otherwise another one is an error.
        options: ``shift_keys``, not with ``"quadratic"``, as :class:`UnitOptions`, and ``chunk_size``,
            ``linear_norm``, ``norm``, ``init``, ``dropout`` and ``backend``, as :class:`LayerOptions`; of
            quadratic attention there is one implementation, ``"reference"``.

    Raises:
        ValueError: an argument has a value that is not allowed.

    Source: Hua et al. 2022, sections 3.1 and 3.2; shifted keys: :func:`~fairseq_flash.ops.shifted`.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        attention: str = "mixed_chunk",
        expansion_factor: int = 2,
        attention_dim: int = 128,
        causal: bool = True,
        relative_bias: Optional[str] = None,
        n_ref: Optional[int] = None,
        adopt_n_ref: bool = False,
        **options: Unpack[UnitOptions],
    ) -> None:
        shift_keys = options.pop("shift_keys", False)
        super().__init__(embed_dim, attention, attention_dim, **options)  # type: ignore[misc]  # is taken out
        quadratic = attention == "quadratic"
        check_backend(self.backend)
        if quadratic:
            check_choice("backend", self.backend, ("auto", "reference"))
        if quadratic or n_ref is not None:
            check_sizes(n_ref=n_ref)
        if relative_bias is None:
            relative_bias = "rotary"
        check_choice("relative_bias", relative_bias, RELATIVE_BIASES)
        check_sizes(expansion_factor=expansion_factor)
        check_even("attention_dim", attention_dim)
        check_flags(causal=causal, adopt_n_ref=adopt_n_ref, shift_keys=shift_keys)
        if shift_keys and attention_dim < 4:
            # Of one rotated pair every second one is none.
            raise ValueError(
                f"attention_dim={attention_dim} with shift_keys=True is not allowed; allowed: 4 or more"
            )
        if shift_keys and quadratic:
            raise ValueError(
                "shift_keys=True with attention='quadratic' is not allowed; allowed: mixed_chunk, local, "
                "global"
            )
        self.shift_keys = shift_keys
        self.causal, self.adopt_n_ref, self.expanded_dim = causal, adopt_n_ref, expansion_factor * embed_dim
        self.uvz = nn.Linear(embed_dim, 2 * self.expanded_dim + attention_dim)
        self.offset_scale = OffsetScale(attention_dim, 2 * len(self.branches))
        self.out = nn.Linear(self.expanded_dim, embed_dim)
        self.bias = None
        if "quad" in self.branches:
            limit = n_ref if quadratic else self.chunk_size
            self.bias = build_relative_bias(relative_bias, limit, attention_dim)
        if quadratic:
            self.attend = Quadratic(causal, n_ref)
        else:
            chunked = Options(self.chunk_size, causal, self.linear_norm, branches=self.branches)
            check_options(chunked)
            self.attend = MixedChunk(chunked, self.backend, gated=True)
        self._reset_parameters()

    @property
    def n_ref(self) -> int:
        """What the scores of causal quadratic attention are divided by; a table ends there."""
        return self.attend.n_ref

    def set_n_ref(self, n_ref: int) -> None:
        """Changes what causal scores are divided by, and where a table ends, before loading weights.

        Raises:
            ValueError: it is no length, or a table would change its own in several processes.
        """
        check_sizes(n_ref=n_ref)
        self.attend = dataclasses.replace(self.attend, n_ref=n_ref)
        if isinstance(self.bias, ToeplitzBias) and self.bias.limit != n_ref:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # Wrapped for several processes, the old table would go on being the one that is averaged.
                raise ValueError(
                    f"the table of relative_bias='toeplitz' ends at {self.bias.limit}, the checkpoint's at "
                    f"{n_ref}; allowed in several processes: n_ref={n_ref}"
                )
            self.bias = ToeplitzBias(n_ref).to(self.bias.table)

    def check_backend_on(self, device: Union[str, torch.device]) -> None:
        """Refuses, before the first pass, a backend that was asked for by name and cannot run on ``device``.

        Raises:
            ValueError: it cannot; the message lists every objection.
        """
        if self.attend.gated and self.attend.backend != "auto":
            uvz = self.uvz.weight.new_empty(1, 1, self.uvz.out_features, device=device)
            scale = uvz.new_empty(2 * len(self.branches), self.attention_dim)
            projected = Projected(uvz, scale, scale, uvz, uvz, None)
            choose(self.attend.backend, projected, self.attend.options)

    def empty_state(self, like: torch.Tensor) -> LayerState:
        """A state before the first token, for rows ``like`` ``(b, ...)`` in dtype and device.

        Raises:
            ValueError: the layer is bidirectional.
        """
        if not self.causal:
            raise ValueError("a bidirectional layer has no state; allowed: causal=True")
        if self.attend.gated and self.bias is not None:
            # So that the first step finds the table that all steps read.
            self.bias.by_distance(self.chunk_size)
        state = self.attend.empty_state(like, self.attention_dim, self.expanded_dim)
        if self.shift_keys:
            state = state._replace(before=like.new_zeros(like.shape[0], 1, self.attention_dim))
        return state

    def aligned(
        self, x: torch.Tensor, rows: Rows, state: Optional[LayerState]
    ) -> tuple[torch.Tensor, Optional[LayerState]]:
        """As :meth:`Layer.aligned`."""
        uvz = self.uvz(self.norm(x))
        z, keys, before = uvz[..., 2 * self.expanded_dim :], None, None
        if self.shift_keys:
            before = self._before(z, rows, state)
            keys = shifted(z, before)
        at_border = rows.begins is not None and rows.begins % self.chunk_size == 0
        if self.attend.gated and (state is None or at_border):
            out, state = self.attend.whole(uvz, self.offset_scale, self.bias, rows, state, keys)
        elif self.attend.gated and is_step(uvz, rows, state, self.training):
            out, state = self.attend.step(uvz, self.offset_scale, self.bias, rows, state, keys)
        else:
            u, v, active = split_silu(uvz, [self.expanded_dim, self.expanded_dim, self.attention_dim])
            pairs = self.pairs(active, rows, None if before is None else nn.functional.silu(before))
            out, state = self.attend(pairs, v, self.bias, rows, state, self.training)
            out = u * out
        if isinstance(state, ChunkState) and before is not None:
            state = _passed(state, z, rows.lengths, is_step(uvz, rows, state, self.training))
        return x + self.dropout(self.out(out)), state

    def copies(self, z: torch.Tensor, rows: Rows, before: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Queries and keys of each branch, from the base ``(b, n, s)``: ``(h, b, n, s)``, rotated.

        ``before`` is the base of the token before the first, ``(b, 1, s)``, for shifted keys; None at the
        start of rows.
        """
        keys = shifted(z, before) if self.shift_keys else None
        return apply_rotary(self.offset_scale(z, keys), rows.cos, rows.sin)

    def pairs(
        self, z: torch.Tensor, rows: Rows, before: Optional[torch.Tensor] = None
    ) -> tuple[Optional[Pair], Optional[Pair]]:
        """The same for the quadratic and the linear branch; None for a branch that there is not."""
        pairs = (Pair(q, k) for q, k in self.copies(z, rows, before).unflatten(0, (-1, 2)))
        branches = dict(zip(self.branches, pairs, strict=True))
        return branches.get("quad"), branches.get("lin")

    def scores(
        self, q: torch.Tensor, k: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], rows: Rows
    ) -> torch.Tensor:
        """What the quadratic branch takes the squared ReLU of, before any masking, in float32 or wider.

        Args:
            q: Queries, ``(b, i, s)``.
            k: Keys, ``(b, j, s)``.
            positions: Of the queries ``(b, i)``, and of the keys ``(b, j)``.
            rows: The geometry of the whole rows.

        Returns:
            ``(b, i, j)``.
        """
        bias = self.bias(*positions).to(widened(q.dtype)).unsqueeze(1)
        return quadratic_scores(q.unsqueeze(1), k.unsqueeze(1), bias, self.attend.denominator(rows))

    def _before(self, z: torch.Tensor, rows: Rows, state: Optional[LayerState]) -> Optional[torch.Tensor]:
        """The base (b, 1, s) of the token before the first; None at the start of rows."""
        if isinstance(state, ChunkState):
            return state.before
        return None if rows.group is None else from_previous(z[:, -1:], rows.group)

    def _reset_parameters(self) -> None:
        for linear in (self.uvz, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.init == "fan_in":
            # The paper's 0.02 starts the linear branch at 1/100 of the quadratic one, and both near zero.
            for linear in (self.uvz, self.out):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if "lin" in self.branches:
                nn.init.normal_(self.offset_scale.gamma[-2:], std=0.1)
            if isinstance(self.bias, RotaryBias):
                self.bias.start_near()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.attention == "quadratic":
            # Not a buffer, so that no cast touches it; floating, so that averages of weights can be taken.
            destination[prefix + "n_ref"] = torch.tensor(self.n_ref, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        key = prefix + "n_ref"
        if self.attention == "quadratic":
            stored = state_dict.pop(key, None)
            if stored is None:
                missing_keys = args[2]
                missing_keys.append(key)
            else:
                self._take_over(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_over(self, stored: torch.Tensor) -> None:
        """Adopts the length that the weights were trained with, or refuses it."""
        n_ref = round(float(stored))
        # A moving average in float32 is off by some 1e-4.
        averaged = stored.dtype in (torch.float32, torch.float16, torch.bfloat16)
        if n_ref == self.n_ref or (averaged and abs(float(stored) / self.n_ref - 1) < 1e-3):
            return
        if not self.adopt_n_ref:
            raise ValueError(
                f"n_ref={self.n_ref} differs from the checkpoint's; allowed: {n_ref}, the length that its "
                "scores were divided by in training"
            )
        self.set_n_ref(n_ref)


def _passed(state: ChunkState, z: torch.Tensor, lengths: Optional[torch.Tensor], step: bool) -> ChunkState:
    """The state with the base of each row's last real token of ``z`` (b, n, s); a step writes in place."""
    before = state.before
    if step:
        before.copy_(z)
    elif lengths is None:
        before = z[:, -1:].to(before.dtype, copy=True)
    else:
        rows = torch.cat((before, z.to(before.dtype)), dim=1)
        before = rows.gather(1, lengths.view(-1, 1, 1).expand(-1, 1, z.shape[2]))
    return state._replace(before=before)
