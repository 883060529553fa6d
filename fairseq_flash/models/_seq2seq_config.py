"""Options and architectures of flash_seq2seq."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_flash.models._config import FlashConfig
from fairseq_flash.models.flash_lm import FlashLanguageModelConfig
from fairseq_flash.modules import ATTENTIONS, BACKENDS, INITS, LINEAR_NORMS, NORMS, RELATIVE_BIASES

__all__ = ["PAIRS", "PRESETS", "FlashSeq2SeqConfig", "stack_options"]

#: Architectures by name, each with its difference from the model's defaults. The tiny one's chunk, by which
#: scores are divided, holds a sentence; twice as long, a toy language took more updates to learn.
PRESETS = {
    "flash_seq2seq": dict(),
    "flash_seq2seq_tiny": dict(embed_dim=256, encoder_layers=6, decoder_layers=3, chunk_size=64),
    "flash_seq2seq_wmt": dict(encoder_layers=12, decoder_layers=7),
}
#: What each has as many parameters as, within 5 %.
PAIRS = {
    "flash_seq2seq": "transformer_iwslt_de_en",
    "flash_seq2seq_tiny": "3 + 3 Transformer layers of 256, 4 heads, feed-forward width 1024",
    "flash_seq2seq_wmt": "transformer_wmt_en_de",
}


def _option(name: str, **changes: Any) -> Any:
    """The option ``name`` of flash_lm, default and help, where ``changes`` do not say otherwise."""
    shared = FlashConfig.__dataclass_fields__[name]
    help_text = changes.get("help", shared.metadata["help"])
    return field(default=changes.get("default", shared.default), metadata={"help": help_text})


@dataclass
class FlashSeq2SeqConfig(FairseqDataclass):
    """Options of ``--arch flash_seq2seq``; names as in ``flash_lm`` and ``transformer``."""

    embed_dim: int = _option("embed_dim")
    encoder_layers: int = field(default=7, metadata={"help": "gated attention units of the encoder"})
    decoder_layers: int = field(
        default=6, metadata={"help": "layers of the decoder: each a unit of the target and one of the source"}
    )
    expansion_factor: int = _option("expansion_factor", help="expanded dimension e as a multiple of d")
    attention_dim: int = _option("attention_dim", help="dimension s of the single head, even")
    attention: ChoiceEnum(list(ATTENTIONS)) = _option(
        "attention",
        help="of encoder and decoder: mixed_chunk is FLASH, quadratic FLASH-Quad; local, global: one branch",
    )
    chunk_size: int = _option("chunk_size")
    linear_norm: ChoiceEnum(list(LINEAR_NORMS)) = _option("linear_norm")
    norm: ChoiceEnum(list(NORMS)) = _option("norm")
    relative_bias: Optional[ChoiceEnum(list(RELATIVE_BIASES))] = _option("relative_bias")
    init: ChoiceEnum(list(INITS)) = _option("init")
    scaled_sin: bool = _option("scaled_sin")
    n_ref: Optional[int] = _option(
        "n_ref",
        help="length that causal quadratic scores are divided by; default: --max-target-positions in "
        "training, kept in the checkpoint",
    )
    dropout: float = _option("dropout")
    checkpoint_activations: bool = _option("checkpoint_activations")
    offload_activations: bool = _option("offload_activations")
    backend: ChoiceEnum(list(BACKENDS)) = _option("backend")
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    share_all_embeddings: bool = field(
        default=False,
        metadata={"help": "share encoder, decoder and output embeddings; needs a joined dictionary"},
    )


def stack_options(cfg: FlashSeq2SeqConfig, layers: int) -> FlashLanguageModelConfig:
    """The options of the encoder or of the decoder, as those of a flash_lm.

    Args:
        cfg: The options.
        layers: Of the encoder or of the decoder.

    Returns:
        The options.
    """
    shared = {option.name for option in dataclasses.fields(FlashConfig)} - {"_name"}
    own = [option.name for option in dataclasses.fields(FlashSeq2SeqConfig) if option.name in shared]
    tied = cfg.share_decoder_input_output_embed or cfg.share_all_embeddings
    return FlashLanguageModelConfig(
        layers=layers, share_decoder_input_output_embed=tied, **{name: getattr(cfg, name) for name in own}
    )
