"""Multi-query associative recall: keys and their values, then the keys again, whose values are asked for."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II

__all__ = ["RecallConfig", "RecallRows", "RecallTask"]


class RecallRows(FairseqDataset):
    """Rows that are made when they are asked for, from their number, split and seed alone.

    A row begins with ``pairs`` times a key and its value, all keys different. Then come, in any order and at
    any places from ``gap`` tokens behind the pairs on, the same keys, each of which is to be followed by its
    value. What stands between them are values drawn at random, never keys.

    Args:
        length: Tokens of a row, ``n``.
        pairs: Of a row.
        gap: Tokens between the pairs and the first place for a key.
        words: Keys, and as many values; the keys come first in ``dictionary``.
        rows: How many there are.
        stream: Tells the rows of one split and seed from those of others.
        dictionary: Of both.

    Raises:
        ValueError: the row has no room for its pairs and queries, or there are fewer keys than pairs.

    Source: Arora et al. 2023, Zoology (arXiv 2312.04927), whose queries lie closer to the pairs.
    """

    def __init__(
        self,
        length: int,
        pairs: int,
        gap: int,
        words: int,
        rows: int,
        stream: tuple[int, int],
        dictionary: Dictionary,
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("--pairs", pairs, 1),
            ("--recall-gap", gap, 0),
            ("--recall-words", words, pairs),
            ("--tokens-per-sample", length, 3 * pairs + gap),
        ):
            if value < least:
                raise ValueError(f"{option} {value} is not allowed; allowed: {least} or more")
        self.length, self.pairs, self.gap, self.words = length, pairs, gap, words
        self.stream, self.pad = stream, dictionary.pad()
        self.first_key, self.first_value = dictionary.nspecial, dictionary.nspecial + words
        self.sizes = np.full(rows, length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: what goes in, and the value behind each key that is asked for, padding elsewhere."""
        random = np.random.default_rng((*self.stream, index))
        keys = self.first_key + random.choice(self.words, self.pairs, replace=False)
        source = self.first_value + random.integers(self.words, size=self.length)
        begin = 2 * self.pairs
        source[0:begin:2] = keys
        places = begin + self.gap + random.choice(self.length - begin - self.gap, self.pairs, replace=False)
        source[places] = keys
        target = np.full(self.length, self.pad)
        target[places] = source[1:begin:2]
        return {"id": index, "source": torch.from_numpy(source), "target": torch.from_numpy(target)}

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> int:
        """Tokens of a row."""
        return self.length

    num_tokens = size

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch; its tokens are those that are asked for."""
        if not samples:
            return {}
        source, target = (torch.stack([sample[key] for sample in samples]) for key in ("source", "target"))
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": len(samples) * self.pairs,
            "net_input": {"src_tokens": source, "src_lengths": torch.full((len(samples),), self.length)},
            "target": target,
        }


@dataclass
class RecallConfig(FairseqDataclass):
    """Options of ``--task flash_recall``; there is no folder of data."""

    tokens_per_sample: int = field(default=256, metadata={"help": "tokens of a row"})
    pairs: int = field(default=16, metadata={"help": "of a key and a value in a row, each asked for once"})
    recall_gap: int = field(
        default=0,
        metadata={"help": "tokens between pairs and questions: --chunk-size puts all pairs in other chunks"},
    )
    recall_words: int = field(default=2048, metadata={"help": "keys, and as many values"})
    train_rows: int = field(default=100000, metadata={"help": "rows of the split train"})
    held_out_rows: int = field(default=1000, metadata={"help": "rows of every other split"})
    recall_seed: int = field(default=1, metadata={"help": "draws the rows"})
    # What fairseq's own language models take from their task.
    max_target_positions: int = II("task.tokens_per_sample")
    add_bos_token: bool = False


@register_task("flash_recall", dataclass=RecallConfig)
class RecallTask(FairseqTask):
    """Trains and evaluates language models of any kind on :class:`RecallRows`.

    ``--criterion label_smoothed_cross_entropy --report-accuracy`` logs the per cent of right values; its
    ``--label-smoothing`` is 0 by default.

    Args:
        cfg: The options.
    """

    cfg: RecallConfig

    def __init__(self, cfg: RecallConfig) -> None:
        super().__init__(cfg)
        self.dictionary = Dictionary()
        for kind in ("key", "value"):
            for number in range(cfg.recall_words):
                self.dictionary.add_symbol(f"{kind}{number}")

    @property
    def source_dictionary(self) -> Dictionary:
        """Keys, then values."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The same."""
        return self.dictionary

    def max_positions(self) -> int:
        """Of the task's own rows."""
        return self.cfg.tokens_per_sample

    def load_dataset(self, split: str, **unused: Any) -> None:
        """Makes a split; each name has rows of its own.

        Raises:
            ValueError: as :class:`RecallRows`.
        """
        cfg = self.cfg
        rows = cfg.train_rows if split == "train" else cfg.held_out_rows
        stream = cfg.recall_seed, int.from_bytes(split.encode(), "little")
        self.datasets[split] = RecallRows(
            cfg.tokens_per_sample, cfg.pairs, cfg.recall_gap, cfg.recall_words, rows, stream, self.dictionary
        )
