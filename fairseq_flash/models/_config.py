"""Options that the models share, and how an architecture's preset fills them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn

from fairseq_flash.modules import (
    ATTENTIONS,
    BACKENDS,
    INITS,
    LINEAR_NORMS,
    NORMS,
    RELATIVE_BIASES,
    GatedAttentionUnit,
    TransformerBlock,
)

__all__ = ["BLOCKS", "FlashConfig", "build_block", "fill_preset", "parse_cutoffs"]

BLOCKS = ("gau", "transformer")


@dataclass
class FlashConfig(FairseqDataclass):
    """Sizes and choices of a FLASH stack; one field an option, ``embed_dim`` for ``--embed-dim``."""

    embed_dim: int = field(default=512, metadata={"help": "model dimension d, even"})
    block: ChoiceEnum(list(BLOCKS)) = field(
        default="gau", metadata={"help": "gated attention units, or Transformer layers to compare them with"}
    )
    layers: int = field(default=12, metadata={"help": "blocks; two units stand for a Transformer layer"})
    expansion_factor: int = field(
        default=2, metadata={"help": "expanded dimension e of --block gau as a multiple of d"}
    )
    attention_dim: int = field(
        default=128, metadata={"help": "dimension s of the single head, even; of each head of a transformer"}
    )
    ffn_embed_dim: Optional[int] = field(
        default=None,
        metadata={
            "help": "width of the feed-forward network of --block transformer; default: 4 d, with --glu "
            "8 d / 3"
        },
    )
    glu: bool = field(
        default=False, metadata={"help": "gated feed-forward network of --block transformer (Transformer++)"}
    )
    attention: ChoiceEnum(list(ATTENTIONS)) = field(
        default="mixed_chunk",
        metadata={
            "help": "mixed_chunk is FLASH, quadratic FLASH-Quad; local, global: one branch of FLASH; with "
            "--block transformer, softmax takes the place of squared ReLU"
        },
    )
    chunk_size: int = field(default=256, metadata={"help": "tokens c that attend to each other directly"})
    linear_norm: ChoiceEnum(list(LINEAR_NORMS)) = field(
        default="mean",
        metadata={"help": "divide the linear branch by the chunk size (the paper) or by the tokens summed"},
    )
    norm: ChoiceEnum(list(NORMS)) = field(default="layernorm", metadata={"help": "norm before each layer"})
    relative_bias: Optional[ChoiceEnum(list(RELATIVE_BIASES))] = field(
        default=None,
        metadata={
            "help": "bias of the squared-ReLU scores: rotary (the default), without a maximum length, or "
            "toeplitz, a table"
        },
    )
    init: ChoiceEnum(list(INITS)) = field(
        default="fan_in",
        metadata={"help": "fan_in starts all branches and gradients at a like size; paper: all N(0, 0.02)"},
    )
    scaled_sin: bool = field(
        default=False,
        metadata={"help": "add sinusoidal absolute positions to the embedding, as the paper does"},
    )
    n_ref: Optional[int] = field(
        default=None,
        metadata={
            "help": "length that causal quadratic scores are divided by; default: tokens per sample in "
            "training, kept in the checkpoint"
        },
    )
    dropout: float = field(
        default=0.1, metadata={"help": "dropout of the embeddings and of each layer's branch"}
    )
    attention_dropout: float = field(
        default=0.0,
        metadata={"help": "for the softmax of --block transformer alone: other rows are not normalised"},
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute each layer in the backward pass to save memory"}
    )
    offload_activations: bool = field(
        default=False,
        metadata={"help": "as --checkpoint-activations, with the layers' inputs kept in CPU memory"},
    )
    diagnostics_interval: int = field(
        default=0,
        metadata={
            "help": "updates between two reports on the layers (sizes of branches, gates, sparsity of the "
            "attention) to --tensorboard-logdir and the log; 0: none, at no cost"
        },
    )
    backend: ChoiceEnum(list(BACKENDS)) = field(
        default="auto",
        metadata={"help": "implementation of the attention: auto takes the fastest that can run"},
    )


def build_block(cfg: FlashConfig, *, causal: bool, n_ref: int) -> nn.Module:
    """One layer as the options ask for.

    Args:
        cfg: The options.
        causal: Whether a token sees only tokens before it; a Transformer layer is always causal.
        n_ref: Resolved length that causal quadratic scores of a gated attention unit are divided by.

    Returns:
        The layer, with fairseq's activation checkpointing around it if asked for.

    Raises:
        ValueError: an option has a value that is not allowed.
    """
    _refuse_ignored(cfg)
    options = dict(
        attention=str(cfg.attention),
        attention_dim=cfg.attention_dim,
        chunk_size=cfg.chunk_size,
        linear_norm=str(cfg.linear_norm),
        norm=str(cfg.norm),
        init=str(cfg.init),
        dropout=cfg.dropout,
        backend=str(cfg.backend),
    )
    if cfg.block == "transformer":
        options.update(ffn_embed_dim=cfg.ffn_embed_dim, glu=cfg.glu, attention_dropout=cfg.attention_dropout)
        block = TransformerBlock(cfg.embed_dim, **options)
    else:
        relative_bias = None if cfg.relative_bias is None else str(cfg.relative_bias)
        options.update(expansion_factor=cfg.expansion_factor, relative_bias=relative_bias)
        block = GatedAttentionUnit(cfg.embed_dim, causal=causal, n_ref=n_ref, **options)
    if cfg.checkpoint_activations or cfg.offload_activations:
        block = checkpoint_wrapper(block, offload_to_cpu=cfg.offload_activations)
    return block


def _refuse_ignored(cfg: FlashConfig) -> None:
    """Options that would have no effect; silence would make a comparison wrong."""
    gau = cfg.block == "gau"
    if cfg.n_ref is not None and not (gau and cfg.attention == "quadratic"):
        raise ValueError(
            f"--n-ref {cfg.n_ref} has no effect with --block {cfg.block} --attention {cfg.attention}; "
            "allowed: --block gau --attention quadratic"
        )
    if cfg.relative_bias is not None and (not gau or cfg.attention == "global"):
        raise ValueError(
            f"--relative-bias {cfg.relative_bias} has no effect with --block {cfg.block} --attention "
            f"{cfg.attention}; allowed: --block gau and any --attention but global"
        )
    if gau and cfg.attention_dropout != 0:
        raise ValueError(
            f"--attention-dropout {cfg.attention_dropout} is not allowed: the rows of squared-ReLU "
            "attention are not normalised; allowed: 0"
        )
    if cfg.attention == "global" and cfg.attention_dropout != 0:
        raise ValueError(
            f"--attention-dropout {cfg.attention_dropout} has no effect with --attention global, which has "
            "no softmax; allowed: 0"
        )
    if gau and (cfg.glu or cfg.ffn_embed_dim is not None):
        raise ValueError(
            f"--glu and --ffn-embed-dim {cfg.ffn_embed_dim} have no effect with --block gau, which has no "
            "feed-forward network; allowed: --block transformer"
        )
    if not gau and cfg.expansion_factor != FlashConfig.expansion_factor:
        raise ValueError(
            f"--expansion-factor {cfg.expansion_factor} has no effect with --block transformer; allowed: "
            "--ffn-embed-dim"
        )


def fill_preset(args: Any, config: type, preset: dict) -> None:
    """Sets every option that the user left open, from an architecture's preset or the config's default.

    Args:
        args: Parsed arguments, or the config of an older checkpoint that lacks newer options.
        config: The model's dataclass.
        preset: Values that differ from the dataclass.
    """
    for option in dataclasses.fields(config):
        if getattr(args, option.name, None) is None:
            setattr(args, option.name, preset.get(option.name, option.default))


def parse_cutoffs(name: str, value: str, vocabulary: int) -> list:
    """Reads a comma-separated option of ascending integers; no eval, as a checkpoint may bring the string.

    Args:
        name: The option, for the error.
        value: Such as ``"200,1000"``.
        vocabulary: Size of the dictionary.

    Returns:
        The integers.

    Raises:
        ValueError: it is something else, or a cutoff is beyond the dictionary.
    """
    parts = [part.strip() for part in (value or "").strip("[]() ").split(",")]
    cutoffs = [int(part) for part in parts if part.isdecimal()]
    ascending = sorted(set(cutoffs)) == cutoffs
    if len(cutoffs) != len(parts) or not ascending or not 0 < cutoffs[0] <= cutoffs[-1] < vocabulary:
        raise ValueError(
            f"--{name.replace('_', '-')} {value!r} is not allowed; allowed: ascending integers between 0 and "
            f"{vocabulary}, the size of the dictionary, separated by commas"
        )
    return cutoffs
