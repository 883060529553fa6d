"""Candidates for a better FLASH: its unit with changes of the linear branch, in PyTorch alone.

They read whole rows of any length without padding, for measuring what a change is worth before it is built.
"""

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from ablation.candidate_states import (
    decayed_states,
    delta_states,
    faded_means,
    grouped_norm,
    half_lives,
    read_states,
    summed_states,
)
from fairseq_flash.modules import GatedAttentionUnit, Rows, TransformerBlock
from fairseq_flash.ops import apply_rotary, quadratic_attention
from fairseq_flash.ops.mixed_chunk.linear import linear_denominator
from fairseq_flash.ops.mixed_chunk.reference import to_chunks
from fairseq_flash.ops.precision import widened

__all__ = ["DECAYS", "CandidateUnit", "Choice", "UnplacedBlock"]

#: Fixed half-lives, the same as a start, or times a factor of each token that starts at 1.
DECAYS = ("fixed", "learned", "data")
TAPS = 4
#: Chunks that a compiler may write down one after the other.
MOST_UNROLLED = 32
#: Root mean square of the quadratic branch's output at the start, at any width.
LIKE_QUADRATIC = 0.007
#: Of the products of linear queries and keys at the start, by the root of their size.
LIKE_PRODUCTS = 0.0032


@dataclass(frozen=True)
class Choice:
    """What a unit has that FLASH has not.

    Attributes:
        shift: Every second rotated pair of ``"k"`` (keys) or ``"z"`` (their base) is of the token before.
        conv: Of what pre-activations, ``"z"`` or ``"zv"``, each column is convolved with its last 4 tokens.
        norm: Whether the linear branch reads sums, normalised by groups of values, in place of a mean.
        decay: One of ``DECAYS``, with ``norm``.
        fade: Whether the mean over earlier tokens is weighted, by fixed half-lives of the groups in chunks.
        delta: Whether chunks are added by the delta rule, with ``norm`` and ``unit_length``.
        unit_length: Whether linear queries and keys have length 1, with a learned temperature.
        sigmoid: Whether the gate is a sigmoid in place of SiLU.
        plain_linear: Whether linear queries and keys are not rotated.
        random_chunk: Whether the chunk's size is drawn for each update.
        hybrid: Whether every sixth layer is softmax attention over the whole row.
        groups: Of values, at most.
    """

    shift: str = ""
    conv: str = ""
    norm: bool = False
    decay: str = ""
    fade: bool = False
    delta: bool = False
    unit_length: bool = False
    sigmoid: bool = False
    plain_linear: bool = False
    random_chunk: bool = False
    hybrid: bool = False
    groups: int = 16


class Convolution(nn.Module):
    """Causal depthwise convolution of the last 4 tokens; at the start each is itself.

    Args:
        dim: Columns.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(TAPS, dim))
        nn.init.ones_(self.taps[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes ``(b, n, dim)``, gives the same, in its dtype."""
        n, taps = x.shape[1], self.taps.to(x.dtype)
        padded = nn.functional.pad(x, (0, 0, TAPS - 1, 0))
        return sum(padded[:, back : back + n] * taps[back] for back in range(TAPS))


