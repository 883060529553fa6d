"""The picture of a gated attention unit, and of what a token sees in mixed chunk attention."""

import matplotlib.pyplot as plt
import numpy
from matplotlib.patches import FancyBboxPatch, Patch

from report.style import STYLES

__all__ = ["draw", "seen"]

QUAD, LIN = STYLES["flash_lm"][0], STYLES["mc_transformer_pp_lm"][0]
GREY = "#E8E8E8"
#: Boxes of a unit: text, centre, colour.
BOXES = {
    "x": ("x   (n, d)", (5, 0.4), GREY),
    "norm": ("norm", (5, 1.6), GREY),
    "uvz": ("one dense layer, SiLU:  d to 2e + s", (5, 2.8), GREY),
    "u": ("u  (n, e)\ngate", (0.8, 4.3), GREY),
    "v": ("v  (n, e)\nvalues", (4.2, 4.3), GREY),
    "z": ("z  (n, s)\nshared base", (8.2, 4.3), GREY),
    "pairs": ("offset-scale, rotary:  two pairs q, k", (8.2, 5.7), GREY),
    "quad": ("quadratic, in the chunk\nrelu(q k' / c + bias)² v", (5.8, 7.2), QUAD),
    "lin": ("linear, across chunks\nq · sum of k' v", (9.4, 7.2), LIN),
    "gate": ("u  \u00d7  (quadratic + linear)", (5, 8.7), GREY),
    "out": ("dense layer  e to d,  + x", (5, 9.9), GREY),
}
ARROWS = (
    *(("x", "norm"), ("norm", "uvz"), ("uvz", "u"), ("uvz", "v"), ("uvz", "z"), ("z", "pairs")),
    *(("pairs", "quad"), ("pairs", "lin"), ("v", "quad"), ("v", "lin"), ("quad", "gate"), ("lin", "gate")),
    *(("u", "gate"), ("gate", "out")),
)


def seen(tokens: int, chunk: int) -> numpy.ndarray:
    """What each token sees of each: 1 through the quadratic branch, 2 through the linear one, else 0.

    Args:
        tokens: Of the row.
        chunk: Tokens of a chunk.

    Returns:
        ``(tokens, tokens)``, a row for each query.
    """
    query, key = numpy.arange(tokens)[:, None], numpy.arange(tokens)[None]
    same = query // chunk == key // chunk
    return numpy.where(same & (key <= query), 1, numpy.where(key // chunk < query // chunk, 2, 0))


def draw() -> plt.Figure:
    """Both pictures, side by side."""
    figure, (unit, mask) = plt.subplots(1, 2, figsize=(11, 5.6), width_ratios=[1.25, 1], layout="constrained")
    _draw_unit(unit)
    _draw_seen(mask, 16, 4)
    return figure


def _draw_unit(axis: plt.Axes) -> None:
    axis.set(xlim=(-0.4, 11.2), ylim=(-0.2, 10.5), title="a gated attention unit (GAU) of FLASH")
    axis.axis("off")
    for text, (x, y), colour in BOXES.values():
        look = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "black", "linewidth": 0.8}
        dark = colour == QUAD
        axis.text(
            x, y, text, ha="center", va="center", fontsize=9, bbox=look, color="white" if dark else "black"
        )
    for start, end in ARROWS:
        (_, (x, y), _), (_, (to_x, to_y), _) = BOXES[start], BOXES[end]
        tall = 0.42 if "\n" in BOXES[start][0] else 0.3
        ends_tall = 0.5 if "\n" in BOXES[end][0] else 0.36
        axis.annotate(
            "",
            (to_x + 0.25 * (x - to_x) * 0.3, to_y - ends_tall),
            (x + 0.1 * (to_x - x), y + tall),
            arrowprops={"arrowstyle": "->", "color": "#555555", "shrinkA": 0, "shrinkB": 0},
            zorder=0,
        )


def _draw_seen(axis: plt.Axes, tokens: int, chunk: int) -> None:
    colours = ("white", QUAD, LIN)
    for query, row in enumerate(seen(tokens, chunk)):
        for key, branch in enumerate(row):
            square = FancyBboxPatch((key, query), 0.86, 0.86, boxstyle="square,pad=0", linewidth=0)
            square.set_facecolor(colours[branch] if branch else "#F4F4F4")
            axis.add_patch(square)
    for edge in range(0, tokens + 1, chunk):
        axis.axhline(edge - 0.07, color="black", linewidth=0.7)
        axis.axvline(edge - 0.07, color="black", linewidth=0.7)
    axis.set(xlim=(-0.2, tokens), ylim=(tokens, -0.2), aspect="equal", xticks=[], yticks=[])
    axis.set(xlabel="token that is seen", ylabel="token that sees", title="mixed chunk attention, causal")
    axis.figure.legend(
        handles=[
            Patch(color=QUAD, label="quadratic branch, one by one"),
            Patch(color=LIN, label="linear branch, as a sum of fixed size"),
        ],
        loc="outside lower right",
        ncols=2,
        frameon=False,
    )
