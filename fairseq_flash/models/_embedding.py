"""What stands before the layers and after them: embeddings of words, and an adaptive softmax."""

import math

import torch
from fairseq.data import Dictionary
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from torch import nn

from fairseq_flash.models._options import FlashConfig, FlashLanguageModelConfig

__all__ = ["build_adaptive_softmax", "build_embedding", "build_input", "embed_scale", "padding_as_words"]


def build_embedding(cfg: FlashConfig, dictionary: Dictionary) -> nn.Embedding:
    """Vectors of the words, ``(words, d)``, zero for padding.

    Args:
        cfg: The options, checked.
        dictionary: The words.

    Returns:
        The embedding.
    """
    embedding = nn.Embedding(len(dictionary), cfg.embed_dim, padding_idx=dictionary.pad())
    std = 1 / embed_scale(cfg) if cfg.block == "transformer" else 0.02
    nn.init.normal_(embedding.weight, std=std)
    nn.init.zeros_(embedding.weight[dictionary.pad()])
    return embedding


def build_input(cfg: FlashLanguageModelConfig, dictionary: Dictionary) -> nn.Module:
    """As :func:`build_embedding`, or fairseq's adaptive input.

    Raises:
        ValueError: an option of adaptive input or softmax is not allowed.
    """
    _check_adaptive(cfg)
    if not cfg.adaptive_input:
        return build_embedding(cfg, dictionary)
    cutoffs = _parse_cutoffs("adaptive_input_cutoff", cfg.adaptive_input_cutoff, len(dictionary))
    return AdaptiveInput(
        len(dictionary),
        dictionary.pad(),
        cfg.embed_dim,
        cfg.adaptive_input_factor,
        cfg.embed_dim,
        cutoffs,
    )


def padding_as_words(tokens: torch.Tensor, dictionary: Dictionary) -> torch.Tensor:
    """The same tokens, with ``<unk>`` for padding between two real tokens of a row.

    In data it is a word like others: a text that has ``<pad>`` in it, or words drawn at random, as
    ``--task denoising --mask-random`` draws them.

    Args:
        tokens: ``(b, n)``.
        dictionary: Tells which is padding.

    Returns:
        ``(b, n)``, whose padding leads or trails.
    """
    real = tokens.ne(dictionary.pad())
    before, after = real.cumsum(1) > 0, real.flip(1).cumsum(1).flip(1) > 0
    return tokens.masked_fill(~real & before & after, dictionary.unk())


def embed_scale(cfg: FlashConfig) -> float:
    """As in transformer_lm; Transformer layers add about one to their input at the start."""
    return cfg.embed_dim**0.5 if cfg.block == "transformer" else 1.0


def build_adaptive_softmax(
    cfg: FlashLanguageModelConfig, vocabulary: int, embed_tokens: nn.Module
) -> AdaptiveSoftmax:
    """fairseq's adaptive softmax over ``vocabulary`` words, tied to ``embed_tokens`` if asked for.

    Raises:
        ValueError: the cutoffs are not allowed.
    """
    return AdaptiveSoftmax(
        vocabulary,
        cfg.embed_dim,
        _parse_cutoffs("adaptive_softmax_cutoff", cfg.adaptive_softmax_cutoff, vocabulary),
        dropout=cfg.adaptive_softmax_dropout,
        adaptive_inputs=embed_tokens if cfg.tie_adaptive_weights else None,
        factor=cfg.adaptive_softmax_factor,
        tie_proj=cfg.tie_adaptive_proj,
    )


def _check_adaptive(cfg: FlashLanguageModelConfig) -> None:
    """Refuses what would be ignored, or would fail only during training."""
    tied = cfg.tie_adaptive_weights or cfg.tie_adaptive_proj
    inputs = (cfg.adaptive_input_cutoff, cfg.adaptive_input_factor)
    outputs = (cfg.adaptive_softmax_cutoff, cfg.adaptive_softmax_factor)
    if tied and not (cfg.tie_adaptive_weights and cfg.adaptive_input and inputs == outputs):
        raise ValueError(
            "--tie-adaptive-weights (without which --tie-adaptive-proj has no effect) needs --adaptive-input "
            f"with the cutoffs and factor of the adaptive softmax; got {inputs} and {outputs}"
        )
    if cfg.share_decoder_input_output_embed and (
        cfg.adaptive_input or cfg.adaptive_softmax_cutoff is not None
    ):
        raise ValueError(
            "--share-decoder-input-output-embed is not allowed with adaptive input or softmax; allowed: "
            "--tie-adaptive-weights"
        )
    if cfg.adaptive_input_cutoff is not None and not cfg.adaptive_input:
        raise ValueError(f"--adaptive-input-cutoff {cfg.adaptive_input_cutoff!r} needs --adaptive-input")
    for name, factor in (("input", cfg.adaptive_input_factor), ("softmax", cfg.adaptive_softmax_factor)):
        if not 1 <= factor < math.inf:
            raise ValueError(f"--adaptive-{name}-factor {factor} is not allowed; allowed: 1 or more")
    if not 0 <= cfg.adaptive_softmax_dropout < 1:
        raise ValueError(
            f"--adaptive-softmax-dropout {cfg.adaptive_softmax_dropout} is not allowed; allowed: 0 to below 1"
        )


def _parse_cutoffs(name: str, value: str, vocabulary: int) -> list:
    """The integers of "200,1000", ascending; no eval, as a checkpoint may bring the string."""
    parts = [part.strip() for part in (value or "").strip("[]() ").split(",")]
    cutoffs = [int(part) for part in parts if part.isdecimal()]
    ascending = sorted(set(cutoffs)) == cutoffs
    if len(cutoffs) != len(parts) or not ascending or not 0 < cutoffs[0] <= cutoffs[-1] < vocabulary:
        raise ValueError(
            f"--{name.replace('_', '-')} {value!r} is not allowed; allowed: ascending integers between 0 and "
            f"{vocabulary}, the size of the dictionary, separated by commas"
        )
    return cutoffs
