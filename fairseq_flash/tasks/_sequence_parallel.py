"""Rows over many processes: those of a group read the same rows, and each takes its part of every one.

What fairseq does with the processes' gradients is right as it is. Each process computes the gradients of the
whole group's loss with respect to its own copy of the parameters; fairseq takes their mean over all
processes, and multiplies it by their number over the sum of the sample sizes, for which each part counts its
own tokens. So there are no other gradients, norms, updates and checkpoints than of one process.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.dataclass import FairseqDataclass
from torch import distributed

from fairseq_flash.models._embedding import padding_as_words
from fairseq_flash.modules import part_of_rows

__all__ = ["SequenceParallel", "SequenceParallelConfig"]

#: Criterions whose sample size is the number of the tokens that they sum over.
CRITERIONS = {"cross_entropy": CrossEntropyCriterion, "masked_lm": MaskedLmLoss}


@dataclass
class SequenceParallelConfig(FairseqDataclass):
    """The option of tasks that can share rows."""

    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "processes that share each row, every one with its part, in training and validation; "
            "the number of all processes is a multiple of it"
        },
    )


class SequenceParallel:
    """What a task needs besides; to be named before fairseq's own among its bases.

    Ranks ``k R`` to ``(k + 1) R - 1`` are a group: batches go to groups as they otherwise go to ranks.
    Outside of training and validation, such as in generation, the option has no effect.
    """

    _group: Optional[distributed.ProcessGroup] = None
    _chunk_size = 1

    @property
    def sequence_parallel_size(self) -> int:
        """Processes that share each row.

        Raises:
            ValueError: it is below 1.
        """
        size = getattr(getattr(self, "args", self.cfg), "sequence_parallel_size", 1)
        if size < 1:
            raise ValueError(f"--sequence-parallel-size {size} is not allowed; allowed: 1 or more")
        return size

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """As fairseq's; rows are shared by models whose layers can."""
        size, model = self.sequence_parallel_size, super().build_model(cfg, from_checkpoint)
        if size == 1:
            return model
        option = f"--sequence-parallel-size {size} is not allowed with"
        side = getattr(model, "decoder", None) or getattr(model, "encoder", None)
        blocks = getattr(getattr(side, "stack", None), "blocks", ())
        kinds = {str(getattr(block, "attention", "quadratic")) for block in blocks}
        if not kinds or "quadratic" in kinds:
            found = f"--attention {', '.join(kinds)}" if kinds else f"a {type(model).__name__}"
            raise ValueError(
                f"{option} {found}; allowed: models of this package with --attention mixed_chunk, local or "
                "global, whose layers tell each other no more than a state of constant size"
            )
        if getattr(cfg, "compile", False):
            raise ValueError(f"{option} --compile; allowed: without")
        self._chunk_size = blocks[0].chunk_size
        return model

    def build_criterion(self, cfg: Any, *args: Any) -> Any:
        """As fairseq's; training and validation begin here, and with them the groups."""
        criterion, size = super().build_criterion(cfg, *args), self.sequence_parallel_size
        if size == 1:
            return criterion
        option = f"--sequence-parallel-size {size} is not allowed with"
        if type(criterion) not in CRITERIONS.values():
            found = f"--criterion {getattr(cfg, '_name', type(criterion).__name__)}"
            raise ValueError(f"{option} {found}; allowed: {', '.join(CRITERIONS)}")
        if getattr(criterion, "sentence_avg", False):
            raise ValueError(f"{option} --sentence-avg, as no process has whole rows; allowed: without")
        if distributed.is_initialized():
            processes = distributed.get_world_size()
            if processes % size:
                raise ValueError(f"{option} {processes} processes; allowed: divisors of {processes}")
            self._group, _ = distributed.new_subgroups(size)
        return criterion

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """As fairseq's, unless rows shall be shared by a process alone."""
        if self.sequence_parallel_size > 1 and self._group is None:
            raise ValueError(
                f"--sequence-parallel-size {self.sequence_parallel_size} is not allowed with 1 process; "
                "allowed: 1, or as many processes or a multiple"
            )
        super().begin_epoch(epoch, model)

    def get_batch_iterator(self, *args: Any, num_shards: int = 1, shard_id: int = 0, **kwargs: Any) -> Any:
        """As fairseq's, with the same batches for all processes of a group."""
        if self._group is not None and num_shards > 1:
            num_shards, shard_id = num_shards // self._group.size(), shard_id // self._group.size()
        return super().get_batch_iterator(*args, num_shards=num_shards, shard_id=shard_id, **kwargs)

    def train_step(self, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, on this process's part of the rows."""
        if self._group is None:
            return super().train_step(sample, *args, **kwargs)
        # fairseq seeds all processes alike; what dropout leaves of the parts of a row shall differ.
        utils.set_torch_seed(int(torch.randint(2**62, ())) + self._group.rank())
        return self._counted_once(super().train_step(self._part(sample), *args, **kwargs))

    def valid_step(self, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, on this process's part of the rows."""
        if self._group is None:
            return super().valid_step(sample, *args, **kwargs)
        return self._counted_once(super().valid_step(self._part(sample), *args, **kwargs))

    def _part(self, sample: dict[str, Any]) -> dict[str, Any]:
        inputs, pad = sample["net_input"], self.source_dictionary.pad()
        tokens, target = padding_as_words(inputs["src_tokens"], self.source_dictionary), sample["target"]
        padding_mask = tokens.eq(pad)
        (tokens, mask), (target, _) = (
            part_of_rows(x, padding_mask, self._chunk_size, self._group) for x in (tokens, target)
        )
        lengths = (~mask).sum(1)
        tokens, target = tokens.masked_fill(mask, pad), target.masked_fill(mask, pad)
        inputs = {**inputs, "src_tokens": tokens, "src_lengths": lengths, "group": self._group}
        return {**sample, "net_input": inputs, "target": target, "ntokens": int(lengths.sum())}

    def _counted_once(self, result: tuple[Any, Any, dict[str, Any]]) -> tuple[Any, Any, dict[str, Any]]:
        """Rows are those of the whole group: one of its processes reports them."""
        loss, sample_size, logged = result
        return loss, sample_size, {**logged, "nsentences": logged["nsentences"] * (self._group.rank() == 0)}
