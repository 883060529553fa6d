"""Tables and pages: Markdown that nothing quoted can break, and HTML of the same."""

import html
import re
from typing import Any

from markdown import markdown
from tabulate import tabulate

__all__ = ["escaped", "folded", "page", "table"]

STYLE = """body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 3px 7px; text-align: left }
th { background: #f2f2f2 } img { max-width: 100% }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px }"""


def escaped(text: Any) -> str:
    """Text that stays as it is in Markdown, in a table too: no tag, no link, no new cell."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    # A bar inside a word is none of Markdown's.
    return re.sub(r"([|\\`*\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table of cells that are Markdown themselves."""
    how = {"tablefmt": "pipe", "disable_numparse": True, "stralign": None, "numalign": None}
    return tabulate(lines, header, **how)


def folded(title: str, sources: list[str]) -> str:
    """Images that are seen once their title is clicked."""
    images = "\n".join(f'<img alt="" src="{html.escape(source)}">' for source in sources)
    return f"<details><summary>{html.escape(title)}</summary>\n{images}\n</details>"


def page(title: str, text: str, images: dict[str, str]) -> str:
    """An HTML page that needs no other file.

    Args:
        title: Of the page.
        text: Markdown.
        images: What to show in place of a source in the text, by that source.
    """
    body = markdown(text, extensions=["tables"])
    for source, data in images.items():
        body = body.replace(f'src="{html.escape(source)}"', f'src="{data}"')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
