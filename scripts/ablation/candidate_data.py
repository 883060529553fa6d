"""What candidates are trained and measured on: a text, or recall alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import nn

from ablation.candidate_training import UNASKED, Recipe, batches, open_stream
from ablation.candidate_yardsticks import TOKENS_AT_ONCE, YARDSTICKS, measure
from fairseq_flash.models.flash_lm import FlashDecoder
from fairseq_flash.tasks.recall import RecallConfig, RecallRows, RecallTask
from runs.provenance import data_name

__all__ = ["Recall", "Text"]

Example = tuple[torch.Tensor, torch.Tensor]


class Text:
    """A text that prepare_lm.py wrote.

    Args:
        folder: With the splits train and valid.

    Raises:
        ValueError: as :func:`open_stream`.
    """

    measures = YARDSTICKS

    def __init__(self, folder: Path) -> None:
        self.train, self.valid = open_stream(folder, "train"), open_stream(folder, "valid")
        self.name, self.dictionary = data_name(folder), Dictionary.load(str(folder / "dict.txt"))

    def examples(self, recipe: Recipe) -> Iterator[Example]:
        """Of each update, tokens and those that follow them, ``(rows, n)`` both."""
        for rows in batches(self.train, recipe):
            yield rows[:, :-1], rows[:, 1:]

    def measure(self, model: FlashDecoder, recipe: Recipe, **limits: int) -> dict[str, Any]:
        """Cells by column, as :func:`candidate_yardsticks.measure`."""
        return measure(model, self.valid, recipe, **limits)


class Recall:
    """Rows of ``--task flash_recall``: new ones for every update, the same for all systems of a seed.

    Args:
        pairs: Of a key and its value in a row.
        gap: Tokens between pairs and questions.
        words: Keys, and as many values.
        n: Tokens of a row.

    Raises:
        ValueError: as :class:`RecallRows`.
    """

    measures = ("valid_loss", "accuracy")

    def __init__(self, pairs: int, gap: int, words: int, n: int) -> None:
        self.options = dict(pairs=pairs, recall_gap=gap, recall_words=words, tokens_per_sample=n)
        self.name = f"recall of {pairs} pairs, gap {gap}, {words} words"
        self.dictionary = RecallTask(RecallConfig(**self.options)).dictionary
        self._rows("valid", 1)

    def examples(self, recipe: Recipe) -> Iterator[Example]:
        """Of each update, tokens and what is asked for, ``UNASKED`` elsewhere, ``(rows, n)`` both."""
        yield from self._parts(self._rows("train", recipe.updates * recipe.rows, recipe.seed), recipe.rows)

    @torch.no_grad()
    def measure(self, model: FlashDecoder, recipe: Recipe, *, tokens: int, **unused: int) -> dict[str, float]:
        """Loss, in nats, of the values that are asked for, and the part that is foretold best.

        Args:
            model: Trained, on its device.
            recipe: Of its training.
            tokens: About how many tokens the rows have together; they are the same for every seed.
            unused: Limits of a text's yardsticks.

        Returns:
            Cells by column.
        """
        model.eval()
        n, found = recipe.tokens_per_sample, []
        rows = self._rows("valid", max(1, tokens // n))
        for source, targets in self._parts(rows, max(1, TOKENS_AT_ONCE // n)):
            asked = targets != UNASKED
            with recipe.autocast():
                features, _ = model.stack(source.to(recipe.device))
                logits = model.output_layer(features[asked.to(recipe.device)]).float().cpu()
            answers = targets[asked]
            losses = nn.functional.cross_entropy(logits, answers, reduction="none")
            found.append(torch.stack((losses, logits.argmax(dim=-1) == answers)).double())
        loss, accuracy = torch.cat(found, dim=1).mean(dim=1).tolist()
        return {"valid_loss": loss, "accuracy": accuracy}

    def _rows(self, split: str, count: int, seed: int = 1) -> RecallRows:
        task = RecallTask(
            RecallConfig(**self.options, train_rows=count, held_out_rows=count, recall_seed=seed)
        )
        task.load_dataset(split)
        return task.dataset(split)

    @staticmethod
    def _parts(rows: RecallRows, at_once: int) -> Iterator[Example]:
        for begin in range(0, len(rows), at_once):
            batch = rows.collater([rows[index] for index in range(begin, min(begin + at_once, len(rows)))])
            targets = batch["target"]
            yield batch["net_input"]["src_tokens"], targets.masked_fill(targets == rows.pad, UNASKED)
