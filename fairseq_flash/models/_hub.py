"""What ``FlashMaskedLM.from_pretrained`` gives: text in, features, masked words or classes out."""

import operator
from pathlib import Path
from typing import Any, Union

import torch
from fairseq import utils
from fairseq.models.roberta.hub_interface import RobertaHubInterface

__all__ = ["FlashHubInterface", "count_of", "find_sentencepiece"]

MASK = "<mask>"


def find_sentencepiece(checkpoints: str, data: str) -> str:
    """The ``sentencepiece.bpe.model`` beside a checkpoint or in its data's folder.

    Args:
        checkpoints: Folder of the checkpoint.
        data: Folder of the data.

    Raises:
        ValueError: neither has one.
    """
    folders = [Path(checkpoints), Path(data)]
    for folder in folders:
        if (folder / "sentencepiece.bpe.model").is_file():
            return str(folder / "sentencepiece.bpe.model")
    raise ValueError(
        f"there is no sentencepiece.bpe.model in {' or '.join(map(str, folders))}; allowed: "
        "sentencepiece_model=PATH, another bpe, or bpe=None where words are tokens"
    )


class FlashHubInterface(RobertaHubInterface):
    """fairseq's interface to RoBERTa without its limits.

    Rows of any length, on any device; ``<mask>`` anywhere in the text, with the dictionary of any task;
    batches with padding; errors that say what is allowed.

    Args:
        cfg: Of the checkpoint.
        task: With a ``source_dictionary`` that has ``<mask>``.
        model: The trained :class:`~fairseq_flash.models.flash_masked_lm.FlashMaskedLM`.
    """

    def encode(self, sentence: str, *addl_sentences: str, no_separator: bool = False) -> torch.Tensor:
        """Tokens of one text or several, ``<s> a b c </s> </s> d e </s>``.

        Args:
            sentence: The text; ``<mask>`` in it stands for a masked token.
            addl_sentences: More texts of the same row.
            no_separator: Whether to leave out the second ``</s>`` between two texts.

        Returns:
            Indices ``(n,)``.
        """
        for text in (sentence, *addl_sentences):
            _check_text("sentence", text)
        separator = [] if no_separator else ["</s>"]
        words = ["<s>", *self._pieces(sentence), "</s>"]
        for other in addl_sentences:
            words += [*separator, *self._pieces(other), "</s>"]
        dictionary = self.task.source_dictionary
        return torch.tensor([dictionary.index(word) for word in words])

    def decode(self, tokens: torch.Tensor) -> Union[str, list[str]]:
        """The text of a row of tokens ``(n,)``, or a list where several texts stand in it.

        Raises:
            ValueError: ``tokens`` is a batch, or holds what is no index of a word.
        """
        _check_tokens(tokens)
        if tokens.dim() != 1:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; allowed: (n,), one row at a time")
        dictionary = self.task.source_dictionary
        strange = tokens.lt(0) | tokens.ge(len(dictionary))
        if tokens.dtype not in (torch.int64, torch.int32) or strange.any():
            raise ValueError(f"tokens is no row; allowed: (n,) of {len(dictionary)} words' indices")
        silent = (dictionary.pad(), dictionary.bos())
        words = [dictionary[index] for index in tokens.tolist() if index not in silent]
        texts: list[list[str]] = [[]]
        for before, word in zip(["", *words], words, strict=False):
            if word != "</s>":
                texts[-1].append(word)
            elif before == "</s>":
                texts.append([])
        sentences = [self._text(text) for text in texts]
        return sentences[0] if len(sentences) == 1 else sentences

    def extract_features(self, tokens: torch.Tensor, return_all_hiddens: bool = False) -> torch.Tensor:
        """Features of the last layer.

        Args:
            tokens: ``(n,)``, or ``(b, n)`` with padding that leads or trails; any length.
            return_all_hiddens: Not available.

        Returns:
            ``(b, n, d)``, zero at padding.

        Raises:
            ValueError: ``return_all_hiddens``.
        """
        features, _ = self.model(
            self._batch(tokens), features_only=True, return_all_hiddens=return_all_hiddens
        )
        return features

    def predict(self, head: str, tokens: torch.Tensor, return_logits: bool = False) -> torch.Tensor:
        """Classifies rows.

        Args:
            head: Name of the classification head.
            tokens: ``(n,)``, or ``(b, n)`` with padding that leads or trails; as trained, with ``<s>`` first.
            return_logits: Whether to give logits in place of log probabilities.

        Returns:
            ``(b, classes)``.

        Raises:
            ValueError: no head has that name.
        """
        output = self.model(self._batch(tokens), classification_head_name=head)
        return output[0] if return_logits else self.model.get_normalized_probs(output, log_probs=True)

    def predict_labels(self, head: str, tokens: torch.Tensor) -> list[dict[str, float]]:
        """As :meth:`predict`, by the names of the labels.

        Args:
            head: Name of the classification head.
            tokens: ``(n,)``, or ``(b, n)`` with padding that leads or trails.

        Returns:
            For each row the probability of each label, likeliest first.

        Raises:
            ValueError: no head has that name, or the data does not name as many labels as it has classes.
        """
        with utils.model_eval(self.model), torch.no_grad():
            probabilities = self.predict(head, tokens).exp()
        dictionary = getattr(self.task, "label_dictionary", None)
        names = [] if dictionary is None else dictionary.symbols[dictionary.nspecial :]
        if len(names) < (classes := probabilities.shape[1]):
            raise ValueError(
                f"the data names {len(names)} labels, head {head!r} has {classes} classes; allowed: the "
                "folder that it was fine-tuned on, as data_name_or_path"
            )
        rows = (dict(zip(names, row, strict=False)) for row in probabilities.tolist())
        return [dict(sorted(row.items(), key=lambda pair: -pair[1])) for row in rows]

    def fill_mask(self, masked_input: str, topk: int = 5) -> list[tuple[str, float, str]]:
        """The likeliest words for a ``<mask>``.

        Args:
            masked_input: A text with one ``<mask>``.
            topk: How many to give.

        Returns:
            The filled text, the probability and the word of each, likeliest first.

        Raises:
            ValueError: there is no ``<mask>``, or more than one; or ``topk`` is not allowed.
        """
        _check_text("masked_input", masked_input)
        count, dictionary = masked_input.count(MASK), self.task.source_dictionary
        if count != 1:
            raise ValueError(f"masked_input has {count} times {MASK}; allowed: once, as in 'a {MASK} man'")
        if not 1 <= count_of(topk) <= len(dictionary):
            raise ValueError(f"topk={topk} is not allowed; allowed: 1 to {len(dictionary)}, all words")
        tokens = self._batch(self.encode(masked_input))
        with utils.model_eval(self.model), torch.no_grad():
            output = self.model(tokens, masked_tokens=tokens.eq(dictionary.index(MASK)))
        values, indices = self.model.get_normalized_probs(output, log_probs=False)[0].topk(count_of(topk))
        before, after = masked_input.split(MASK)
        found = []
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            word = self._text([dictionary[index]])
            # A piece that begins a word has lost its space.
            space = " " if self.bpe is None or dictionary[index].startswith("\u2581") else ""
            found.append(((before.rstrip() + space + word + after).strip(), value, word))
        return found

    def _batch(self, tokens: torch.Tensor) -> torch.Tensor:
        _check_tokens(tokens)
        tokens = tokens.to(self.device)
        return tokens.unsqueeze(0) if tokens.dim() == 1 else tokens

    def _pieces(self, text: str) -> list[str]:
        spans = [span if self.bpe is None else self.bpe.encode(span.strip()) for span in text.split(MASK)]
        return f" {MASK} ".join(spans).split()

    def _text(self, words: list[str]) -> str:
        spans = [span.strip() for span in " ".join(words).split(MASK)]
        spans = [span if self.bpe is None else self.bpe.decode(span) for span in spans]
        return f" {MASK} ".join(spans).strip()


def count_of(value: Any) -> int:
    """The whole number, of numpy or torch as well; 0 in place of what is none, such as a bool."""
    try:
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


def _check_text(argument: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{argument}={text!r} is not allowed; allowed: a text")


def _check_tokens(tokens: Any) -> None:
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(f"tokens is a {type(tokens).__name__}; allowed: a tensor, as encode() gives it")
