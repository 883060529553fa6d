"""Trained language models that read rows: the loss of every token, and whether it was foreseen.

The linear branch may be read otherwise than it was trained: of the last chunks alone, or without rotary
positions. That tells what a trained model gets from it, and from where.
"""

import argparse
import dataclasses
import functools
import hashlib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils
from torch import nn

import fairseq_flash  # noqa: F401  (registers the models of the checkpoints)
from ablation import copies_with_plain_linear
from fairseq_flash.modules.alignment import Rows
from fairseq_flash.modules.attention import Attended, MixedChunk
from fairseq_flash.ops import ChunkState, Pair
from fairseq_flash.ops.mixed_chunk.linear import (
    chunk_summaries,
    kept_of_chunks,
    linear_attention,
    linear_denominator,
)
from fairseq_flash.ops.mixed_chunk.reference import blanked, to_chunks
from fairseq_flash.ops.mixed_chunk.state import in_columns
from runs.command_line import require

__all__ = ["Reader", "Scores", "add_reading", "change_reading", "check_reading", "read_tokens", "scores"]

TOKENS_PER_BATCH = 16384


class Scores(NamedTuple):
    """Of every prediction, (rows, n)."""

    losses: torch.Tensor  # nats
    hits: torch.Tensor  # whether the likeliest token is the right one


class Reader:
    """A checkpoint to read with, loaded when it is first needed.

    Args:
        path: Of the checkpoint.
        options: Of :func:`add_reading`.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        changes = [f"window {options.linear_window}"] if options.linear_window else []
        changes += ["plain linear"] if options.plain_linear else []
        self.name = ", ".join((path.stem, *changes))
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
        self._path, self._options = path, options

    @functools.cached_property
    def model(self) -> nn.Module:
        """The language model, ready to read.

        Raises:
            ValueError: as :func:`change_reading`.
        """
        options, overrides = self._options, {"data": str(self._options.data)}
        (model,), *_ = checkpoint_utils.load_model_ensemble_and_task(
            [str(self._path)], arg_overrides=overrides
        )
        if options.linear_window or options.plain_linear:
            change_reading(model, options.linear_window, options.plain_linear)
        return model.to(options.device).eval()


@dataclass(frozen=True)
class Windowed(MixedChunk):
    """Mixed chunk attention whose linear branch sees at most the last chunks before its own.

    Attributes:
        window: How many chunks.
    """

    window: int = 1

    def __call__(
        self,
        pairs: tuple[Optional[Pair], Optional[Pair]],
        v: torch.Tensor,
        bias: Optional[nn.Module],
        rows: Rows,
        state: Optional[ChunkState],
        training: bool,
    ) -> Attended:
        """As :meth:`MixedChunk.__call__`, of whole rows."""
        if state is not None:
            raise ValueError("state is given to a windowed branch; allowed: whole rows")
        quad, lin = pairs
        across = self._across(lin, v, rows.lengths)
        if quad is None:
            return across, None
        return super().__call__((quad, None), v, bias, rows, None, training)[0] + across, None

    def _across(self, lin: Pair, v: torch.Tensor, lengths: Optional[torch.Tensor]) -> torch.Tensor:
        """Of one head ``(b, n, .)`` or several ``(b, heads, n, .)``."""
        if v.dim() == 4:
            lengths = lengths if lengths is None else lengths.repeat_interleave(v.shape[1])
            flat = Pair(*(x.flatten(0, 1) for x in lin))
            return self._across(flat, v.flatten(0, 1), lengths).unflatten(0, v.shape[:2])
        n, c = v.shape[1], self.options.chunk_size
        q, k, values = (to_chunks(x, c) for x in (*lin, blanked(v, lengths)))
        kv = chunk_summaries(k[:, :-1], values[:, :-1])
        before = torch.cat((kv.new_zeros(len(kv), self.window, *kv.shape[2:]), kv), dim=1)
        kept, g = kept_of_chunks(self.options.linear_norm, v.shape[-1], v.device), q.shape[1]
        sums, share = torch.zeros_like(before[:, :g]), 1 if kept is None else in_columns(kept, kv)
        for index in range(self.window):
            sums = sums * share + before[:, index : index + g]
        counts = torch.arange(q.shape[1], device=v.device).clamp(max=self.window).mul(c).unsqueeze(0)
        denominator = linear_denominator(self.options.linear_norm, c, counts, v.shape[-1], sums.dtype)
        return linear_attention(q, sums, denominator).flatten(1, 2)[:, :n]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The options of commands that ask trained models."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that prepare_lm.py wrote")
    add("--checkpoints", type=Path, nargs="+", required=True, help="a row's name is the file's")
    add("--split", default="test")
    add("--linear-window", type=int, metavar="K", help="read K chunks at most through the linear branch")
    add("--plain-linear", action="store_true", help="read the linear branch without rotary positions")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_reading(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what :func:`add_reading` cannot have meant."""
    require(parser, options, 1, "linear_window")
    for path in options.checkpoints:
        if not path.exists():
            parser.error(f"--checkpoints {path} does not exist")
    missing = [name for name in ("dict.txt", f"{options.split}.idx") if not (options.data / name).is_file()]
    if missing:
        parser.error(f"--data {options.data} has no {', '.join(missing)}; allowed: what prepare_lm.py wrote")


