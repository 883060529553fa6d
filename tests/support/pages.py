"""The commands and the Python of README.md and docs/*.md, as a reader would copy them."""

import re
import shlex
from pathlib import Path

from support.tools import REPOSITORY

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])


def name_of(page: Path) -> str:
    """Short, for the ids of tests."""
    return str(page.relative_to(REPOSITORY))


def commands(page: Path) -> list[str]:
    """Each command of an indented block or one marked ``bash``, its lines joined, comments left out.

    Where a page writes ``A="python ..."``, its ``$A`` is written out.
    """
    fences = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ") and line.strip()]
    joined = "\n".join([*lines, *fences]).replace("\\\n", " ").splitlines()
    found, variables = [], {}
    for line in (re.sub(r"(^|\s+)#.*$", "", each).strip() for each in joined):
        if told := re.fullmatch(r'([A-Z])="(.*)"', line):
            variables[f"${told[1]} "] = f"{told[2]} "
        elif line:
            found.append(variables.get(line[:3], line[:3]) + line[3:])
    return found


def python(page: Path) -> list[str]:
    """Each block marked ``python``."""
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def words(command: str) -> list[str]:
    """Of the last program of a pipe, without what is set before it and where its input comes from."""
    found = shlex.split(command.rpartition(" | ")[2].partition(" <")[0])
    while re.fullmatch(r"[A-Z_]+=\S*|srun|-\S+", found[0]):
        del found[0]
    return [word for word in found if word != "..."]


def text_of(page: Path) -> str:
    """Its text."""
    return page.read_text(encoding="utf-8")
