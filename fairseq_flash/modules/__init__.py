"""FLASH as plain PyTorch modules, usable without fairseq; batch first throughout."""

from fairseq_flash.modules.alignment import Rows, align_rows, part_of_rows, restore_rows
from fairseq_flash.modules.attention import ATTENTIONS, LayerState
from fairseq_flash.modules.decoder_layer import DecoderLayer, DecoderLayerState
from fairseq_flash.modules.gated_attention_unit import GatedAttentionUnit
from fairseq_flash.modules.gated_cross_attention import GatedCrossAttention, SourceMemory
from fairseq_flash.modules.layer import INITS, AttentionLayer, Layer, LayerOptions
from fairseq_flash.modules.normalization import NORMS, ScaleNorm, build_norm
from fairseq_flash.modules.offset_scale import OffsetScale
from fairseq_flash.modules.pooling import POOLINGS, Pooling
from fairseq_flash.modules.positions import (
    RELATIVE_BIASES,
    RotaryBias,
    ScaledSin,
    ToeplitzBias,
    build_relative_bias,
)
from fairseq_flash.modules.row_memory import RowMemory
from fairseq_flash.modules.stack import Stack
from fairseq_flash.modules.state import DecodingState
from fairseq_flash.modules.step_graph import StepGraphs
from fairseq_flash.modules.transformer_block import TransformerBlock
from fairseq_flash.ops import BACKENDS, LINEAR_NORMS

__all__ = [
    "ATTENTIONS",
    "BACKENDS",
    "INITS",
    "LINEAR_NORMS",
    "NORMS",
    "POOLINGS",
    "RELATIVE_BIASES",
    "AttentionLayer",
    "DecoderLayer",
    "DecoderLayerState",
    "DecodingState",
    "GatedAttentionUnit",
    "GatedCrossAttention",
    "Layer",
    "LayerOptions",
    "LayerState",
    "OffsetScale",
    "Pooling",
    "RotaryBias",
    "RowMemory",
    "Rows",
    "ScaleNorm",
    "ScaledSin",
    "SourceMemory",
    "Stack",
    "StepGraphs",
    "ToeplitzBias",
    "TransformerBlock",
    "align_rows",
    "build_norm",
    "build_relative_bias",
    "part_of_rows",
    "restore_rows",
]
