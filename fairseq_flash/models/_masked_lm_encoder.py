"""The encoder of flash_masked_lm and its options: a bidirectional stack with a head for masked tokens."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqEncoder
from torch import nn

from fairseq_flash.models._config import FlashConfig, build_block
from fairseq_flash.models.flash_lm import NO_MAXIMUM, adopt_n_ref
from fairseq_flash.modules import Stack, build_norm

__all__ = ["FlashEncoder", "FlashMaskedLMConfig", "MaskedLMHead"]


@dataclass
class FlashMaskedLMConfig(FlashConfig):
    """Options of ``--arch flash_masked_lm``; names as in ``roberta`` where it has them."""

    embed_dim: int = field(default=768, metadata={"help": "model dimension d, even"})
    layers: int = field(default=24, metadata={"help": "units; two stand for a Transformer layer"})
    untie_weights_roberta: bool = field(
        default=False, metadata={"help": "give the output its own weights in place of the embeddings"}
    )
    pooler_dropout: float = field(default=0.0, metadata={"help": "dropout inside classification heads"})
    load_checkpoint_heads: bool = field(
        default=False, metadata={"help": "register the classification heads that a checkpoint holds"}
    )
    max_positions: int = field(
        default=512,
        metadata={"help": "longest row that --task sentence_prediction takes; the model has no maximum"},
    )


class MaskedLMHead(nn.Module):
    r"""Logits of the words, :math:`W_o\, \mathrm{norm}(\mathrm{gelu}(x W)) + b_o`.

    RoBERTa's; fairseq's own computes in float32 alone.

    Args:
        embed_dim: ``d``.
        words: Size of the dictionary.
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        init: ``"fan_in"`` or ``"paper"``, all weights N(0, 0.02).
        weight: Of the output, ``(words, d)``, to share with the embeddings; None for one of its own.
    """

    def __init__(
        self, embed_dim: int, words: int, norm: str, init: str, weight: Optional[nn.Parameter]
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        nn.init.normal_(self.dense.weight, std=0.02 if init == "paper" else embed_dim**-0.5)
        nn.init.zeros_(self.dense.bias)
        self.norm = build_norm(norm, embed_dim)
        if weight is None:
            weight = nn.Parameter(torch.empty(words, embed_dim).normal_(std=0.02))
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, features: torch.Tensor, masked_tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Takes ``(b, n, d)``, gives ``(b, n, words)``, or ``(masked, words)`` of ``masked_tokens`` alone."""
        if masked_tokens is not None:
            features = features[masked_tokens]
        hidden = self.norm(nn.functional.gelu(self.dense(features)))
        return nn.functional.linear(hidden, self.weight, self.bias)


class FlashEncoder(FairseqEncoder):
    """A bidirectional FLASH stack with a head for masked tokens, as a fairseq encoder.

    Args:
        cfg: The options.
        dictionary: Of input and output, with ``<mask>``.
        n_ref: Longest row of the table of ``relative_bias="toeplitz"`` with quadratic attention.

    Raises:
        ValueError: an option has a value that is not allowed, or would have no effect.
    """

    def __init__(self, cfg: FlashMaskedLMConfig, dictionary: Dictionary, n_ref: int) -> None:
        super().__init__(dictionary)
        _check(cfg)
        self.padding_idx = dictionary.pad()
        self.n_ref_is_default = cfg.n_ref is None
        embed_tokens = nn.Embedding(len(dictionary), cfg.embed_dim, padding_idx=self.padding_idx)
        nn.init.normal_(embed_tokens.weight, std=0.02)
        nn.init.zeros_(embed_tokens.weight[self.padding_idx])
        self.stack = Stack(
            embed_tokens,
            [build_block(cfg, causal=False, n_ref=n_ref) for _ in range(cfg.layers)],
            embed_dim=cfg.embed_dim,
            attention_dim=cfg.attention_dim,
            norm=str(cfg.norm),
            scaled_sin=cfg.scaled_sin,
            dropout=cfg.dropout,
        )
        weight = None if cfg.untie_weights_roberta else embed_tokens.weight
        self.lm_head = MaskedLMHead(cfg.embed_dim, len(dictionary), str(cfg.norm), str(cfg.init), weight)

    def forward(
        self,
        src_tokens: torch.Tensor,
        src_lengths: Optional[torch.Tensor] = None,
        features_only: bool = False,
        masked_tokens: Optional[torch.Tensor] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Encodes rows, and predicts what stands at every position or at the masked ones.

        Args:
            src_tokens: ``(b, n)``; padding leads or trails.
            src_lengths: Ignored: the padding tells.
            features_only: Whether to stop before the vocabulary.
            masked_tokens: ``(b, n)``, True at the positions to predict; None for all.
            unused: What fairseq passes to every model, such as ``src_id``.

        Returns:
            Logits ``(b, n, vocabulary)`` or, in the order of ``masked_tokens``, ``(masked, vocabulary)``; or
            features ``(b, n, d)``, zero at padding. And a dictionary, for nothing yet.

        Raises:
            ValueError: padding in the middle of a row, or a row longer than a Toeplitz table.
        """
        features, _ = self.stack(src_tokens, src_tokens.eq(self.padding_idx))
        return (features if features_only else self.lm_head(features, masked_tokens)), {}

    def first_features(self, features: torch.Tensor, src_tokens: torch.Tensor) -> torch.Tensor:
        """Of each row's first real token, where ``<s>`` stands: ``(b, 1, d)`` of ``(b, n, d)``."""
        first = src_tokens.ne(self.padding_idx).int().argmax(dim=1)
        return features[torch.arange(len(first), device=first.device), first].unsqueeze(1)

    def max_positions(self) -> int:
        """No maximum."""
        return NO_MAXIMUM

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Takes over the checkpoint's ``n_ref`` where the user gave none, and names unequal dictionaries.

        Raises:
            ValueError: the checkpoint was trained with a dictionary of another size.
        """
        stored = state_dict.get(f"{name}.stack.embed_tokens.weight")
        if stored is not None and len(stored) != len(self.dictionary):
            raise ValueError(
                f"the checkpoint's dictionary has {len(stored)} words, the data's {len(self.dictionary)}, "
                "with <mask>; allowed: data prepared with the dict.txt that the checkpoint was trained with"
            )
        if self.n_ref_is_default:
            adopt_n_ref(self.stack, state_dict, f"{name}.stack")
        return state_dict


def _check(cfg: FlashMaskedLMConfig) -> None:
    """Refuses what a bidirectional encoder cannot be, and what would be ignored."""
    if cfg.embed_dim < 1 or cfg.embed_dim % 2:
        raise ValueError(f"--embed-dim {cfg.embed_dim} is not allowed; allowed: even numbers from 2 on")
    if cfg.layers < 1:
        raise ValueError(f"--layers {cfg.layers} is not allowed; allowed: 1 or more")
    if not 0 <= cfg.pooler_dropout < 1:
        raise ValueError(f"--pooler-dropout {cfg.pooler_dropout} is not allowed; allowed: 0 to below 1")
    if cfg.block != "gau":
        raise ValueError(f"--block {cfg.block} is not allowed: it is causal; allowed: gau")
    table = cfg.attention == "quadratic" and cfg.relative_bias == "toeplitz"
    if cfg.n_ref is not None and not table:
        raise ValueError(
            f"--n-ref {cfg.n_ref} has no effect: bidirectional scores are divided by the words of the row; "
            "allowed: with --attention quadratic --relative-bias toeplitz, as the longest row of the table"
        )
