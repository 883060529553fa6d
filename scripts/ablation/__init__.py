"""flash_lm with the choices that the package settles and does not offer as options, for measuring them.

    fairseq-train ... --user-dir scripts/ablation --arch flash_ablation_lm --gamma-quad 1 --score-scale 0.0884

Takes every option of flash_lm. Those added here change how the weights start, or the formula of one branch.
"""

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.models import register_model
from torch import nn

from fairseq_flash.models.flash_lm import FlashLanguageModel, FlashLanguageModelConfig
from fairseq_flash.modules import OffsetScale, RotaryBias, ToeplitzBias
from fairseq_flash.ops import apply_rotary, shifted


@dataclass
class AblationConfig(FlashLanguageModelConfig):
    """Standard deviations of the start, all None for the default's, and changes of the formula."""

    embed_std: Optional[float] = field(default=None, metadata={"help": "of the token embeddings"})
    dense_std: Optional[float] = field(default=None, metadata={"help": "of the layers' input weights"})
    out_std: Optional[float] = field(default=None, metadata={"help": "of the layers' output weights"})
    gamma_quad: Optional[float] = field(default=None, metadata={"help": "of the quadratic branch's gammas"})
    gamma_lin: Optional[float] = field(default=None, metadata={"help": "of the linear branch's gammas"})
    bias_std: Optional[float] = field(default=None, metadata={"help": "of a Toeplitz table"})
    bias_height: Optional[float] = field(
        default=None, metadata={"help": "of the bias at distance 0; 0: a rotary one as N(0, 0.02)"}
    )
    score_scale: Optional[float] = field(
        default=None, metadata={"help": "factor of the quadratic scores, such as 1/sqrt(s)"}
    )
    plain_linear: bool = field(default=False, metadata={"help": "no rotary positions in the linear branch"})


class ScaledCopies(OffsetScale):
    """Offset-scale whose first copy, the quadratic queries, is multiplied by a constant."""

    def __init__(self, inner: OffsetScale, factor: float) -> None:
        nn.Module.__init__(self)
        self.gamma, self.beta, self.factor = inner.gamma, inner.beta, factor

    def forward(self, z: torch.Tensor, keys: Optional[torch.Tensor] = None) -> torch.Tensor:
        """As OffsetScale."""
        first, others = super().forward(z, keys).split([1, len(self.gamma) - 1])
        return torch.cat((first * self.factor, others))


@register_model("flash_ablation_lm", dataclass=AblationConfig)
class AblationLanguageModel(FlashLanguageModel):
    """flash_lm, changed after it was built."""

    @classmethod
    def build_model(cls, cfg: AblationConfig, task: Any) -> "AblationLanguageModel":
        """Builds flash_lm and applies the changes."""
        model = super().build_model(cfg, task)
        stack = model.decoder.stack
        if cfg.embed_std is not None:
            with torch.no_grad():
                weight = stack.embed_tokens.weight
                weight.mul_(cfg.embed_std / weight[4:].std())
        for block in stack.blocks:
            _change(block, cfg)
        return model


def _change(block: nn.Module, cfg: AblationConfig) -> None:
    dense = [getattr(block, name) for name in ("uvz", "qkv", "ffn_in") if hasattr(block, name)]
    outputs = [getattr(block, name) for name in ("out", "ffn_out") if hasattr(block, name)]
    starts = [(layer.weight, cfg.dense_std) for layer in dense]
    starts += [(layer.weight, cfg.out_std) for layer in outputs]
    if hasattr(block, "offset_scale"):
        gamma = block.offset_scale.gamma
        starts += [(gamma[:2], cfg.gamma_quad)] if "quad" in block.branches else []
        starts += [(gamma[-2:], cfg.gamma_lin)] if "lin" in block.branches else []
    elif "lin" in block.branches:
        starts += [(scale.gamma, cfg.gamma_lin) for scale in (block.q_scale, block.k_scale)]
    bias = getattr(block, "bias", None)
    if isinstance(bias, ToeplitzBias):
        starts.append((bias.table, cfg.bias_std))
    if isinstance(bias, RotaryBias) and cfg.bias_height == 0:
        starts += [(bias.a, 0.02), (bias.b, 0.02)]
    elif bias is not None and cfg.bias_height is not None:
        bias.start_near(cfg.bias_height)
    with torch.no_grad():
        for weight, std in starts:
            if std is not None:
                weight.normal_(std=std)
    if cfg.score_scale is not None or cfg.plain_linear:
        # These change the queries and keys, which the fused operation makes for itself.
        block.attend = dataclasses.replace(block.attend, gated=False)
    if cfg.score_scale is not None:
        block.offset_scale = ScaledCopies(block.offset_scale, cfg.score_scale)
    if cfg.plain_linear:
        block.copies = types.MethodType(copies_with_plain_linear, block)


def copies_with_plain_linear(
    block: nn.Module, z: torch.Tensor, rows: Any, before: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """As ``GatedAttentionUnit.copies``, those of the linear branch, the last two, not rotated."""
    copies = block.offset_scale(z, shifted(z, before) if block.shift_keys else None)
    return torch.cat((apply_rotary(copies[:-2], rows.cos, rows.sin), copies[-2:]))
