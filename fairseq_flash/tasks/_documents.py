"""Documents cut into consecutive segments, in batches whose rows continue the rows of the batch before."""

import heapq
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import FairseqDataset, data_utils

__all__ = ["DocumentSegments"]


class DocumentSegments(FairseqDataset):
    """Segments of documents for language modeling; a segment never reaches into another document.

    A document ends with an empty line, which is a lone ``</s>`` and belongs to it, or with the data. The
    first token of each is predicted from ``</s>``, as at the start of the data. Every token is a target once.

    Args:
        lines: The indexed dataset, an item a line that ends with ``</s>``.
        tokens_per_segment: Length of all segments but a document's last.
        name: The split, by which the task tells the batches of different datasets apart.
        pad: Index of the padding symbol.
        eos: Index of ``</s>``.

    Raises:
        ValueError: there are no lines, or ``tokens_per_segment`` is not positive.
    """

    def __init__(self, lines: Any, tokens_per_segment: int, *, name: str, pad: int, eos: int) -> None:
        super().__init__()
        if tokens_per_segment < 1:
            raise ValueError(f"tokens_per_sample={tokens_per_segment} is not allowed; allowed: 1 or more")
        if not len(lines):
            raise ValueError(f"the split {name!r} has no lines")
        self.lines, self.name, self.pad, self.eos = lines, name, pad, eos
        self._line_ends = np.cumsum(np.asarray(lines.sizes, dtype=np.int64))
        ends = self._line_ends[_last_lines(lines, eos)]
        begins = np.concatenate(([0], ends[:-1]))
        counts = -(-(ends - begins) // tokens_per_segment)
        #: Index of each document's first segment, and behind the last document the number of segments.
        self.first_segments = np.concatenate(([0], np.cumsum(counts)))
        self.documents = np.repeat(np.arange(len(ends)), counts)
        number = np.arange(len(self.documents)) - self.first_segments[self.documents]
        self._document_begins = begins[self.documents]
        self._begins = self._document_begins + number * tokens_per_segment
        self._ends = np.minimum(self._begins + tokens_per_segment, ends[self.documents])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One segment: what goes in, what is to be predicted, and where it lies."""
        begin, end = int(self._begins[index]), int(self._ends[index])
        first = int(self._document_begins[index])
        tokens = self._read(max(begin - 1, first), end)
        if begin == first:
            tokens = torch.cat((tokens.new_tensor([self.eos]), tokens))
        document = int(self.documents[index])
        names = (document, begin - first), (document, end - first)
        return {"id": index, "source": tokens[:-1], "target": tokens[1:], "names": names}

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each segment."""
        return self._ends - self._begins

    def size(self, index: int) -> int:
        """Tokens of a segment."""
        return int(self.sizes[index])

    num_tokens = size

    def batches(self, rows: int, shards: int = 1, seed: Optional[int] = None) -> list[list[int]]:
        """Batches of segments: each row goes through whole documents, segment by segment.

        Rows are filled as evenly as whole documents allow; those that come to their end are left out of the
        batches that remain.

        Args:
            rows: Of a batch, at most.
            shards: Processes that share the batches: the first takes batches 0, ``shards``, and so on.
            seed: Shuffles the documents; None for their own order.

        Returns:
            Indices of segments; a batch is empty where a process has run out of documents.
        """
        order = np.arange(len(self.first_segments) - 1)
        if seed is not None:
            np.random.RandomState(seed % 2**32).shuffle(order)
        streams = self._streams(order, rows * shards)
        longest = max(len(stream) for stream in streams)
        return [
            [stream[step] for stream in streams[shard::shards] if step < len(stream)]
            for step in range(longest)
            for shard in range(shards)
        ]

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch, right-padded; ``rows`` says which split it is of and what each row continues."""
        if not samples:
            return {}
        source, target = (
            data_utils.collate_tokens([sample[key] for sample in samples], self.pad)
            for key in ("source", "target")
        )
        lengths = torch.tensor([len(sample["source"]) for sample in samples])
        names, next_names = zip(*(sample["names"] for sample in samples), strict=True)
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": int(lengths.sum()),
            "net_input": {"src_tokens": source, "src_lengths": lengths},
            "target": target,
            "rows": {"split": self.name, "names": names, "next_names": next_names},
        }

    def _streams(self, order: np.ndarray, count: int) -> list[list[int]]:
        """Deals documents, the longest first, to the shortest stream; within one they keep ``order``."""
        counts = np.diff(self.first_segments)
        shortest = [(0, stream) for stream in range(count)]
        dealt = np.empty(len(order), dtype=np.int64)
        for document in order[np.argsort(-counts[order], kind="stable")]:
            length, stream = heapq.heappop(shortest)
            dealt[document] = stream
            heapq.heappush(shortest, (length + int(counts[document]), stream))
        streams = [[] for _ in range(count)]
        for document in order:
            segments = range(self.first_segments[document], self.first_segments[document + 1])
            streams[dealt[document]].extend(segments)
        return streams

    def _read(self, begin: int, end: int) -> torch.Tensor:
        """Tokens of the whole data from ``begin`` up to ``end``."""
        first, last = np.searchsorted(self._line_ends, [begin, end - 1], side="right")
        tokens = torch.cat([self.lines[line] for line in range(first, last + 1)])
        skipped = begin - (int(self._line_ends[first - 1]) if first else 0)
        return tokens[skipped : skipped + end - begin]


def _last_lines(lines: Any, eos: int) -> np.ndarray:
    """The last line of each document: of empty lines in a row, the last."""
    empty = np.asarray(lines.sizes) == 1
    for line in np.flatnonzero(empty):
        empty[line] = int(lines[line][0]) == eos
    last = empty & ~np.append(empty[1:], False)
    last[-1] = True
    return np.flatnonzero(last)
