"""Masked language modeling on rows that several processes share."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

from fairseq_flash.tasks._sequence_parallel import SequenceParallel, SequenceParallelConfig

__all__ = ["FlashMaskedLMTask", "FlashMaskedLMTaskConfig"]


@dataclass
class FlashMaskedLMTaskConfig(SequenceParallelConfig, MaskedLMConfig):
    """Options of ``--task flash_masked_lm``."""


@register_task("flash_masked_lm", dataclass=FlashMaskedLMTaskConfig)
class FlashMaskedLMTask(SequenceParallel, MaskedLMTask):
    """fairseq's ``masked_lm``, with ``--sequence-parallel-size``."""
