"""Every figure: which CSV it reads, which columns it needs, and how it is drawn."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pandas
from PIL import Image

from report.distance import DISTANCES, YARDSTICKS, draw_candidates, draw_positions, draw_yardstick
from report.losses import (
    BASES,
    RUNS,
    alone,
    draw_ablation,
    draw_curves,
    draw_factors,
    draw_quality,
    with_loss,
)
from report.speed import GENERATIONS, STEPS, draw_generation, draw_training
from report.style import Records, cells, finished, frame, numbers, read
from report.tasks import draw_masked, draw_translation

__all__ = ["FIGURES", "PANELS", "draw", "frame", "pages", "png", "stem_of", "svg"]

PANELS = 6  # of a figure, at most; more become pages


class Source(NamedTuple):
    """Where a figure comes from, and how it is drawn.

    Attributes:
        csv: Name of the file.
        columns: That it must have.
        draw: Draws all of some records.
        keys: Columns that the records of a line of panels share; none for one page.
        across: Panels in a line.
        kept: Picks the records to draw.
    """

    csv: str
    columns: tuple[str, ...]
    draw: Callable[[Records], plt.Figure]
    keys: tuple[str, ...] = ()
    across: int = 1
    kept: Callable[[Records], Records] = lambda records: records


_CURVE = ("name", "n", "split", "updates", "loss")
_LOSS = ("name", "n", "valid_loss")
_STEP = ("name", "n", "tokens_per_s", "peak_memory")


def _longest(records: Records) -> Records:
    """The longest trainings that succeeded."""
    records = finished(records, "valid_loss")
    return records[numbers(records, "tokens") == numbers(records, "tokens").max()]


def _language_models(records: Records) -> Records:
    """Those with the batch that most were measured with, as they were measured last."""
    records = records[records["kind"] == "lm"]
    records = records[records["tokens"] == records["tokens"].mode().iat[0]]
    return records.drop_duplicates(["device", "dtype", "name", "n"], keep="last")


def _training_steps(records: Records) -> Records:
    """Named as they ran."""
    records = records[records["pass"] == "training step"]
    return records.assign(name=records["name"] + records["compiled"].map({"yes": " compiled", "no": ""}))


FIGURES = {
    "generation": Source(
        "generation.csv",
        ("name", "pass", "b", "beam", "n", "median_ms"),
        draw_generation,
        GENERATIONS,
        3,
        lambda records: records[records["pass"] == "step"],
    ),
    "training": Source("training.csv", _STEP, draw_training, STEPS, 2),
    "gpu": Source(
        "fairseq_train.csv",
        (*_STEP, "tokens", "kind"),
        draw_training,
        STEPS,
        2,
        _language_models,
    ),
    "ops": Source("ops.csv", (*_STEP, "pass", "compiled"), draw_training, STEPS, 2, _training_steps),
    "masked": Source(
        "masked_lm.csv",
        ("name", "data", "stage", "n", "pretraining", "valid_perplexity", "test_accuracy"),
        draw_masked,
    ),
    "translation": Source(
        "translation.csv", ("name", "stage", "data", "epochs", "valid_loss", "bleu"), draw_translation
    ),
    "positions": Source(
        "extrapolation.csv", ("name", "n", "split", "positions", "perplexity"), draw_positions
    ),
    "candidates": Source(
        "candidates.csv",
        ("name", "data", "tokens", "lr", "valid_loss", *DISTANCES),
        draw_candidates,
        ("data",),
        2,
        _longest,
    ),
    "tokens": Source(
        "comparison_curves.csv", (*_CURVE, "tokens"), partial(draw_curves, x="tokens"), ("n", *RUNS), 2
    ),
    "seconds": Source(
        "comparison_curves.csv",
        (*_CURVE, "seconds"),
        partial(draw_curves, x="seconds"),
        ("n", *RUNS),
        2,
        alone,
    ),
    "quality": Source(
        "comparison.csv",
        (*_LOSS, "tokens_per_second"),
        draw_quality,
        RUNS,
        kept=lambda records: alone(with_loss(records)),
    ),
    "ablation": Source("comparison.csv", _LOSS, draw_ablation, ("n", *RUNS), kept=with_loss),
    **{
        name: Source(
            "yardsticks.csv",
            ("name", "yardstick", "x", "loss", "gain", "accuracy"),
            partial(draw_yardstick, yardstick=name),
        )
        for name in YARDSTICKS
    },
    "factors": Source(
        "ablation.csv",
        ("base", "factor", "value", "valid_loss"),
        draw_factors,
        BASES,
        kept=lambda records: with_loss(records[records["stage"] == "factor"]),
    ),
}


def draw(name: str, path: Path) -> list[plt.Figure]:
    """The pages of one of ``FIGURES`` from a CSV file.

    Raises:
        ValueError: the file is missing, or lacks what the figure shows.
    """
    records = read(path, FIGURES[name].columns)
    if name in ("quality", "ablation") and not len(with_loss(records)):
        raise ValueError(f"{path} has no finished run to draw {name} from")
    return pages(name, records)


def pages(name: str, records: Records) -> list[plt.Figure]:
    """One of ``FIGURES`` of these records: as many figures as its panels need, ``PANELS`` in each.

    Raises:
        ValueError: the records lack what the figure shows.
    """
    source = FIGURES[name]
    kept = source.kept(records)
    if not source.keys:
        return [source.draw(kept)]
    lines, step = list(cells(kept, source.keys).values()), PANELS // source.across
    return [source.draw(pandas.concat(lines[k : k + step])) for k in range(0, len(lines), step)]


def stem_of(name: str, path: Path, page: int = 1) -> str:
    """A figure's file: named as its CSV, as itself where several share one, and from 2 on by its page."""
    single = sum(source.csv == FIGURES[name].csv for source in FIGURES.values()) == 1
    own = [] if single else [name]
    return "_".join([path.stem.removesuffix("_curves"), *own, *([str(page)] if page > 1 else [])])


def png(figure: plt.Figure) -> bytes:
    """A PNG of few colours, which in lines and letters no eye tells from more; closes the figure."""
    small = io.BytesIO()
    drawn = io.BytesIO(_saved(figure, format="png", dpi=150))
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def svg(figure: plt.Figure) -> bytes:
    """An SVG that is the same for the same records; closes the figure."""
    with matplotlib.rc_context({"svg.hashsalt": "fairseq_flash"}):
        return _saved(figure, format="svg", metadata={"Date": None})


def _saved(figure: plt.Figure, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, **options)
    plt.close(figure)
    return stream.getvalue()
