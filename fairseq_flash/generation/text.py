"""From text to tokens, and back token by token."""

import codecs
import re
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from fairseq.data import Dictionary

__all__ = ["StreamedText", "encode"]


class StreamedText:
    """Turns tokens into text one by one: words, or pieces of sentencepiece, whose bytes become characters.

    Args:
        dictionary: The model's.
        pieces: Whether symbols are sentencepiece's, with their own signs for spaces and bytes.
        at_line_start: Whether no word stands before the first token.
    """

    def __init__(self, dictionary: Dictionary, pieces: bool, at_line_start: bool) -> None:
        self.dictionary, self.pieces, self.at_line_start = dictionary, pieces, at_line_start
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that ``token`` adds: nothing while a character lacks bytes, a line end for ``</s>``."""
        if token == self.dictionary.eos():
            self.at_line_start = True
            return self._bytes.decode(b"", final=True) + "\n"
        symbol = self.dictionary[token]
        byte = re.fullmatch("<0x([0-9A-F]{2})>", symbol) if self.pieces else None
        if byte:
            self.at_line_start = False
            return self._bytes.decode(bytes.fromhex(byte[1]))
        text = symbol.replace("\u2581", " ") if self.pieces else f" {symbol}"
        if self.at_line_start:
            text = text.removeprefix(" ")
        self.at_line_start = False
        return self._bytes.decode(b"", final=True) + text


def encode(text: str, dictionary: Dictionary, model: Optional[Path]) -> list[int]:
    """Tokens of a prompt, in which a line is a paragraph: ``</s>`` stands between lines.

    Args:
        text: The prompt.
        dictionary: The model's.
        model: The sentencepiece model; None for words between spaces.

    Returns:
        Indices; none for an empty text.

    Raises:
        ValueError: the sentencepiece model cannot be read.
    """
    split: Callable[[str], list[str]] = str.split
    if model is not None:
        from sentencepiece import SentencePieceProcessor

        try:
            split = SentencePieceProcessor(model_file=str(model)).encode_as_pieces
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{model} cannot be read as a sentencepiece model: {error}") from None
    tokens = []
    for line in text.split("\n"):
        tokens += [*(dictionary.index(symbol) for symbol in split(line)), dictionary.eos()]
    return tokens[:-1]
