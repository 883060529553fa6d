"""Options that the models share, and how an architecture's preset fills them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.modules.checkpoint_activations import checkpoint_wrapper

from fairseq_flash.modules import (
    ATTENTIONS,
    BACKENDS,
    INITS,
    LINEAR_NORMS,
    NORMS,
    RELATIVE_BIASES,
    GatedAttentionUnit,
)

__all__ = ["FlashConfig", "build_block", "fill_preset", "parse_cutoffs"]


@dataclass
class FlashConfig(FairseqDataclass):
    """Sizes and choices of a FLASH stack; one field an option, ``embed_dim`` for ``--embed-dim``."""

    embed_dim: int = field(default=512, metadata={"help": "model dimension d, even"})
    layers: int = field(default=12, metadata={"help": "gated attention units; two for a Transformer layer"})
    expansion_factor: int = field(default=2, metadata={"help": "expanded dimension e as a multiple of d"})
    attention_dim: int = field(default=128, metadata={"help": "dimension s of the single head, even"})
    attention: ChoiceEnum(list(ATTENTIONS)) = field(
        default="mixed_chunk",
        metadata={"help": "mixed_chunk is FLASH, quadratic FLASH-Quad; local, global: one branch of FLASH"},
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
            "help": "bias of the quadratic scores: a table (toeplitz) or its rotary form, which has no "
            "maximum length; default: a table within chunks of up to 512 tokens, otherwise rotary"
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
        metadata={"help": "not available: the rows of squared-ReLU attention are not normalised; only 0"},
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute each layer in the backward pass to save memory"}
    )
    offload_activations: bool = field(
        default=False,
        metadata={"help": "as --checkpoint-activations, with the layers' inputs kept in CPU memory"},
    )
    backend: ChoiceEnum(list(BACKENDS)) = field(
        default="auto",
        metadata={"help": "implementation of the attention: auto takes the fastest that can run"},
    )


def build_block(cfg: FlashConfig, *, causal: bool, n_ref: int) -> GatedAttentionUnit:
    """One layer as the options ask for.

    Args:
        cfg: The options.
        causal: Whether a token sees only tokens before it.
        n_ref: Resolved length that causal quadratic scores are divided by.

    Returns:
        The layer, with fairseq's activation checkpointing around it if asked for.

    Raises:
        ValueError: an option has a value that is not allowed.
    """
    if cfg.n_ref is not None and cfg.attention != "quadratic":
        raise ValueError(
            f"--n-ref {cfg.n_ref} has no effect with --attention {cfg.attention}; allowed: quadratic"
        )
    if cfg.relative_bias is not None and cfg.attention == "global":
        raise ValueError(
            f"--relative-bias {cfg.relative_bias} has no effect with --attention global; allowed: none"
        )
    if cfg.attention_dropout != 0:
        raise ValueError(
            f"--attention-dropout {cfg.attention_dropout} is not allowed: the rows of squared-ReLU "
            "attention are not normalised; allowed: 0"
        )
    block = GatedAttentionUnit(
        cfg.embed_dim,
        attention=str(cfg.attention),
        expansion_factor=cfg.expansion_factor,
        attention_dim=cfg.attention_dim,
        chunk_size=cfg.chunk_size,
        causal=causal,
        linear_norm=str(cfg.linear_norm),
        norm=str(cfg.norm),
        relative_bias=None if cfg.relative_bias is None else str(cfg.relative_bias),
        n_ref=n_ref,
        init=str(cfg.init),
        dropout=cfg.dropout,
        backend=str(cfg.backend),
    )
    if cfg.checkpoint_activations or cfg.offload_activations:
        block = checkpoint_wrapper(block, offload_to_cpu=cfg.offload_activations)
    return block


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
