"""flash_seq2seq: an encoder-decoder of gated attention units, for translation."""

from typing import Any, Optional

import torch
from fairseq.models import FairseqEncoderDecoderModel, register_model

from fairseq_flash.models._embedding import build_embedding, padding_as_words
from fairseq_flash.models._encoder import EncoderOut, FlashEncoder
from fairseq_flash.models._layers import resolve_n_ref
from fairseq_flash.models._option_checks import check_direction, check_sizes
from fairseq_flash.models._options import FlashSeq2SeqConfig, stack_options
from fairseq_flash.models._presets import SEQ2SEQ_PAIRS as PAIRS
from fairseq_flash.models._presets import SEQ2SEQS, register
from fairseq_flash.models._trained import RememberingModel
from fairseq_flash.models.flash_lm import NEXT_WORD, FlashDecoder

__all__ = ["PAIRS", "PRESETS", "FlashEncoder", "FlashSeq2Seq", "FlashSeq2SeqConfig", "FlashSeq2SeqDecoder"]


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

    reads_source = True

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
            prev_output_tokens: ``(b, n)``; padding leads or trails, and is a word elsewhere.
            encoder_out: From the encoder, of as many rows.
            incremental_state: fairseq's, during generation; then only the last position is returned.
            unused_memory: A target does not continue another batch's.
            unused: What fairseq passes to every model.

        Returns:
            ``(b, n, d)``; and None, in place of attention weights.

        Raises:
            ValueError: there is no ``encoder_out``, or a row is longer than a Toeplitz table.
        """
        if encoder_out is None:
            raise ValueError("encoder_out=None is not allowed; allowed: what the encoder returned")
        source = {
            "source": encoder_out["encoder_out"][0].transpose(0, 1),
            "source_padding_mask": encoder_out["encoder_padding_mask"][0],
        }
        if incremental_state is not None:
            return self._advance(prev_output_tokens, incremental_state, **source), None
        prev_output_tokens = padding_as_words(prev_output_tokens, self.dictionary)
        padding_mask = prev_output_tokens.eq(self.padding_idx)
        return self.stack(prev_output_tokens, padding_mask, **source)[0], None


@register_model("flash_seq2seq", dataclass=FlashSeq2SeqConfig)
class FlashSeq2Seq(RememberingModel, FairseqEncoderDecoderModel):
    """FLASH as an encoder-decoder: rows of any length on both sides, at linear cost but for the reading.

    Source: Hua et al. 2022 for the units; the cross-attention is the unit of section 3.1, whose values and
    keys come from the source.
    """

    #: Of fairseq's, those that train it.
    allowed_criterions = NEXT_WORD

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
        if getattr(getattr(task, "cfg", None), "load_alignments", False):
            raise ValueError(
                "--load-alignments (of label_smoothed_cross_entropy_with_alignment) is not allowed: gated "
                "attention gives no weights to align; allowed: without"
            )
        n_ref = resolve_n_ref(cfg, task)
        check_direction(cfg)
        options = stack_options(cfg, cfg.encoder_layers)
        check_sizes(options)
        encoder = FlashEncoder(options, sources, build_embedding(options, sources), n_ref)
        options = stack_options(cfg, cfg.decoder_layers)
        shared = encoder.stack.embed_tokens if cfg.share_all_embeddings else None
        embed_tokens = shared or build_embedding(options, targets)
        model = cls(encoder, FlashSeq2SeqDecoder(options, targets, embed_tokens, n_ref))
        model.remember(cfg, FlashSeq2SeqConfig, sources, targets)
        return model

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuses a checkpoint of other dictionaries.

        Raises:
            ValueError: one has another size.
        """
        for side, coder, weight in (
            ("source", self.encoder, "encoder.stack.embed_tokens.weight"),
            ("target", self.decoder, "decoder.output_projection.weight"),
        ):
            stored = state_dict.get(weight)
            if stored is not None and len(stored) != len(coder.dictionary):
                raise ValueError(
                    f"the dictionary of the {side} has {len(coder.dictionary)} words; allowed: "
                    f"{len(stored)}, those that the checkpoint was trained with"
                )
        super().upgrade_state_dict_named(state_dict, name)


PRESETS = register("flash_seq2seq", FlashSeq2SeqConfig, SEQ2SEQS)
