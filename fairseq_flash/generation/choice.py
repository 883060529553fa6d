"""How the next token is chosen from log-probabilities, as fairseq chooses it."""

from typing import Optional

import torch
from fairseq.data import Dictionary
from fairseq.search import Sampling

__all__ = ["Choice"]


class Choice:
    """The likeliest token, or one that is drawn.

    Args:
        dictionary: The model's.
        greedy: Whether to take the likeliest token.
        temperature: Above 0; what log-probabilities are divided by.
        top_k: Draw among so many likeliest tokens; None for all.
        top_p: Draw among the likeliest tokens that make up so much probability; None for all.
        first: Whether there is no prompt, so that the text must not end before it begins.

    Raises:
        ValueError: ``top_k`` is not 1 to the number of words, or is given together with ``top_p``.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        *,
        greedy: bool = False,
        temperature: float = 1.0,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        first: bool = False,
    ) -> None:
        if top_k is not None and not 1 <= top_k <= len(dictionary):
            raise ValueError(f"--top-k {top_k} is not allowed; allowed: 1 to {len(dictionary)}, all words")
        if top_k is not None and top_p is not None:
            raise ValueError("--top-k and --top-p exclude each other")
        self.dictionary, self.greedy, self.temperature, self.first = dictionary, greedy, temperature, first
        # fairseq's own sign for all of them is -1.
        self._sampling = Sampling(dictionary, top_k or -1, -1.0 if top_p is None else top_p)

    def __call__(self, log_probs: torch.Tensor) -> int:
        """The next token.

        Args:
            log_probs: Of every word, ``(1, vocabulary)``; overwritten.

        Raises:
            ValueError: they hold NaN.
        """
        if log_probs.isnan().any():
            raise ValueError(
                "the model gives NaN for the next token; allowed: weights and a state that are finite"
            )
        if self.temperature != 1:
            log_probs = torch.log_softmax(log_probs / self.temperature, dim=-1)
        log_probs[:, self.dictionary.pad()] = -torch.inf
        if self.first:
            log_probs[:, self.dictionary.eos()] = -torch.inf
        self.first = False
        if self.greedy:
            return int(log_probs.argmax())
        return int(self._sampling.step(0, log_probs.unsqueeze(1), None)[1])
