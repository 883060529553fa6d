"""Gives a trained RoBERTa positions for longer rows than it has seen."""

from pathlib import Path

import torch

import fairseq_flash  # noqa: F401  (lets torch read the checkpoints of fairseq's older models)

__all__ = ["with_more_positions"]


def with_more_positions(path: Path, learned: int, positions: int) -> Path:
    """Repeats a RoBERTa's learned positions until there are enough for longer rows.

    Args:
        path: Of the checkpoint.
        learned: How many positions it has.
        positions: How many the new one has.

    Returns:
        The new checkpoint, beside the old one.
    """
    target = path.with_name(f"{path.stem}-positions{positions}.pt")
    state = torch.load(path, weights_only=True)
    name = "encoder.sentence_encoder.embed_positions.weight"
    table = state["model"][name]
    # fairseq's positions begin behind the index of padding.
    special, repeated = table[:-learned], table[-learned:].repeat(-(-positions // learned), 1)
    state["model"][name] = torch.cat((special, repeated[:positions]))
    new = target.with_suffix(".tmp")
    try:
        torch.save(state, new)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)  # a cut one would keep a full disk full
    return target
