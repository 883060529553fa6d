"""A model together with what it has read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Union

import torch

from fairseq_flash.modules import DecodingState
from fairseq_flash.modules.step_graph import StepGraphs

__all__ = ["Reader"]


class Reader:
    """A model with the state after the tokens that it has read; the last one is still to be fed.

    Args:
        model: A ``flash_lm`` in evaluation mode.
        start: The token that a text begins with.
        record: Whether a step may be recorded as a CUDA graph, where :class:`StepGraphs` can.
    """

    def __init__(self, model: torch.nn.Module, start: int, *, record: bool = True) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.state = model.decoder.stack.empty_state(torch.zeros(1, 1, device=self.device))
        self.pending = start
        # Nothing has been read yet, as only the host knows.
        self._fresh = True
        self._graphs = StepGraphs() if record else None

    def read(self, tokens: list[int]) -> None:
        """Goes on to the last of ``tokens``, in parallel."""
        context = torch.tensor([[self.pending, *tokens]], device=self.device)
        self.state = self.model.decoder.stack.read(context[:, :-1], None if self._fresh else self.state)
        self._fresh = False
        self.pending = int(context[0, -1])

    @torch.no_grad()
    def predict(self) -> torch.Tensor:
        """Feeds the last token; log-probabilities of the next one, ``(1, vocabulary)``."""
        self._fresh = False
        decoder, token = self.model.decoder, torch.tensor([[self.pending]], device=self.device)
        if self._graphs is not None and not StepGraphs.objections(decoder.stack, token, self.state):
            features, self.state = self._graphs(decoder.stack, token, self.state)
        else:
            features, self.state = decoder.stack(token, None, self.state)
        logits = decoder.output_layer(features)
        return self.model.get_normalized_probs((logits, None), log_probs=True, sample=None)[:, -1]

    def generate(self, choose: Callable[[torch.Tensor], int]) -> Iterator[int]:
        """Tokens after what was read, without end.

        Args:
            choose: The next token from log-probabilities ``(1, vocabulary)``.
        """
        while True:
            token = choose(self.predict())
            yield token
            self.pending = token

    def save(self, path: Union[str, Path], mark: str) -> None:
        """Writes what was read.

        Args:
            path: The file; a kill leaves the old one.
            mark: Fingerprint of the model.
        """
        self.state.save(path, model=mark, pending=self.pending)

    def load(self, path: Union[str, Path], mark: str, vocabulary: int) -> None:
        """Goes on where another reader was saved; runs no code from the file.

        Args:
            path: The file.
            mark: Fingerprint of the model.
            vocabulary: Words of the model.

        Raises:
            ValueError: the file is something else, or of another model.
        """
        state, beside = DecodingState.load(path, self.state)
        saved, pending = beside.get("model"), beside.get("pending")
        if saved != mark:
            raise ValueError(
                f"{path} was saved with other weights or another dictionary ({str(saved)[:12]}); "
                f"allowed: a state of this model, {mark[:12]}"
            )
        if type(pending) is not int or not 0 <= pending < vocabulary:
            shown = pending if type(pending) is int else f"a {type(pending).__name__}"
            raise ValueError(f"{path} has the last token {shown}; allowed: 0 to {vocabulary - 1}")
        self.state, self.pending, self._fresh = state, pending, False
