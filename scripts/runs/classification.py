"""Of a folder of prepare_classification.py: labels, accuracies, and what counts of words alone tell."""

import json
import re
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

__all__ = ["count", "last_test_accuracy", "naive_bayes", "with_pooling"]


def count(folder: Path) -> tuple[int, int]:
    """Labels and training examples."""
    labels = (folder / "label" / "dict.txt").read_text(encoding="utf-8").splitlines()
    return len(labels), json.loads((folder / "prepare.json").read_text())["splits"]["train"]["examples"]


def last_test_accuracy(log: Path) -> float:
    """Per cent of the test split, from the log of a training that validates on it too."""
    return float(json.loads(re.findall(r"\| test \| (\{.*\})", log.read_text())[-1])["test_accuracy"])


def naive_bayes(folder: Path, n: int) -> dict[str, float]:
    """How often the likeliest label is right if tokens were drawn each by itself, as often as in training.

    Args:
        folder: With the splits train, valid and test.
        n: Tokens of an example that are read.

    Returns:
        Per cent of right labels of "valid" and "test".
    """
    words = len(Dictionary.load(str(folder / "input0" / "dict.txt")))
    counts, labels = {}, {}
    for split in ("train", "valid", "test"):
        texts, told = (MMapIndexedDataset(str(folder / part / split)) for part in ("input0", "label"))
        counts[split] = torch.stack([torch.bincount(text[:n], minlength=words) for text in texts]).double()
        labels[split] = torch.stack([label[0] for label in told])
    kinds, which = labels["train"].unique(return_inverse=True)
    # Each word once more than it was seen, in every label.
    seen = torch.ones(len(kinds), words).double().index_add(0, which, counts["train"])
    often = which.bincount().double().log() + counts["train"].new_zeros(1)
    likely = (seen / seen.sum(1, keepdim=True)).log()
    found = {}
    for split in ("valid", "test"):
        right = kinds[(counts[split] @ likely.T + often).argmax(1)] == labels[split]
        found[split] = 100 * float(right.double().mean())
    return found


def with_pooling(words: tuple, kind: str, pooling: str) -> tuple:
    """The words of a fine-tuning whose head sees more than the first token."""
    if pooling == "first":
        return words
    place, pooled = words.index("--arch") + 1, "pooled_" if kind == "roberta" else ""
    return (*words[:place], pooled + words[place], "--pooling", pooling, *words[place + 1 :])
