"""Data that fairseq leaves out, refuses without a word or garbles, between the files and the models."""

import re
from collections.abc import Callable
from typing import Any

import numpy

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]


def prepare() -> None:
    """Applies every healing of this file."""
    _keep_every_batch()
    _name_unusable_splits()
    _accept_blank_prompts()
    _join_byte_pieces()


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


def _accept_blank_prompts() -> None:
    """Lets a language model continue a blank line; fairseq 0.12 fails with ``assert step < max_len``.

    With ``--prefix-size`` the prefix of a blank line is the end of the sentence, forced as the first token:
    one hypothesis of the beam ends there, the others score minus infinity and never end. An empty prompt
    forces nothing.
    """
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal(step: Callable) -> Callable:
        def healed(self, generator, models, sample, prefix_tokens=None, constraints=None):
            if prefix_tokens is not None and prefix_tokens.size(1) > 0:
                blank = prefix_tokens[:, :1].eq(self.source_dictionary.eos())
                prefix_tokens = prefix_tokens.masked_fill(blank, self.source_dictionary.pad())
            return step(self, generator, models, sample, prefix_tokens, constraints)

        return healed

    wrap(LanguageModelingTask, "inference_step", heal)


def _join_byte_pieces() -> None:
    """Shows characters that sentencepiece wrote as bytes, ``<0xC3> <0xA9>``, as the characters they are.

    Wherever fairseq turns pieces into text: ``--bpe sentencepiece`` and ``--remove-bpe sentencepiece``.
    """
    from fairseq.data import data_utils
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

    def healed_decode(decode: Callable) -> Callable:
        return lambda self, pieces: decode(self, _without_byte_pieces(pieces))

    def healed_post_process(post_process: Callable) -> Callable:
        def healed(sentence: str, symbol: str) -> str:
            if symbol == "sentencepiece":
                sentence = _without_byte_pieces(sentence)
            return post_process(sentence, symbol)

        return healed

    wrap(SentencepieceBPE, "decode", healed_decode)
    wrap(data_utils, "post_process", healed_post_process)


def _without_byte_pieces(pieces: str) -> str:
    def joined(found: re.Match) -> str:
        # Only a whole piece is a byte: a text's own "<0x41>" is split into others.
        return bytes.fromhex(re.sub(r"<0x|>| ", "", found[0])).decode(errors="replace")

    return re.sub(r"(?<![^ ])<0x[0-9A-F]{2}>(?: <0x[0-9A-F]{2}>)*(?![^ ])", joined, pieces)
