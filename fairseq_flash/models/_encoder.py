"""The encoder of flash_masked_lm and flash_seq2seq: a bidirectional stack."""

from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqEncoder
from torch import distributed, nn

from fairseq_flash.models._embedding import padding_as_words
from fairseq_flash.models._layers import build_stack
from fairseq_flash.models._options import NO_MAXIMUM, FlashConfig

__all__ = ["EncoderOut", "FlashEncoder"]

EncoderOut = dict[str, list[torch.Tensor]]


class FlashEncoder(FairseqEncoder):
    """A bidirectional FLASH stack as a fairseq encoder.

    Args:
        cfg: The options.
        dictionary: Of what is read.
        embed_tokens: From tokens ``(b, m)`` to ``(b, m, d)``.
        n_ref: Longest row of ``--attention quadratic --relative-bias toeplitz``.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    def __init__(self, cfg: FlashConfig, dictionary: Dictionary, embed_tokens: nn.Module, n_ref: int) -> None:
        super().__init__(dictionary)
        self.padding_idx = embed_tokens.padding_idx
        self.stack = build_stack(cfg, embed_tokens, causal=False, n_ref=n_ref)

    def features(
        self, src_tokens: torch.Tensor, group: Optional[distributed.ProcessGroup] = None
    ) -> torch.Tensor:
        """Features ``(b, m, d)`` of tokens ``(b, m)``, zero at padding; errors as :meth:`forward`.

        With a ``group``, the tokens are this process's part of the rows, as
        :func:`~fairseq_flash.modules.part_of_rows` cuts them.
        """
        src_tokens = padding_as_words(src_tokens, self.dictionary)
        return self.stack(src_tokens, src_tokens.eq(self.padding_idx), group=group)[0]

    def forward(
        self, src_tokens: torch.Tensor, src_lengths: Optional[torch.Tensor] = None, **unused: Any
    ) -> EncoderOut:
        """Reads a source.

        Args:
            src_tokens: ``(b, m)``; padding leads or trails, and is a word elsewhere.
            src_lengths: Ignored: the padding tells.
            unused: What fairseq passes to every encoder.

        Returns:
            As fairseq's own encoders: ``encoder_out``, a list of one tensor ``(m, b, d)``, and
            ``encoder_padding_mask``, a list of one ``(b, m)``, True at padding.

        Raises:
            ValueError: a row is longer than a Toeplitz table.
        """
        padding_mask = padding_as_words(src_tokens, self.dictionary).eq(self.padding_idx)
        encoder_out = self.features(src_tokens).transpose(0, 1)
        return {"encoder_out": [encoder_out], "encoder_padding_mask": [padding_mask]}

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
