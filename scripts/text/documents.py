"""Documents of a large corpus: what is taken from each kind of file, and which repeat others."""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy

__all__ = ["KINDS", "Kind", "Repeats", "paragraphs_of_book", "shingles"]

#: Where the text of a Gutenberg book begins and ends; the last beginning and the first end behind it count.
_BEGIN = re.compile(r"\*+ ?START OF (THE|THIS) PROJECT GUTENBERG|\*+ ?END\*? ?(OF )?THE SMALL PRINT", re.I)
_END = re.compile(r"(\*+ ?)?END OF (THE |THIS )?PROJECT GUTENBERG", re.I)
_PUBLISHER = re.compile(r"gutenberg", re.I)

WORDS = 12  # of a shingle
KEPT_BITS = 5  # a shingle in 32 is looked at, the same ones in every document
LEAST_SHARED = 4  # so many are no chance


def paragraphs_of_book(lines: Iterable[str]) -> Iterator[str]:
    """The paragraphs between Gutenberg's header and its footer, each a line.

    Args:
        lines: All lines of the file, the empty ones too. A file without header and footer is taken whole.

    Yields:
        Paragraphs without line breaks; one that names the publisher is left out.
    """
    lines = list(lines)
    begin = max((i + 1 for i, line in enumerate(lines) if _BEGIN.match(line)), default=0)
    end = next((i for i, line in enumerate(lines[begin:], begin) if _END.match(line)), len(lines))
    paragraph: list[str] = []
    for line in (*lines[begin:end], ""):
        if line:
            paragraph.append(line)
        elif paragraph:
            text = " ".join(paragraph)
            paragraph = []
            if not _PUBLISHER.search(text):
                yield text


class Kind(NamedTuple):
    """What is special to a kind of corpus.

    Attributes:
        endings: Of the names of its documents.
        group_depth: Folders of a name that tell a group, which lies in one split as a whole.
        vocab_size: Usual.
        lines: From the lines of a file, the empty ones too, to the lines of the document.
        leak: The part of a document that held-out text may hold as well before it is kept out of training.
            Files of code repeat each other's licences, books hardly anything.
    """

    endings: tuple[str, ...]
    group_depth: int
    vocab_size: int
    lines: Callable[[Iterable[str]], Iterable[str]]
    leak: float


def _lines(lines: Iterable[str]) -> Iterator[str]:
    return filter(None, lines)


KINDS = {
    "gutenberg": Kind((".txt",), 1, 32000, paragraphs_of_book, 0.02),
    "linux": Kind((".c",), 3, 16000, _lines, 0.5),
    "text": Kind(("",), 1, 8000, _lines, 0.02),
}


def shingles(text: str) -> numpy.ndarray:
    """A sample of the 12-word pieces of a text, as hashes that are the same in every run.

    Which pieces are in the sample depends on their words alone, so that texts that share a passage share its
    sample, wherever it stands in them. Line breaks do not matter.
    """
    words = numpy.fromiter(map(zlib.crc32, text.encode().split()), numpy.uint64)
    if len(words) < WORDS:
        return numpy.empty(0, numpy.uint64)
    count = len(words) - WORDS + 1
    hashes = numpy.zeros(count, numpy.uint64)
    for begin in range(WORDS):
        # Odd constants of large bits (Knuth's and Vigna's): uint64 wraps around.
        hashes = hashes * numpy.uint64(0x9E3779B97F4A7C15) + words[begin : begin + count]
    hashes = (hashes ^ (hashes >> numpy.uint64(31))) * numpy.uint64(0xBF58476D1CE4E5B9)
    return numpy.unique(hashes[hashes >> numpy.uint64(64 - KEPT_BITS) == 0])


class Repeats:
    """Tells documents whose text is already there; what comes first stays.

    Args:
        leak: See :class:`Kind`.
    """

    def __init__(self, leak: float) -> None:
        self.leak = leak
        self._texts: set[bytes] = set()
        self._seen: dict[str, set[int]] = {}

    def is_new(self, split: str, digest: bytes, sample: numpy.ndarray) -> bool:
        """Whether a document is none of the earlier ones, in the main; if so, it becomes one of them.

        Args:
            split: Where it would go: half of it may lie in its own split, ``leak`` of it in each other.
            digest: Of its text.
            sample: From :func:`shingles`.
        """
        own = sample.tolist()
        for other, seen in self._seen.items():
            shared = sum(map(seen.__contains__, own))
            if shared >= LEAST_SHARED and shared > (0.5 if other == split else self.leak) * len(own):
                return False
        if digest in self._texts:
            return False
        self._texts.add(digest)
        self._seen.setdefault(split, set()).update(own)
        return True
