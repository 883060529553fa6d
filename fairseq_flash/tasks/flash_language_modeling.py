"""Language modeling with a state of constant size: prompts read at once, documents of any length."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq import utils
from fairseq.data import data_utils, iterators
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_flash.modules import RowMemory
from fairseq_flash.tasks._documents import DocumentSegments
from fairseq_flash.tasks._prompt_pass import PromptPassGenerator
from fairseq_flash.tasks._sequence_parallel import SequenceParallel, SequenceParallelConfig

__all__ = ["FlashLanguageModelingConfig", "FlashLanguageModelingTask"]

#: What gives a row other targets than the next token of each.
OTHER_TARGETS = {"self_target": False, "past_target": False}
#: Options that say how samples are made, and the one value that leaves documents whole.
WHOLE_DOCUMENTS = {
    "sample_break_mode": "none",
    "add_bos_token": False,
    **OTHER_TARGETS,
    "shorten_method": "none",
    "output_dictionary_size": -1,
    "pad_to_fixed_length": False,
    "pad_to_fixed_bsz": False,
}


@dataclass
class FlashLanguageModelingConfig(SequenceParallelConfig, LanguageModelingConfig):
    """Options of ``--task flash_language_modeling``."""

    carry_state: bool = field(
        default=False,
        metadata={
            "help": "cut documents (separated by an empty line) into consecutive segments of "
            "--tokens-per-sample and carry the state from segment to segment"
        },
    )


@register_task("flash_language_modeling", dataclass=FlashLanguageModelingConfig)
class FlashLanguageModelingTask(SequenceParallel, LanguageModelingTask):
    """fairseq's ``language_modeling``, with a bulk prompt pass and, if asked for, documents of any length.

    Generation reads each prompt in one forward pass (:class:`PromptPassGenerator`), with the same result.

    ``--carry-state`` trains and evaluates on whole documents at the memory of one segment: the rows of a
    batch continue those of the batch before, gradients end at the segment (truncated backpropagation), and
    the state starts anew with each document. An evaluation gives what a single pass over each document would
    give. Training, validation and each split have states of their own. ``--batch-size`` (or ``--max-tokens``)
    is the number of documents read side by side; training shuffles documents, not segments. States are not
    saved: a training run that resumes within a document reads on with an empty state.

    Args:
        args: The options.
        dictionary: Of the input.
        output_dictionary: Of the output; None for the same.
        targets: Kinds of targets; None for ``["future"]``.

    Raises:
        ValueError: ``--carry-state`` with an option or a model that it cannot serve.
    """

    def __init__(
        self, args: Any, dictionary: Any, output_dictionary: Any = None, targets: Optional[list[str]] = None
    ) -> None:
        super().__init__(args, dictionary, output_dictionary, targets)
        self.carry_state = getattr(args, "carry_state", False)
        self._memories: dict[tuple[str, bool], RowMemory] = defaultdict(RowMemory)
        if self.carry_state:
            _check_options(args, WHOLE_DOCUMENTS, "--carry-state")
        if self.sequence_parallel_size > 1:
            options = {**OTHER_TARGETS, "carry_state": False}
            _check_options(args, options, f"--sequence-parallel-size {self.sequence_parallel_size}")

    def build_model(self, args: Any, from_checkpoint: bool = False) -> Any:
        """As fairseq's; ``--carry-state`` needs a model whose state does not grow."""
        model = super().build_model(args, from_checkpoint)
        blocks = getattr(getattr(model.decoder, "stack", None), "blocks", ())
        constant = blocks and all(getattr(block, "attention", "quadratic") != "quadratic" for block in blocks)
        if self.carry_state and not constant:
            raise ValueError(
                "--carry-state is not allowed with this model; allowed: models with a state of constant "
                "size, such as flash_lm with any --attention but quadratic"
            )
        return model

    def build_generator(
        self,
        models: Any,
        args: Any,
        seq_gen_cls: Optional[type] = None,
        extra_gen_cls_kwargs: Optional[dict[str, Any]] = None,
        prefix_allowed_tokens_fn: Any = None,
    ) -> SequenceGenerator:
        """As fairseq's, reading each prompt at once unless alignments are asked for."""
        if seq_gen_cls is None and not getattr(args, "print_alignment", None):
            seq_gen_cls = PromptPassGenerator
        return super().build_generator(
            models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn
        )

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """As fairseq's; with ``--carry-state``, as segments of whole documents."""
        if not self.carry_state:
            super().load_dataset(split, epoch, combine, **kwargs)
            return
        folders = utils.split_paths(self.args.data)
        path = os.path.join(folders[(epoch - 1) % len(folders)], split)
        lines = data_utils.load_indexed_dataset(
            path, self.dictionary, self.args.dataset_impl, combine=combine
        )
        if lines is None:
            raise FileNotFoundError(f"Dataset not found: {split} ({path})")
        ends = {"pad": self.dictionary.pad(), "eos": self.dictionary.eos()}
        self.datasets[split] = DocumentSegments(lines, self.args.tokens_per_sample, name=split, **ends)

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        **kwargs: Any,
    ) -> Any:
        """As fairseq's; segments come in the order of their documents, which the epoch shuffles."""
        if not isinstance(dataset, DocumentSegments):
            return super().get_batch_iterator(dataset, max_tokens, max_sentences, **kwargs)
        seed = kwargs.get("seed", 1) + kwargs.get("epoch", 1)
        return self._iterator(dataset, max_tokens, max_sentences, seed, **kwargs)

    def eval_lm_dataloader(
        self,
        dataset: Any,
        max_tokens: Optional[int] = 36000,
        batch_size: Optional[int] = None,
        context_window: int = 0,
        **kwargs: Any,
    ) -> Any:
        """As fairseq's; with ``--carry-state`` every batch brings the state of its documents along."""
        if not isinstance(dataset, DocumentSegments):
            return super().eval_lm_dataloader(
                dataset, max_tokens, batch_size, context_window=context_window, **kwargs
            )
        if context_window:
            raise ValueError(
                f"--context-window {context_window} is not allowed with --carry-state, which gives every "
                "token its whole document as context; allowed: 0"
            )
        batches = self._iterator(dataset, max_tokens, batch_size, None, **kwargs)
        samples = batches.next_epoch_itr(shuffle=False)
        carried = (self._carry(sample, training=False) for sample in samples)
        return iterators.CountingIterator(carried, start=0, total=len(samples))

    def train_step(
        self,
        sample: Any,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> Any:
        """As fairseq's, on rows that continue those of the step before."""
        if not ignore_grad:
            sample = self._carry(sample, training=True)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def valid_step(self, sample: Any, model: Any, criterion: Any) -> Any:
        """As fairseq's, on rows that continue those of the step before."""
        return super().valid_step(self._carry(sample, training=False), model, criterion)

    def _carry(self, sample: Any, training: bool) -> Any:
        """The batch with the memory of its split."""
        if "rows" not in sample:
            return sample
        rows = sample["rows"]
        memory = self._memories[rows["split"], training]
        memory.announce(rows["names"], rows["next_names"])
        return {**sample, "net_input": {**sample["net_input"], "memory": memory}}

    def _iterator(
        self,
        dataset: DocumentSegments,
        max_tokens: Optional[int],
        max_sentences: Optional[int],
        shuffle_seed: Optional[int],
        **loading: Any,
    ) -> iterators.EpochBatchIterator:
        """Batches whose rows go on from one to the next; of fairseq's options, ``loading``, what matters."""
        limits = [max_sentences, max_tokens and max(1, max_tokens // self.args.tokens_per_sample)]
        rows = min((limit for limit in limits if limit), default=1)
        names = ("num_shards", "shard_id", "num_workers", "epoch", "skip_remainder_batch")
        return iterators.EpochBatchIterator(
            dataset,
            dataset.collater,
            dataset.batches(rows, loading.get("num_shards", 1), shuffle_seed),
            buffer_size=loading.get("data_buffer_size", 0),
            disable_shuffling=True,
            **{name: loading[name] for name in names if name in loading},
        )


def _check_options(args: Any, allowed: dict[str, Any], reason: str) -> None:
    for name, only in allowed.items():
        value = getattr(args, name, None)
        if value not in (None, only):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value} is not allowed with {reason}; allowed: {only}")
