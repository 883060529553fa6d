"""flash_seq2seq: an encoder-decoder of gated attention units, for translation."""

import dataclasses
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import (
    FairseqEncoder,
    FairseqEncoderDecoderModel,
    register_model,
    register_model_architecture,
)
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn

from fairseq_flash.models._config import FlashConfig, build_block, fill_preset
from fairseq_flash.models._seq2seq_config import PAIRS, PRESETS, FlashSeq2SeqConfig, stack_options
from fairseq_flash.models.flash_lm import (
    NO_MAXIMUM,
    FlashDecoder,
    _build_embedding,
    _resolve_n_ref,
    adopt_n_ref,
)
from fairseq_flash.modules import DecoderLayer, GatedCrossAttention, Stack

__all__ = ["PAIRS", "PRESETS", "FlashEncoder", "FlashSeq2Seq", "FlashSeq2SeqConfig", "FlashSeq2SeqDecoder"]

EncoderOut = dict[str, list[torch.Tensor]]


class FlashEncoder(FairseqEncoder):
    """A bidirectional FLASH stack as a fairseq encoder.

    Args:
        cfg: The options.
        dictionary: Of the source.
        embed_tokens: From tokens ``(b, m)`` to ``(b, m, d)``.
        n_ref: Longest row of ``--attention quadratic --relative-bias toeplitz``.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    def __init__(self, cfg: FlashConfig, dictionary: Dictionary, embed_tokens: nn.Module, n_ref: int) -> None:
        super().__init__(dictionary)
        self.padding_idx = embed_tokens.padding_idx
        self.n_ref_is_default = cfg.n_ref is None
        self.stack = Stack(
            embed_tokens,
            [build_block(cfg, causal=False, n_ref=n_ref) for _ in range(cfg.layers)],
            embed_dim=cfg.embed_dim,
            attention_dim=cfg.attention_dim,
            norm=str(cfg.norm),
            scaled_sin=cfg.scaled_sin,
            dropout=cfg.dropout,
        )

    def forward(
        self, src_tokens: torch.Tensor, src_lengths: Optional[torch.Tensor] = None, **unused: Any
    ) -> EncoderOut:
        """Reads a source.

        Args:
            src_tokens: ``(b, m)``; padding leads or trails.
            src_lengths: Ignored: the padding tells.
            unused: What fairseq passes to every encoder.

        Returns:
            As fairseq's own encoders: ``encoder_out``, a list of one tensor ``(m, b, d)``, and
            ``encoder_padding_mask``, a list of one ``(b, m)``, True at padding.

        Raises:
            ValueError: padding in the middle of a row, or a row longer than a Toeplitz table.
        """
        padding_mask = src_tokens.eq(self.padding_idx)
        features, _ = self.stack(src_tokens, padding_mask)
        return {"encoder_out": [features.transpose(0, 1)], "encoder_padding_mask": [padding_mask]}

    def reorder_encoder_out(self, encoder_out: EncoderOut, new_order: torch.Tensor) -> EncoderOut:
        """Picks the rows of the sources whose beams go on."""
        axes = {"encoder_out": 1, "encoder_padding_mask": 0}
        return {
            name: [tensor.index_select(axes[name], new_order) for tensor in tensors]
            for name, tensors in encoder_out.items()
        }

    def max_positions(self) -> int:
        """No maximum."""
        return NO_MAXIMUM

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Takes over the checkpoint's ``n_ref`` where the user gave none; refuses another dictionary."""
        _check_dictionary(self.dictionary, state_dict, f"{name}.stack.embed_tokens.weight", "source")
        if self.n_ref_is_default:
            adopt_n_ref(self.stack, state_dict, f"{name}.stack")
        return state_dict


