"""What a candidate gets from distant text, measured at the end of its training, in nats per token."""

import numpy
import torch
from torch import nn

from ablation.candidate_training import Recipe, rows_of
from fairseq_flash.models.flash_lm import FlashDecoder

__all__ = ["YARDSTICKS", "distances", "measure"]

#: Columns: the loss of all; by distance of a token's last occurrence in its row, below a chunk, a quarter of
#: the row, the row, or none; what a second copy of a passage gains, at the distance of a quarter and of 7/8
#: of a row, over the first, before which is nothing, and over itself where the first is another passage; the
#: loss on the last quarter of rows 4 and 16 times as long, and on the same tokens in rows of their own,
#: as long as in training.
YARDSTICKS = (
    *("valid_loss", "loss_near", "loss_mid", "loss_far", "loss_new", "tokens_by_distance"),
    *("copy_gain_quarter", "copy_gain_end", "copy_over_other_quarter", "copy_over_other_end"),
    *("loss_4n", "alone_4n", "loss_16n", "alone_16n"),
)
TOKENS_AT_ONCE = 32768
#: Copies of a passage, and rows by how many times as long as in training they are.
PASSAGES, LONG_ROWS = 64, {4: 8, 16: 4}


def measure(
    model: FlashDecoder, stream: numpy.ndarray, recipe: Recipe, *, tokens: int, chunk: int, longest: int
) -> dict:
    """All yardsticks that a split is long enough for.

    Args:
        model: Trained, on its device.
        stream: Tokens of a split.
        recipe: Of its training.
        tokens: About how many the losses are of.
        chunk: ``c``, where the first class of distances ends.
        longest: How many times as long rows it can read as it was trained on.

    Returns:
        Cells by column.
    """
    model.eval()
    found = _by_distance(model, stream, recipe, tokens, chunk)
    n = recipe.tokens_per_sample
    for name, distance in {"quarter": n // 4, "end": n - n // 8}.items():
        gains = _copy_gains(model, stream, recipe, distance)
        found[f"copy_gain_{name}"], found[f"copy_over_other_{name}"] = gains
    for times, rows in LONG_ROWS.items():
        if times <= longest and len(stream) > times * n:
            found.update(_long_rows(model, stream, recipe, times, rows))
    return found


def distances(rows: torch.Tensor) -> torch.Tensor:
    """How far back each predicted token occurred last, 0 for never: ``(b, n)`` of ``(b, n + 1)``."""
    order = rows.argsort(dim=1, stable=True)
    again = rows.gather(1, order[:, 1:]) == rows.gather(1, order[:, :-1])
    found = torch.zeros_like(order)
    found.scatter_(1, order[:, 1:], (order[:, 1:] - order[:, :-1]) * again)
    return found[:, 1:]


@torch.no_grad()
def losses(model: FlashDecoder, rows: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Of every prediction in rows ``(rows, n + 1)`` that each begin anew: ``(rows, n)``, on the CPU."""
    n, found = rows.shape[1] - 1, []
    for part in rows.split(max(1, TOKENS_AT_ONCE // n)):
        part = part.to(recipe.device)
        with recipe.autocast():
            features, _ = model.stack(part[:, :-1])
        targets, pieces = part[:, 1:].flatten(), []
        # Logits are larger than all else.
        for piece, target in zip(
            features.flatten(0, 1).split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True
        ):
            with recipe.autocast():
                logits = model.output_layer(piece)
            pieces.append(nn.functional.cross_entropy(logits.float(), target, reduction="none"))
        found.append(torch.cat(pieces).view(len(part), n).cpu())
    return torch.cat(found).double()


def _starts(stream: numpy.ndarray, length: int, count: int) -> list[int]:
    """Where stretches begin, evenly spread."""
    return numpy.linspace(0, len(stream) - length, count).astype(int).tolist()


def _by_distance(model: FlashDecoder, stream: numpy.ndarray, recipe: Recipe, tokens: int, chunk: int) -> dict:
    n = recipe.tokens_per_sample
    there = (len(stream) - 1) // n
    if there < 1:
        raise ValueError(f"--data has {len(stream)} tokens to validate on; needed: {n + 1}")
    count = max(1, min(there, tokens // n))
    blocks = numpy.linspace(0, there - 1, count).astype(int)
    rows = rows_of(stream, (blocks * n).tolist(), n)
    loss, far = losses(model, rows, recipe), distances(rows)
    quarter = max(chunk, n // 4)
    cells = {
        "near": (far > 0) & (far < chunk),
        "mid": (far >= chunk) & (far < quarter),
        "far": far >= quarter,
        "new": far == 0,
    }
    found = {"valid_loss": loss.mean().item()}
    for name, cell in cells.items():
        found[f"loss_{name}"] = loss[cell].mean().item() if cell.any() else ""
    found["tokens_by_distance"] = " ".join(str(int(cell.sum())) for cell in cells.values())
    return found


def _copy_gains(
    model: FlashDecoder, stream: numpy.ndarray, recipe: Recipe, distance: int
) -> tuple[float, float]:
    """What the second copy gains over the first, and over itself behind another first passage.

    The first token of a passage, which nothing foretells, is left out.
    """
    size = recipe.tokens_per_sample // 8
    begins = _starts(stream, size + distance, PASSAGES)
    passages = rows_of(stream, begins, size - 1)
    between = [passages[:, :0]]
    if distance > size:
        # From elsewhere in the split.
        other = begins[PASSAGES // 2 :] + begins[: PASSAGES // 2]
        between = [rows_of(stream, other, distance - size - 1)]
    # Neither its own nor the passage that begins what lies between.
    stranger = passages.roll(PASSAGES // 4, dims=0)
    copied, alone = (
        losses(model, torch.cat([first, *between, passages], dim=1), recipe) for first in (passages, stranger)
    )
    first, second, new = copied[:, : size - 1], copied[:, 1 - size :], alone[:, 1 - size :]
    return (first.mean() - second.mean()).item(), (new.mean() - second.mean()).item()


def _long_rows(model: FlashDecoder, stream: numpy.ndarray, recipe: Recipe, times: int, most: int) -> dict:
    n = recipe.tokens_per_sample
    length, quarter = times * n, times * n // 4
    count = min(most, (len(stream) - 1) // length)
    rows = rows_of(stream, _starts(stream, length + 1, count), length)
    last = losses(model, rows, recipe)[:, -quarter:]
    # The same tokens, in rows that overlap by the token that nothing is before.
    alone = rows[:, -quarter - 1 :].unfold(1, n + 1, n).flatten(0, 1)
    found = {f"loss_{times}n": last, f"alone_{times}n": losses(model, alone, recipe)}
    return {name: loss.mean().item() for name, loss in found.items()}
