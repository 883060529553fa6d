"""Rows of fairseq's binary data, and what may be wrong with them."""

import os
import struct
from typing import Any, Optional

import numpy
from fairseq.data import BaseWrapperDataset
from fairseq.data.indexed_dataset import _code_to_dtype

__all__ = ["CheckedRows", "problem_of_index"]

_PIECE = 2**20  # rows of an index that are looked at together


class CheckedRows(BaseWrapperDataset):
    """Rows whose ids are all in the dictionary.

    Args:
        dataset: The rows.
        path: Of their file, without its ending.
        dictionary: Words may be added to it later.
    """

    def __init__(self, dataset: Any, path: str, dictionary: Any) -> None:
        super().__init__(dataset)
        self.path, self.dictionary = path, dictionary

    def __getitem__(self, index: int) -> Any:
        row, words = self.dataset[index], len(self.dictionary)
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < words:
            wrong = next(number for number in row.tolist() if not 0 <= number < words)
            raise ValueError(
                f"{self.path}.bin, row {index}: id {wrong} is not in the dictionary of {words} words; "
                f"allowed: 0 to {words - 1}, as in data made with this dictionary"
            )
        return row


def problem_of_index(path: str) -> Optional[str]:
    """What is wrong with the index of a data file; None if rows lie one behind the other, to the file's end.

    Args:
        path: Of both files, without their endings.
    """
    header, size = struct.Struct("<9sQBQ"), os.path.getsize(f"{path}.idx")
    with open(f"{path}.idx", "rb") as file:
        begin = file.read(header.size)
    magic, version, kind, rows = header.unpack(begin.ljust(header.size, b"\0"))
    if (magic, version) != (b"MMIDIDX\0\0", 1) or kind not in _code_to_dtype:
        return f"it begins with {begin!r}"
    if size != header.size + 12 * rows:
        return f"it has {size} bytes for {rows} rows"
    sizes = numpy.memmap(f"{path}.idx", "<i4", "r", header.size, rows) if rows else numpy.zeros(0, int)
    places = numpy.memmap(f"{path}.idx", "<i8", "r", header.size + 4 * rows, rows) if rows else sizes
    end, width = 0, numpy.dtype(_code_to_dtype[kind]).itemsize
    for first in range(0, rows, _PIECE):
        lengths = sizes[first : first + _PIECE].astype(numpy.int64)
        ends = end + numpy.cumsum(lengths) * width
        wrong = numpy.flatnonzero((lengths < 0) | (places[first : first + _PIECE] != ends - lengths * width))
        if len(wrong):
            row = first + int(wrong[0])
            return f"row {row} has {sizes[row]} tokens at byte {places[row]}"
        end = int(ends[-1])
    held = os.path.getsize(f"{path}.bin")
    return None if end == held else f"its {rows} rows end at byte {end}, and the data at {held}"