class CandidateUnit(GatedAttentionUnit):
    """A causal gated attention unit with a :class:`Choice`; without one it is ``GatedAttentionUnit``.

    Args:
        embed_dim: ``d``.
        choice: What is different.
        options: Of :class:`GatedAttentionUnit`; ``attention`` is ``"mixed_chunk"`` or ``"local"``.

    Attributes:
        current_chunk: Tokens of a chunk in the passes to come; scores are divided by ``chunk_size`` always.

    Raises:
        ValueError: as :class:`GatedAttentionUnit`.
    """

    def __init__(self, embed_dim: int, choice: Choice, **options: Any) -> None:
        super().__init__(embed_dim, **options)
        self.choice, self.current_chunk = choice, self.chunk_size
        self.groups = math.gcd(choice.groups, self.expanded_dim)
        if choice.conv:
            self.conv_z = Convolution(self.attention_dim)
        if choice.conv == "zv":
            self.conv_v = Convolution(self.expanded_dim)
        if choice.unit_length:
            self.temperature = nn.Parameter(torch.tensor(LIKE_PRODUCTS * self.attention_dim))
        if choice.norm:
            self.gain = nn.Parameter(torch.full((self.expanded_dim,), LIKE_QUADRATIC))
        if choice.decay:
            rates = (math.log(2) / half_lives(self.groups, self.chunk_size)).log()
            self.log_rate = nn.Parameter(rates, requires_grad=choice.decay != "fixed")
        if choice.decay == "data":
            self.factor = _from_zero(embed_dim, self.groups, math.log(math.e - 1))
        if choice.delta:
            self.write = _from_zero(embed_dim, 1, 2.0)

    def aligned(self, x: torch.Tensor, rows: Rows, state: Optional[Any]) -> tuple[torch.Tensor, None]:
        """As ``Layer.aligned``, of whole rows without padding.

        Raises:
            ValueError: there is padding or a state.
        """
        if state is not None or rows.lengths is not None:
            raise ValueError("a candidate is given a state or padding; allowed: whole rows")
        normed = self.norm(x)
        e = self.expanded_dim
        u, v, z = self.uvz(normed).split([e, e, self.attention_dim], dim=-1)
        z = self.conv_z(z) if self.choice.conv else z
        v = self.conv_v(v) if self.choice.conv == "zv" else v
        u = u.sigmoid() if self.choice.sigmoid else nn.functional.silu(u)
        v, z = nn.functional.silu(v), nn.functional.silu(z)
        out = self._attended(self.copies(z, rows), v, normed)
        return x + self.dropout(self.out(u * out)), None

    def copies(self, z: torch.Tensor, rows: Rows) -> torch.Tensor:
        """As ``GatedAttentionUnit.copies``, shifted and rotated as the choice says."""
        shifted = _shifted(z) if self.choice.shift else z
        copies = self.offset_scale(shifted if self.choice.shift == "z" else z)
        if self.choice.shift == "k":
            queries, keys = copies[::2], self.offset_scale(shifted)[1::2]
            copies = torch.stack((queries, keys), dim=1).flatten(0, 1)
        if self.choice.plain_linear:
            rotated = apply_rotary(copies[:-2], rows.cos, rows.sin)
            return torch.cat((rotated, copies[-2:]))
        return apply_rotary(copies, rows.cos, rows.sin)

    def _attended(self, copies: torch.Tensor, v: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        n, c = v.shape[1], min(self.current_chunk, v.shape[1])
        copies, v = to_chunks(copies, c), to_chunks(v, c)
        out = quadratic_attention(
            *copies[:2], v, self.bias.matrix(c), causal=True, denominator=float(self.chunk_size)
        )
        if "lin" in self.branches:
            q, k = copies[2], copies[3]
            if self.choice.unit_length:
                q = nn.functional.normalize(q, dim=-1) * self.temperature
                k = nn.functional.normalize(k, dim=-1)
            out = out + self._across(q, k, v, to_chunks(normed, c))
        return out.flatten(1, 2)[:, :n]

    def _across(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, normed: torch.Tensor
    ) -> torch.Tensor:
        """The linear branch on the grid (b, g, c, .)."""
        log_decay = self._log_decay(normed) if self.choice.decay else None
        if self.choice.fade:
            kept = 0.5 ** (self.chunk_size / half_lives(self.groups, self.chunk_size))
            kept = nn.functional.pad(kept, (0, 1), value=1.0).to(v.device, widened(v.dtype))
            return read_states(q, faded_means(k, v, kept), v.dtype)
        if self.choice.delta:
            states_of = delta_states if v.shape[1] <= MOST_UNROLLED else _uncompiled_delta_states
            states = states_of(k, v, self.write(normed).squeeze(-1).sigmoid(), log_decay)
        elif self.choice.decay:
            states = decayed_states(k, v, log_decay)
        else:
            states = summed_states(k, v)
        if self.choice.norm:
            return grouped_norm(read_states(q, states, v.dtype), self.gain, self.groups)
        counts = torch.arange(v.shape[1], device=v.device) * v.shape[2]
        denominator = linear_denominator(self.linear_norm, self.chunk_size, counts, v.shape[3], states.dtype)
        return read_states(q, states / denominator.unsqueeze(1), v.dtype)

    def _log_decay(self, normed: torch.Tensor) -> torch.Tensor:
        """Of each token and group, (b, g, c, h) in float32 or wider; the last group keeps all."""
        wide = widened(normed.dtype)
        rates = nn.functional.pad(self.log_rate.exp(), (0, 1)).to(wide)
        if self.choice.decay == "data":
            return -rates * nn.functional.softplus(self.factor(normed).to(wide))
        return -rates.expand(*normed.shape[:-1], -1)


class UnplacedBlock(TransformerBlock):
    """Softmax attention over the whole row without positions, and a feed-forward network."""

    def _rotated(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self._heads(x)


_uncompiled_delta_states = torch.compiler.disable(delta_states)


def _shifted(z: torch.Tensor) -> torch.Tensor:
    """Every second pair of columns from the token before, zero before the first token."""
    s = z.shape[-1]
    before = nn.functional.pad(z, (0, 0, 1, 0))[:, :-1]
    return torch.where(torch.arange(s, device=z.device) % (s // 2) % 2 == 1, before, z)


def _from_zero(inputs: int, outputs: int, bias: float) -> nn.Linear:
    """A dense layer that gives ``bias`` at the start, whatever comes in."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, bias)
    return linear
