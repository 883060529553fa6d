"""The tokens of a FLASH model: pieces of sentencepiece, or words between spaces, numbered by a dictionary.

A line of a text is a paragraph: between two lines stands ``</s>``, with which a causal model also begins (or
with ``<s>``, as it was trained). A masked model reads ``<s> text </s>``, and ``<mask>`` in the text.
"""

import re
import shutil
from pathlib import Path
from typing import Any, Optional, Union

from transformers import AddedToken, PreTrainedTokenizer

#: Those that every dictionary begins with, in their order.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
OVERWRITE = " #fairseq:overwrite"


def read_dictionary(path: Union[str, Path]) -> list[str]:
    """The symbols of a ``dict.txt``, a symbol and a count a line, in the order of their indices."""
    symbols = list(SPECIAL)
    with open(path, encoding="utf-8") as lines:
        return symbols + [line.rstrip().removesuffix(OVERWRITE).rpartition(" ")[0] for line in lines]


class FlashTokenizer(PreTrainedTokenizer):
    """Text to indices and back.

    Args:
        vocab_file: The dictionary.
        sentencepiece_file: The model of the pieces; None where words are tokens.
        options: Of every tokenizer; with a ``mask_token`` the model is a masked one.
    """

    vocab_files_names = {"vocab_file": "dict.txt", "sentencepiece_file": "sentencepiece.bpe.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, sentencepiece_file: Optional[str] = None, **options: Any) -> None:
        self.vocab_file, self.sentencepiece_file = vocab_file, sentencepiece_file
        self.symbols = read_dictionary(vocab_file)
        mask = options.get("mask_token")
        if mask is not None:
            # Its spaces are no words.
            options["mask_token"] = AddedToken(str(mask), lstrip=True, rstrip=True, special=True)
            if str(mask) not in self.symbols:
                self.symbols.append(str(mask))
        self.indices = {symbol: index for index, symbol in enumerate(self.symbols)}
        self.pieces = sentencepiece_file and _processor(sentencepiece_file)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.symbols)

    def get_vocab(self) -> dict[str, int]:
        """Indices by symbol."""
        return dict(self.indices)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: Optional[list[int]] = None
    ) -> list[int]:
        """One text or two, as the model has read them in training."""
        end = [] if self.mask_token is None else [self.eos_token_id]
        second = [] if token_ids_1 is None else [*end, *token_ids_1, *end]
        return [self.bos_token_id, *token_ids_0, *end, *second]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, a line end for ``</s>``."""
        lines: list[list[str]] = [[]]
        for token in tokens:
            if token == "</s>":
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(map(self._line, lines))

    def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> tuple[str, ...]:
        """Copies the files."""
        saved = []
        for path in filter(None, (self.vocab_file, self.sentencepiece_file)):
            name = f"{filename_prefix}-{Path(path).name}" if filename_prefix else Path(path).name
            saved.append(str(Path(save_directory, name)))
            if Path(path).resolve() != Path(saved[-1]).resolve():
                shutil.copyfile(path, saved[-1])
        return tuple(saved)

    def _tokenize(self, text: str, **unused: Any) -> list[str]:
        tokens = []
        for line in text.split("\n"):
            tokens += [*(line.split() if not self.pieces else self.pieces.encode_as_pieces(line)), "</s>"]
        return tokens[:-1]

    def _line(self, tokens: list[str]) -> str:
        if not self.pieces:
            return " ".join(tokens)
        coded = (re.fullmatch("<0x([0-9A-F]{2})>", token) for token in tokens)
        parts = (
            bytes.fromhex(byte[1]) if byte else token.encode()
            for byte, token in zip(coded, tokens, strict=True)
        )
        text = b"".join(parts).decode("utf-8", "replace")
        return text.replace("\u2581", " ").removeprefix(" ")

    def _convert_token_to_id(self, token: str) -> int:
        return self.indices.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self.symbols[index]


def _processor(path: str) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ImportError("this tokenizer needs sentencepiece; allowed: pip install sentencepiece") from None
    return SentencePieceProcessor(model_file=path)
