"""Draws a gated attention unit, and what mixed chunk attention lets a token see.

    python scripts/draw_layer.py                 docs/layer.png
    python scripts/draw_layer.py --output my.png

Needs matplotlib (pip install -e ".[plot]").
"""

import sys
from pathlib import Path

from runs.command_line import command_line

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = command_line(__doc__, "draw_layer.py")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "layer.png", help="(docs/layer.png)")
    options = parser.parse_args(arguments)
    try:
        from report.diagram import draw
        from report.figures import png
    except ImportError as error:
        parser.exit(2, f'draw_layer.py: {error.name} is not installed; allowed: pip install -e ".[plot]"\n')
    options.output.write_bytes(png(draw()))
    print(options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
