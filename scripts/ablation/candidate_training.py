"""Short trainings of candidates on one device, on rows that are the same for all systems."""

import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset, data_file_path, index_file_path
from torch import nn

from ablation.candidate_layers import CandidateUnit
from fairseq_flash.models._layers import GRAPHS, whole_rows
from fairseq_flash.models.flash_lm import FlashDecoder
from fairseq_flash.modules.pass_graph import PassGraphs

__all__ = ["UNASKED", "Recipe", "batches", "compile_layers", "open_stream", "rows_of", "train"]

#: Seconds between two lines of a log.
EVERY = 10.0
#: The smallest chunk that is drawn is this part of the model's.
SMALLEST = 8
#: The target of a token behind which nothing is to be foretold: what torch leaves out of a loss.
UNASKED = -100


class Recipe(NamedTuple):
    """How to train: ``tokens`` in all, ``tokens_per_update`` in rows of ``tokens_per_sample``."""

    lr: float
    seed: int
    tokens: int
    tokens_per_update: int
    tokens_per_sample: int
    device: str
    dtype: str
    compile: bool

    @property
    def updates(self) -> int:
        """How many."""
        return max(1, self.tokens // self.tokens_per_update)

    @property
    def rows(self) -> int:
        """Of an update."""
        return max(1, self.tokens_per_update // self.tokens_per_sample)

    def autocast(self) -> torch.autocast:
        """The precision of products."""
        narrow = self.dtype != "float32"
        return torch.autocast(self.device.split(":")[0], getattr(torch, self.dtype), enabled=narrow)


def open_stream(data: Path, split: str) -> numpy.ndarray:
    """All tokens of a split, read from the file as they are needed.

    Raises:
        ValueError: the split is not there, or not in fairseq's format for memory maps.
    """
    path = str(data / split)
    if not MMapIndexedDataset.exists(path):
        raise ValueError(
            f"--data {data} has no {split}.bin and {split}.idx; allowed: what prepare_lm.py wrote"
        )
    try:
        dtype = MMapIndexedDataset.Index(index_file_path(path)).dtype
    except AssertionError as error:
        raise ValueError(f"--data {data}: {split}.idx cannot be read: {error}") from None
    return numpy.memmap(data_file_path(path), dtype=dtype, mode="r")


def rows_of(stream: numpy.ndarray, starts: list[int], n: int) -> torch.Tensor:
    """Rows ``(rows, n + 1)`` of a stream: each token but the first is predicted."""
    return torch.from_numpy(
        numpy.stack([stream[start : start + n + 1] for start in starts]).astype(numpy.int64)
    )


def batches(stream: numpy.ndarray, recipe: Recipe) -> Iterator[torch.Tensor]:
    """The rows of each update: every row once in an order of the seed, then again in another.

    Raises:
        ValueError: the stream has no row.
    """
    n = recipe.tokens_per_sample
    count = (len(stream) - 1) // n
    if count < 1:
        raise ValueError(f"--data has {len(stream)} tokens to train on; needed: {n + 1}")
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting: list[int] = []
    for _ in range(recipe.updates):
        while len(waiting) < recipe.rows:
            waiting += torch.randperm(count, generator=generator).tolist()
        taken, waiting = waiting[: recipe.rows], waiting[recipe.rows :]
        yield rows_of(stream, [index * n for index in taken], n)


def compile_layers(model: FlashDecoder) -> None:
    """Trains through compiled layers; without gradient they stay as they are, for rows of any length."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    compiled = torch.compile(whole_rows, dynamic=False)

    def forward_of(layer: nn.Module) -> object:
        def forward(x: torch.Tensor, *unused: object, rows: object = None, **more: object) -> object:
            if torch.is_grad_enabled():
                return compiled([layer], x, rows, {}), None
            return type(layer).forward(layer, x, rows=rows)

        return forward

    for layer in model.stack.blocks:
        layer.forward = forward_of(layer)


def train(model: FlashDecoder, examples: Iterable[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe) -> dict:
    """Trains a model; prints a line about every ten seconds.

    Args:
        model: On its device, changed in place.
        examples: Tokens and targets ``(rows, n)`` of each update.
        recipe: How.

    Returns:
        ``train_loss`` of the last tenth, ``tokens_per_s`` of the second half, and ``seconds``.

    Raises:
        ValueError: the loss is no number, or as ``examples``.
    """
    cuda = recipe.device.startswith("cuda")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    fused = {"fused": True} if cuda else {}
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, **fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, recipe.updates))
    loss_of = torch.compile(_loss, dynamic=False) if recipe.compile else _loss
    drawn = random.Random(recipe.seed)
    model.train()
    graphs = PassGraphs() if cuda and recipe.compile and not _random_chunks(model) else None

    def features_of(tokens: torch.Tensor) -> torch.Tensor:
        # In here, so that a recording narrows the weights of the moment.
        with recipe.autocast():
            return model.stack(tokens)[0]

    losses = torch.zeros(recipe.updates, device=recipe.device)
    clock = _Clock(recipe, losses)
    for update, example in enumerate(examples):
        pinned = (part.pin_memory() if cuda else part for part in example)
        tokens, targets = (part.to(recipe.device, non_blocking=True) for part in pinned)
        draw_chunk(model, drawn)
        features = features_of(tokens) if graphs is None else graphs(model.stack, features_of, (tokens,))
        with recipe.autocast():
            loss = loss_of(features, model.output_projection.weight, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0, foreach=cuda)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses[update] = loss.detach()
        clock.tick(update + 1, schedule.get_last_lr()[0])
    draw_chunk(model, None)
    return clock.end()


def draw_chunk(model: FlashDecoder, drawn: random.Random | None) -> None:
    """Gives layers of random chunks the size for an update; None for the model's own."""
    layers = _random_chunks(model)
    if layers:
        largest = layers[0].chunk_size
        sizes = [largest >> power for power in range(SMALLEST.bit_length()) if largest >> power]
        size = largest if drawn is None else drawn.choice(sizes)
        for layer in layers:
            layer.current_chunk = size


def _random_chunks(model: FlashDecoder) -> list[CandidateUnit]:
    layers = [layer for layer in model.stack.blocks if isinstance(layer, CandidateUnit)]
    return [layer for layer in layers if layer.choice.random_chunk]


def _loss(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = nn.functional.linear(features, weight).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _share(step: int, updates: int) -> float:
    """Of the rate: a tenth of the updates up, then evenly down to 0."""
    warm_up = max(1, updates // 10)
    return (step + 1) / warm_up if step < warm_up else (updates - step) / max(1, updates - warm_up)


class _Clock:
    """Speed and loss of a training; looks at the device at most once in ``EVERY`` seconds."""

    def __init__(self, recipe: Recipe, losses: torch.Tensor) -> None:
        self.recipe, self.losses = recipe, losses
        self.begin = self.shown = time.monotonic()
        self.shown_update, self.half = 0, (self.begin, 0)

    def tick(self, update: int, rate: float) -> None:
        """After ``update`` updates."""
        now, recipe = time.monotonic(), self.recipe
        if update == recipe.updates // 2:
            self._wait()
            self.half = time.monotonic(), update
        if now - self.shown < EVERY and update not in (1, recipe.updates):
            return
        loss = self.losses[self.shown_update : update].mean().item()
        speed = self._per_update() * (update - self.shown_update) / max(time.monotonic() - self.shown, 1e-9)
        print(
            f"update {update}/{recipe.updates}  loss {loss:.4f}  rate {rate:.3g}  "
            f"{speed:.0f} tokens/s  {time.monotonic() - self.begin:.0f} s",
            flush=True,
        )
        if not loss < float("inf"):
            raise ValueError(f"the loss is {loss} before update {update}")
        self.shown, self.shown_update = time.monotonic(), update

    def end(self) -> dict:
        """What :func:`train` returns."""
        self._wait()
        now, (then, update) = time.monotonic(), self.half
        last = max(1, self.recipe.updates // 10)
        return {
            "updates": self.recipe.updates,
            "train_loss": self.losses[-last:].mean().item(),
            "tokens_per_s": round(self._per_update() * (self.recipe.updates - update) / (now - then)),
            "seconds": round(now - self.begin, 1),
        }

    def _per_update(self) -> int:
        return self.recipe.rows * self.recipe.tokens_per_sample

    def _wait(self) -> None:
        if self.recipe.device.startswith("cuda"):
            torch.cuda.synchronize()