class FlashSeq2SeqDecoder(FlashDecoder):
    """A causal FLASH stack that reads a source in every layer, as a fairseq decoder.

    Each layer's keys and values of the source are computed once a source, kept in the ``incremental_state``,
    and reordered with the beams.

    Args:
        cfg: The options.
        dictionary: Of the target.
        embed_tokens: From tokens ``(b, n)`` to ``(b, n, d)``.
        n_ref: Resolved length that causal quadratic scores are divided by.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    def build_layer(self, cfg: FlashConfig, n_ref: int) -> nn.Module:
        """A unit that attends to the target so far, and one that attends to the source."""
        plain = dataclasses.replace(cfg, checkpoint_activations=False, offload_activations=False)
        layer = DecoderLayer(
            build_block(plain, causal=True, n_ref=n_ref),
            GatedCrossAttention(
                cfg.embed_dim,
                expansion_factor=cfg.expansion_factor,
                attention_dim=cfg.attention_dim,
                norm=str(cfg.norm),
                init=str(cfg.init),
                dropout=cfg.dropout,
                backend=str(cfg.backend),
            ),
        )
        if cfg.checkpoint_activations or cfg.offload_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        return layer

    def extract_features(
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Optional[EncoderOut] = None,
        incremental_state: Optional[dict[str, Any]] = None,
        *unused_memory: None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Predicts features of the next token at every position.

        Args:
            prev_output_tokens: ``(b, n)``; padding leads or trails.
            encoder_out: From the encoder, of as many rows.
            incremental_state: fairseq's, during generation; then only the last position is returned.
            unused_memory: A target does not continue another batch's.
            unused: What fairseq passes to every model.

        Returns:
            ``(b, n, d)``; and None, in place of attention weights.

        Raises:
            ValueError: there is no ``encoder_out``, padding in the middle of a row, or a row longer than a
                Toeplitz table.
        """
        if encoder_out is None:
            raise ValueError("encoder_out=None is not allowed; allowed: what the encoder returned")
        source = {
            "source": encoder_out["encoder_out"][0].transpose(0, 1),
            "source_padding_mask": encoder_out["encoder_padding_mask"][0],
        }
        if incremental_state is not None:
            return self._advance(prev_output_tokens, incremental_state, **source), None
        padding_mask = prev_output_tokens.eq(self.padding_idx)
        return self.stack(prev_output_tokens, padding_mask, **source)[0], None

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """Takes over the checkpoint's ``n_ref`` where the user gave none; refuses another dictionary."""
        _check_dictionary(self.dictionary, state_dict, f"{name}.output_projection.weight", "target")
        return super().upgrade_state_dict_named(state_dict, name)


@register_model("flash_seq2seq", dataclass=FlashSeq2SeqConfig)
class FlashSeq2Seq(FairseqEncoderDecoderModel):
    """FLASH as an encoder-decoder: rows of any length on both sides, at linear cost but for the reading.

    Source: Hua et al. 2022 for the units; the cross-attention is the unit of section 3.1, whose values and
    keys come from the source.
    """

    @classmethod
    def build_model(cls, cfg: FlashSeq2SeqConfig, task: Any) -> "FlashSeq2Seq":
        """Builds the model for a task with a ``source_dictionary`` and a ``target_dictionary``.

        Raises:
            ValueError: an option has a value that is not allowed, or embeddings shall be shared between
                dictionaries that differ.
        """
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(cfg, name) < 1:
                option = f"--{name.replace('_', '-')} {getattr(cfg, name)}"
                raise ValueError(f"{option} is not allowed; allowed: 1 or more")
        sources, targets = task.source_dictionary, task.target_dictionary
        if cfg.share_all_embeddings and sources != targets:
            raise ValueError(
                f"--share-all-embeddings needs one dictionary; the source's has {len(sources)} words, the "
                f"target's {len(targets)}, and they differ; allowed: data prepared with a joined dictionary, "
                "or --share-decoder-input-output-embed"
            )
        n_ref = _resolve_n_ref(cfg, task)
        options = stack_options(cfg, cfg.encoder_layers)
        encoder = FlashEncoder(options, sources, _build_embedding(options, sources), n_ref)
        options = stack_options(cfg, cfg.decoder_layers)
        shared = encoder.stack.embed_tokens if cfg.share_all_embeddings else None
        embed_tokens = shared or _build_embedding(options, targets)
        return cls(encoder, FlashSeq2SeqDecoder(options, targets, embed_tokens, n_ref))


def _check_dictionary(dictionary: Dictionary, state_dict: dict[str, Any], name: str, side: str) -> None:
    stored = state_dict.get(name)
    if stored is not None and len(stored) != len(dictionary):
        raise ValueError(
            f"the dictionary of the {side} has {len(dictionary)} words; allowed: {len(stored)}, those that "
            "the checkpoint was trained with"
        )


def _register(name: str, preset: dict) -> None:
    @register_model_architecture("flash_seq2seq", name)
    def fill(args: Any) -> None:
        fill_preset(args, FlashSeq2SeqConfig, preset)


for _name, _preset in PRESETS.items():
    # The model's own name is an architecture already, of the defaults.
    if _name != "flash_seq2seq":
        _register(_name, _preset)
