"""Data that fairseq leaves out, garbles or refuses without a word, between the files and the models."""

from collections.abc import Callable
from typing import Any

import numpy

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]


def prepare() -> None:
    """Applies every healing of this file."""
    _keep_every_batch()
    _name_unusable_splits()
    _look_at_indexed_data()
    _name_unfit_dictionaries()
    _write_large_indexes()
    _keep_long_sizes()


def _keep_every_batch() -> None:
    """Gives back the last batch, which fairseq 0.12 drops unless it holds a multiple of eight sentences.

    With the default ``--required-batch-size-multiple 8``, fairseq-generate and validation silently leave out
    up to seven sentences, and a split with one small batch counts as empty.

    This changes what every model of the process trains on and is evaluated on, a built-in one as well: an
    epoch may have one batch more than without this package. Counts, losses and scores of both are over all
    sentences then, and a comparison in one process is of equals.
    """
    from fairseq.data import data_utils

    def heal(batch_by_size: Callable) -> Callable:
        def healed(indices: Any, *args: Any, **kwargs: Any) -> list:
            if not isinstance(indices, numpy.ndarray):
                indices = numpy.fromiter(indices, dtype=numpy.int64, count=-1)
            if len(indices) == 0:
                return []
            batches = list(batch_by_size(indices, *args, **kwargs))
            fixed_shapes = kwargs.get("fixed_shapes", args[5] if len(args) > 5 else None)
            taken = sum(map(len, batches))
            if fixed_shapes is None and taken < len(indices):
                batches.append(indices[taken:])
            return batches

        return healed

    wrap(data_utils, "batch_by_size", heal)


def _name_unusable_splits() -> None:
    """Names the split that is empty or smaller than one block: fairseq fails obscurely, or goes on."""
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal(load: Callable) -> Callable:
        def healed(self, split: str, *args: Any, **kwargs: Any) -> Any:
            try:
                loaded = load(self, split, *args, **kwargs)
            except ValueError as error:
                if "mmap an empty file" not in str(error):
                    raise
                raise ValueError(
                    f"split {split!r} of {self.args.data!r} is empty; allowed: fairseq-preprocess on at "
                    "least one line"
                ) from None
            tokens, block = int(self.datasets[split].sizes.sum()), self.args.tokens_per_sample
            whole = str(self.args.sample_break_mode or "none") == "none"
            if split.startswith("train") and whole and tokens < block:
                raise ValueError(
                    f"split {split!r} of {self.args.data!r} has {tokens} tokens, less than one block of "
                    f"--tokens-per-sample {block}; allowed: at most {tokens}"
                )
            return loaded

        return healed

    wrap(LanguageModelingTask, "load_dataset", heal)


def _look_at_indexed_data() -> None:
    """Refuses an index that does not fit its data, and an id that is not in the dictionary; any version.

    fairseq believes both files: a negative size leaves out what follows it, a pointer beyond the end kills
    the process, and an id beyond the dictionary is an IndexError in the embedding, without a file or a row.
    The index is looked at once, when the split is loaded; ids row by row, as they are read.
    """
    from fairseq.data import indexed_dataset

    from fairseq_flash._compat.indexed_rows import CheckedRows, problem_of_index

    def heal(make: Callable) -> Callable:
        def healed(path: str, impl: str, fix_lua_indexing: bool = False, dictionary: Any = None) -> Any:
            if impl == "mmap" and indexed_dataset.MMapIndexedDataset.exists(path):
                problem = problem_of_index(path)
                if problem:
                    raise ValueError(f"{path}.idx is damaged, or not the index of {path}.bin: {problem}")
            try:
                rows = make(path, impl, fix_lua_indexing, dictionary)
            except AssertionError:
                raise ValueError(
                    f"{path}.idx is damaged, or no index of fairseq-preprocess; allowed: data prepared anew"
                ) from None
            of_ids = rows is not None and dictionary is not None and impl in ("mmap", "lazy", "cached")
            return CheckedRows(rows, path, dictionary) if of_ids else rows

        return healed

    wrap(indexed_dataset, "make_dataset", heal)


def _name_unfit_dictionaries() -> None:
    """Says which file holds a line that is no word with its count, or a word twice; fairseq 0.12 does not."""
    from fairseq.data import Dictionary

    def heal(add: Callable) -> Callable:
        def healed(self, f: Any) -> None:
            try:
                add(self, f)
            except (RuntimeError, ValueError) as error:
                if not isinstance(f, str):
                    raise
                said = " ".join(str(error).split()).partition(". ")[0]
                raise ValueError(
                    f"{f} is no dictionary: {said}; allowed: a word and its count a line, each word once"
                ) from None

        return healed

    wrap(Dictionary, "add_from_file", heal)


def _write_large_indexes() -> None:
    """Counts bytes in Python's integers where ``fairseq-preprocess --workers`` merges its parts.

    With numpy >= 2 the sum of the parts' 32 bit sizes stays of 32 bits and overflows: data of more than 2 GB
    gets an index with wrong places.
    """
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    def heal(finalize: Callable) -> Callable:
        def healed(self, index_file: str) -> None:
            self._sizes = [int(size) for size in self._sizes]
            finalize(self, index_file)

        return healed

    wrap(MMapIndexedDatasetBuilder, "finalize", heal)


def _keep_long_sizes() -> None:
    """Keeps the length of blocks of more than 65535 tokens, of which fairseq 0.12 keeps the last 16 bits.

    Lines and documents may be longer than ``--tokens-per-sample`` (``--sample-break-mode eos`` and others);
    with a wrong length they came into batches beyond ``--max-tokens``.
    """
    from fairseq.data import TokenBlockDataset

    def heal(build: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> tuple:
            sizes, blocks, slices = build(*args, **kwargs)
            lengths = slices[:, 1].astype(numpy.int64) - slices[:, 0].astype(numpy.int64)
            return (sizes if (sizes == lengths).all() else lengths.astype(numpy.uint32)), blocks, slices

        return healed

    wrap(TokenBlockDataset, "_build_slice_indices", heal)
