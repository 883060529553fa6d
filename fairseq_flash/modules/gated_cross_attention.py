"""The unit that reads a source: gate and queries come from the row, values and keys from the source."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import nn

from fairseq_flash.modules.checks import (
    check_backend,
    check_choice,
    check_instance,
    check_rates,
    check_sizes,
    check_tensor,
    check_vectors,
    require,
)
from fairseq_flash.modules.layer import INITS
from fairseq_flash.modules.normalization import build_norm
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.ops import cross_attention, split_silu
from fairseq_flash.ops.shown import shown

__all__ = ["GatedCrossAttention", "SourceMemory"]


class SourceMemory(NamedTuple):
    """What a layer keeps of a source: made once, read by every token.

    Attributes:
        k: Keys, ``(b, m, s)``.
        v: Values, ``(b, m, e)``; zero at padding.
        valid: Tokens of each source, ``(b,)``.
    """

    k: torch.Tensor
    v: torch.Tensor
    valid: torch.Tensor

    def __repr__(self) -> str:
        return shown(self)


class GatedCrossAttention(nn.Module):
    r"""One layer that attends to a source, :math:`y = x + (u \odot A v) W_o`, with a residual.

    :math:`u, z = \mathrm{split}(\mathrm{silu}(\mathrm{norm}(x) W + \mathrm{bias}))` of the row;
    :math:`v, z' = \mathrm{split}(\mathrm{silu}(x' W' + \mathrm{bias}'))` of the source :math:`x'`, whose own
    norm is its encoder's last; :math:`A = \mathrm{relu}^2(q k^\top / \sqrt s) / m` with
    :math:`q = \gamma z + \beta` and :math:`k = \gamma' z' + \beta'`, and :math:`m` the source's tokens.

    Args:
        embed_dim: ``d``, of the row and of the source.
        expansion_factor: ``e = expansion_factor * d``.
        attention_dim: ``s``.
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        init: ``"fan_in"``, under which the branch starts at the size of a self-attention's, or ``"paper"``,
            dense weights N(0, 0.02). Gammas start at one under both: no bias lifts the scores off zero.
        dropout: Of the branch's output, 0 to below 1.
        backend: Any that exists: this attention has one implementation.

    Raises:
        ValueError: an argument has a value that is not allowed.

    Source: Hua et al. 2022, section 3.1, with the source in place of the row itself.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        expansion_factor: int = 2,
        attention_dim: int = 128,
        norm: str = "layernorm",
        init: str = "fan_in",
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("init", init, INITS)
        check_backend(backend)
        check_sizes(embed_dim=embed_dim, expansion_factor=expansion_factor, attention_dim=attention_dim)
        check_rates(dropout=dropout)
        self.embed_dim, self.attention_dim = embed_dim, attention_dim
        self.expanded_dim = expansion_factor * embed_dim
        self.norm = build_norm(norm, embed_dim)
        self.uz = nn.Linear(embed_dim, self.expanded_dim + attention_dim)
        self.vz = nn.Linear(embed_dim, self.expanded_dim + attention_dim)
        self.q_scale, self.k_scale = OffsetScale(attention_dim, 1), OffsetScale(attention_dim, 1)
        self.out = nn.Linear(self.expanded_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self._reset_parameters(init)

    def read(self, source: torch.Tensor, padding_mask: Optional[torch.Tensor] = None) -> SourceMemory:
        """Makes keys and values of a source.

        Args:
            source: ``(b, m, d)``; anything, even NaN, at padding.
            padding_mask: ``(b, m)``, True at padding, wherever it lies; None without padding.

        Returns:
            What :meth:`forward` attends to, for any number of calls.

        Raises:
            ValueError: source or mask has another shape, dtype or device.
        """
        check_vectors("source", source, (None, None, self.embed_dim), self.vz.weight)
        b, m, _ = source.shape
        if padding_mask is not None:
            check_tensor("source_padding_mask", padding_mask, (b, m), [torch.bool], source.device)
            source = source.masked_fill(padding_mask.unsqueeze(-1), 0)
        v, z = split_silu(self.vz(source), [self.expanded_dim, self.attention_dim])
        if padding_mask is None:
            valid = torch.full((b,), m, device=source.device)
        else:
            v, valid = v.masked_fill(padding_mask.unsqueeze(-1), 0), (~padding_mask).sum(1)
        return SourceMemory(self.k_scale(z)[0], v, valid)

    def forward(self, x: torch.Tensor, source: SourceMemory) -> torch.Tensor:
        """Applies the layer to each token on its own.

        Args:
            x: ``(b, n, d)``.
            source: From :meth:`read`, of as many rows.

        Returns:
            ``(b, n, d)``.

        Raises:
            ValueError: the source is not of these rows, or not from this layer's :meth:`read`.
        """
        check_vectors("x", x, (None, None, self.embed_dim), self.uz.weight)
        self._check_memory(source, x)
        u, z = split_silu(self.uz(self.norm(x)), [self.expanded_dim, self.attention_dim])
        out = cross_attention(self.q_scale(z)[0], *source)
        return x + self.dropout(self.out(u * out))

    def _check_memory(self, source: SourceMemory, x: torch.Tensor) -> None:
        check_instance("source", source, SourceMemory)
        check_tensor("source.valid", source.valid, x.shape[:1], [torch.long], x.device)
        check_instance("source.k", source.k, torch.Tensor)
        m = source.k.shape[1] if source.k.dim() == 3 else None
        for name, width in (("k", self.attention_dim), ("v", self.expanded_dim)):
            check_vectors(f"source.{name}", getattr(source, name), (len(x), m, width), self.vz.weight)
        if x.is_cpu and not torch.compiler.is_compiling():
            possible = (source.valid >= 0) & (source.valid <= m)
            require(possible.all(), "source.valid counts tokens that are not there; allowed: 0 to {m}", m=m)

    def _reset_parameters(self, init: str) -> None:
        for linear in (self.uz, self.vz, self.out):
            nn.init.normal_(linear.weight, std=0.02 if init == "paper" else linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if init == "fan_in":
            # With scores far from zero, the branch would start at three times the embeddings.
            nn.init.normal_(self.out.weight, std=0.1 * self.out.in_features**-0.5)
        for scale in (self.q_scale, self.k_scale):
            nn.init.ones_(scale.gamma)
