"""What refuses options that are not allowed or would be ignored, before a model is built."""

import functools
import logging

from fairseq_flash.models._options import (
    FlashConfig,
    FlashLanguageModelConfig,
    FlashMaskedLMConfig,
    UnitConfig,
)

__all__ = ["check_direction", "check_layers", "check_masked_lm", "check_sizes", "warn_once"]

logger = logging.getLogger(__name__)


def check_sizes(cfg: FlashConfig) -> None:
    """Refuses a model dimension or a number of layers that cannot be.

    Raises:
        ValueError: so it is.
    """
    if cfg.embed_dim < 1 or cfg.embed_dim % 2:
        raise ValueError(f"--embed-dim {cfg.embed_dim} is not allowed; allowed: even numbers from 2 on")
    if cfg.layers < 1:
        raise ValueError(f"--layers {cfg.layers} is not allowed; allowed: 1 or more")


def check_layers(cfg: FlashConfig) -> None:
    """Refuses options that would have no effect; silence would make a comparison wrong.

    Raises:
        ValueError: so it is.
    """
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
    if cfg.shift_keys and (not gau or cfg.attention == "quadratic"):
        raise ValueError(
            f"--shift-keys is not allowed with --block {cfg.block} --attention {cfg.attention}; allowed: "
            "--block gau and any --attention but quadratic"
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
    if not gau and cfg.expansion_factor != UnitConfig.expansion_factor:
        raise ValueError(
            f"--expansion-factor {cfg.expansion_factor} has no effect with --block transformer; allowed: "
            "--ffn-embed-dim"
        )
    _warn_of_no_effect(cfg)


def _warn_of_no_effect(cfg: FlashConfig) -> None:
    """Warns once of what earlier versions took in silence: their checkpoints hold it, and still load."""
    linear = cfg.attention in ("mixed_chunk", "global")
    softmax = getattr(cfg, "adaptive_softmax_cutoff", None)
    for name, condition, needed in (
        ("linear_norm", linear, "--attention mixed_chunk or global"),
        ("adaptive_input_factor", getattr(cfg, "adaptive_input", False), "--adaptive-input"),
        ("adaptive_softmax_factor", softmax is not None, "--adaptive-softmax-cutoff"),
        ("adaptive_softmax_dropout", softmax is not None, "--adaptive-softmax-cutoff"),
    ):
        value, default = getattr(cfg, name, None), getattr(FlashLanguageModelConfig, name)
        if not condition and value not in (None, default):
            warn_once(f"--{name.replace('_', '-')} {value} has no effect; allowed: with {needed}")


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, the same one only once."""
    logger.warning(text)


def check_direction(cfg: UnitConfig) -> None:
    """Refuses what a bidirectional stack cannot be.

    Raises:
        ValueError: so it is.
    """
    if cfg.linear_norm == "fading":
        raise ValueError(
            "--linear-norm fading is not allowed in a bidirectional stack, which has no direction to fade "
            "in; allowed: mean, chunk"
        )


def check_masked_lm(cfg: FlashMaskedLMConfig) -> None:
    """Refuses what a bidirectional encoder cannot be, and what would be ignored.

    Raises:
        ValueError: so it is.
    """
    if not 0 <= cfg.pooler_dropout < 1:
        raise ValueError(f"--pooler-dropout {cfg.pooler_dropout} is not allowed; allowed: 0 to below 1")
    if cfg.max_positions < 1:
        raise ValueError(f"--max-positions {cfg.max_positions} is not allowed; allowed: 1 or more")
    check_direction(cfg)
    if cfg.block != "gau":
        raise ValueError(f"--block {cfg.block} is not allowed: it is causal; allowed: gau")
    table = cfg.attention == "quadratic" and cfg.relative_bias == "toeplitz"
    if cfg.n_ref is not None and not table:
        raise ValueError(
            f"--n-ref {cfg.n_ref} has no effect: bidirectional scores are divided by the words of the row; "
            "allowed: with --attention quadratic --relative-bias toeplitz, as the longest row of the table"
        )
