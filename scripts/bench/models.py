"""Models of random weights, as fairseq-train would build them, and the architectures that there are."""

from typing import Any

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY, FairseqEncoderDecoderModel, FairseqEncoderModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import nn

from fairseq_flash.models.flash_lm import FlashLanguageModel

__all__ = ["build", "bytes_of", "language_models"]


def build(arguments: list[str], vocabulary: int) -> nn.Module:
    """The model that fairseq-train would build from these options, with a dictionary of made-up words."""
    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"word{index}")
    parser = options.get_training_parser()
    model = ARCH_MODEL_REGISTRY[parser.parse_known_args(["data", *arguments])[0].arch]
    kinds = {FairseqEncoderModel: "masked_lm", FairseqEncoderDecoderModel: "translation"}
    task = next((task for kind, task in kinds.items() if issubclass(model, kind)), "language_modeling")
    args = options.parse_args_and_arch(parser, ["data", "--task", task, *arguments])
    cfg = convert_namespace_to_omegaconf(args)
    dictionaries = [dictionary] * (2 if task == "translation" else 1)
    return tasks.TASK_REGISTRY[task](cfg.task, *dictionaries).build_model(cfg.model)


def bytes_of(value: Any) -> int:
    """Of every tensor inside dicts and tuples, such as an incremental state."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return sum(bytes_of(part) for part in parts)


def language_models() -> list[str]:
    """Architectures that can be described, as far as their options allow."""
    return sorted(
        name
        for name, model in ARCH_MODEL_REGISTRY.items()
        if model in (FlashLanguageModel, TransformerLanguageModel)
    )
