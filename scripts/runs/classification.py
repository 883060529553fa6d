"""A folder of prepare_classification.py: its labels, and what counts of tokens alone tell of them."""

import json
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

__all__ = ["count", "naive_bayes"]


def count(folder: Path) -> tuple[int, int]:
    """Labels and training examples."""
    labels = (folder / "label" / "dict.txt").read_text(encoding="utf-8").splitlines()
    return len(labels), json.loads((folder / "prepare.json").read_text())["splits"]["train"]["examples"]


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
    often = which.bincount().double().log()
    likely = (seen / seen.sum(1, keepdim=True)).log()
    found = {}
    for split in ("valid", "test"):
        right = kinds[(counts[split] @ likely.T + often).argmax(1)] == labels[split]
        found[split] = 100 * float(right.double().mean())
    return found
