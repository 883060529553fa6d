"""Words beside the points of a figure, that hide neither a point, nor a line, nor each other."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy
from matplotlib.transforms import Bbox

__all__ = ["place_labels"]

#: Where a label may stand, in points from its point, with how it is aligned; the first is the usual.
PLACES = (
    *((7, 5, "left", "bottom"), (7, -5, "left", "top"), (-7, 5, "right", "bottom"), (-7, -5, "right", "top")),
    *(
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
    ),
    *((16, 12, "left", "bottom"), (-16, -12, "right", "top"), (-16, 12, "right", "bottom")),
)
RADIUS = 7.0  # pixels that a marker takes on each side, about


def place_labels(axis: plt.Axes, labels: list[tuple[str, float, float]]) -> None:
    """Writes each label at the first of several places where it hides least.

    Args:
        axis: With all its points and lines drawn; the figure's legend is there already.
        labels: Words, and the point that they are beside.
    """
    axis.figure.canvas.draw()
    points = axis.transData.transform([(x, y) for _, x, y in labels])
    taken = [Bbox([point - RADIUS, point + RADIUS]) for point in points]
    taken += [Bbox([place - 1, place + 1]) for place in _along_lines(axis)]
    inside = axis.get_window_extent()
    for word, x, y in labels:
        notes = []
        for right, up, across, along in PLACES:
            how = {"textcoords": "offset points", "ha": across, "va": along, "fontsize": 9}
            note = axis.annotate(word, (x, y), xytext=(right, up), **how)
            box = note.get_window_extent()
            outside = not (inside.contains(*box.min) and inside.contains(*box.max))
            notes.append((outside, sum(box.overlaps(other) for other in taken), len(notes), note, box))
        *_, best, box = min(notes, key=lambda each: each[:3])
        for *_, note, _ in notes:
            if note is not best:
                note.remove()
        taken.append(box)


def _along_lines(axis: plt.Axes) -> list[numpy.ndarray]:
    """Places in pixels along the lines between points."""
    found: list[numpy.ndarray] = []
    for line in axis.get_lines():
        places = axis.transData.transform(numpy.column_stack(line.get_data()).astype(float))
        for start, end in pairwise(places):
            count = max(2, int(numpy.hypot(*(end - start)) // 6))
            found.extend(start + (end - start) * share for share in numpy.linspace(0, 1, count))
    return found
