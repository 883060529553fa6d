"""Options of the three models."""

import dataclasses
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_flash.models._loss import LOSSES
from fairseq_flash.modules import (
    ATTENTIONS,
    BACKENDS,
    INITS,
    LINEAR_NORMS,
    NORMS,
    POOLINGS,
    RELATIVE_BIASES,
)

__all__ = [
    "BLOCKS",
    "NO_MAXIMUM",
    "FlashConfig",
    "FlashLanguageModelConfig",
    "FlashMaskedLMConfig",
    "FlashSeq2SeqConfig",
    "UnitConfig",
    "stack_options",
]

BLOCKS = ("gau", "transformer")
#: Ours have no maximum; fairseq wants an integer, and silently skips rows beyond it.
NO_MAXIMUM = 2**30


@dataclass
class UnitConfig(FairseqDataclass):
    """What all models share; one field an option, ``embed_dim`` for ``--embed-dim``."""

    embed_dim: int = field(default=512, metadata={"help": "model dimension d, even"})
    expansion_factor: int = field(
        default=2, metadata={"help": "expanded dimension e of --block gau as a multiple of d"}
    )
    attention_dim: int = field(
        default=128, metadata={"help": "dimension s of the single head, even; of each head of a transformer"}
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
        metadata={
            "help": "divide the linear branch by the chunk size (the paper) or by the tokens summed; fading, "
            "for causal models, weighs earlier chunks less and less"
        },
    )
    shift_keys: bool = field(
        default=False,
        metadata={
            "help": "half of the columns of the keys of --block gau are of the token before, so that one "
            "layer finds what came after an earlier token like this one"
        },
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
            "help": "length that causal quadratic scores are divided by; default: tokens per sample, or in "
            "translation --max-target-positions, kept in the checkpoint"
        },
    )
    dropout: float = field(
        default=0.1, metadata={"help": "dropout of the embeddings and of each layer's branch"}
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute each layer in the backward pass to save memory"}
    )
    offload_activations: bool = field(
        default=False,
        metadata={"help": "as --checkpoint-activations, with the layers' inputs kept in CPU memory"},
    )
    change_trained_options: bool = field(
        default=False,
        metadata={
            "help": "take a checkpoint that was trained with other options, such as another --chunk-size, "
            "where its weights fit: a warning in place of an error"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "torch.compile for the layers; on a GPU passes of training are recorded as CUDA graphs; "
            "decoding stays as it is"
        },
    )
    backend: ChoiceEnum(list(BACKENDS)) = field(
        default="auto",
        metadata={"help": "implementation of the attention: auto takes the fastest that can run"},
    )


@dataclass
class FlashConfig(UnitConfig):
    """Options of one stack of layers: gated attention units, or Transformer layers to compare them with."""

    block: ChoiceEnum(list(BLOCKS)) = field(
        default="gau", metadata={"help": "gated attention units, or Transformer layers to compare them with"}
    )
    layers: int = field(default=12, metadata={"help": "blocks; two units stand for a Transformer layer"})
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
    attention_dropout: float = field(
        default=0.0,
        metadata={"help": "for the softmax of --block transformer alone: other rows are not normalised"},
    )
    diagnostics_interval: int = field(
        default=0,
        metadata={
            "help": "updates between two reports on the layers (sizes of branches, gates, sparsity of the "
            "attention) to --tensorboard-logdir and the log; 0: none, at no cost"
        },
    )


@dataclass
class FlashLanguageModelConfig(FlashConfig):
    """Options of ``--arch flash_lm``; names as in ``transformer_lm`` where it has them."""

    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    adaptive_input: bool = field(default=False, metadata={"help": "if set, uses adaptive input"})
    adaptive_input_factor: float = field(default=4, metadata={"help": "adaptive input factor"})
    adaptive_input_cutoff: Optional[str] = field(
        default=None, metadata={"help": "comma separated list of adaptive input cutoff points"}
    )
    adaptive_softmax_cutoff: Optional[str] = field(
        default=None,
        metadata={"help": "comma separated list of adaptive softmax cutoff points, for adaptive_loss"},
    )
    adaptive_softmax_dropout: float = field(
        default=0, metadata={"help": "dropout of the adaptive softmax's tail projections"}
    )
    adaptive_softmax_factor: float = field(default=4, metadata={"help": "adaptive softmax factor"})
    tie_adaptive_weights: bool = field(
        default=False, metadata={"help": "tie the weights of adaptive softmax and adaptive input"}
    )
    tie_adaptive_proj: bool = field(
        default=False, metadata={"help": "tie the projections of adaptive softmax and adaptive input"}
    )
    vocabulary_loss: Optional[ChoiceEnum(list(LOSSES))] = field(
        default=None,
        metadata={
            "help": "how --criterion cross_entropy takes the loss over the vocabulary in training: plain, "
            "compiled (the default with --compile), or chunked, which never holds all logits"
        },
    )
    no_graph: bool = field(
        default=False,
        metadata={"help": "do not record the steps of generation on a GPU as CUDA graphs"},
    )


@dataclass
class FlashMaskedLMConfig(FlashConfig):
    """Options of ``--arch flash_masked_lm``; names as in ``roberta`` where it has them."""

    embed_dim: int = field(default=768, metadata={"help": "model dimension d, even"})
    layers: int = field(default=24, metadata={"help": "units; two stand for a Transformer layer"})
    untie_weights_roberta: bool = field(
        default=False, metadata={"help": "give the output its own weights in place of the embeddings"}
    )
    pooler_dropout: float = field(default=0.0, metadata={"help": "dropout inside classification heads"})
    pooling: ChoiceEnum(list(POOLINGS)) = field(
        default="first",
        metadata={"help": "what classification heads see: the first token, or all, evenly or by attention"},
    )
    load_checkpoint_heads: bool = field(
        default=False, metadata={"help": "register the classification heads that a checkpoint holds"}
    )
    max_positions: int = field(
        default=512,
        metadata={"help": "longest row that --task sentence_prediction takes; the model has no maximum"},
    )


@dataclass
class FlashSeq2SeqConfig(UnitConfig):
    """Options of ``--arch flash_seq2seq``; names as in ``flash_lm`` and ``transformer``."""

    encoder_layers: int = field(default=7, metadata={"help": "gated attention units of the encoder"})
    decoder_layers: int = field(
        default=6, metadata={"help": "layers of the decoder: each a unit of the target and one of the source"}
    )
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    share_all_embeddings: bool = field(
        default=False,
        metadata={"help": "share encoder, decoder and output embeddings; needs a joined dictionary"},
    )


def stack_options(cfg: FlashSeq2SeqConfig, layers: int) -> FlashLanguageModelConfig:
    """The options of the encoder or the decoder, with so many ``layers``, as those of a flash_lm."""
    shared = {option.name: getattr(cfg, option.name) for option in dataclasses.fields(UnitConfig)}
    del shared["_name"]
    tied = cfg.share_decoder_input_output_embed or cfg.share_all_embeddings
    return FlashLanguageModelConfig(layers=layers, share_decoder_input_output_embed=tied, **shared)