def read_tokens(data: Path, split: str) -> tuple[torch.Tensor, Dictionary]:
    """All tokens of a split, one document after the other."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    lines = data_utils.load_indexed_dataset(str(data / split), dictionary)
    if lines is None:
        raise ValueError(f"--split {split} is not in --data {data}")
    return torch.from_numpy(
        numpy.concatenate([lines[index].numpy() for index in range(len(lines))])
    ), dictionary


def change_reading(model: nn.Module, window: Optional[int], plain: bool) -> None:
    """Changes how the linear branch of every layer reads; weights stay.

    Args:
        model: A language model, changed in place.
        window: Chunks that it sees before its own, at most; None for all.
        plain: Whether its queries and keys are not rotated.

    Raises:
        ValueError: the model has no linear branch, or not one of a gated attention unit for ``plain``.
    """
    blocks = getattr(getattr(model.decoder, "stack", None), "blocks", ())
    blocks = [block for block in blocks if "lin" in getattr(block, "branches", ())]
    option = "--plain-linear" if plain else "--linear-window"
    if not blocks or (plain and not all(hasattr(block, "copies") for block in blocks)):
        kind = "gated attention units with a linear branch" if plain else "a linear branch"
        raise ValueError(f"{option} needs a model with {kind}, such as flash_lm or flash_global_lm")
    for block in blocks:
        # The fused operation makes queries and keys, and the sums, for itself.
        block.attend = dataclasses.replace(block.attend, gated=False)
        if window is not None:
            block.attend = Windowed(block.attend.options, window=window)
        if plain:
            block.copies = types.MethodType(copies_with_plain_linear, block)


@torch.no_grad()
def scores(model: nn.Module, rows: torch.Tensor, device: str, last: Optional[int] = None) -> Scores:
    """What a model makes of rows that each begin anew.

    Args:
        model: A language model.
        rows: Tokens ``(rows, n + 1)``: each but the first of a row is foreseen.
        device: Of the model.
        last: The predictions that count, at the end of each row; None for all ``n``.
    """
    n, found = rows.shape[1] - 1, []
    at_once = max(1, TOKENS_PER_BATCH // n)
    for part in rows.long().split(at_once):
        features, _ = model.decoder.extract_features(part[:, :-1].to(device))
        # Row by row: logits are larger than all else.
        for row, target in zip(features, part[:, 1:].to(device), strict=True):
            row, target = (row, target) if last is None else (row[-last:], target[-last:])
            logits = model.decoder.output_layer(row).float()
            loss = nn.functional.cross_entropy(logits, target, reduction="none")
            found.append((loss.cpu(), logits.argmax(dim=-1).eq(target).cpu()))
    return Scores(*map(torch.stack, zip(*found, strict=True)))
