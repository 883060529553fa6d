"""Lets a flash_lm go on from a prompt, and shows the text as it is made.

    python scripts/generate.py checkpoints/ --data data-bin/books --prompt "It was" --top-k 10
    python scripts/generate.py docs/pretrained/gutenberg --prompt "It was" --top-k 10

As flash-generate; the rest stands in fairseq_flash/generation/command.py, and --help shows it.
"""

import functools
import sys
from pathlib import Path
from typing import Any, Optional

from fairseq_flash.generation import command
from fairseq_flash.generation.model import load_model

__all__ = ["main", "parse"]


def load(place: Path, data: Optional[Path]) -> tuple[Any, Any, Path]:
    """As ``load_model``; without ``data``, from a folder of export_hf.py too."""
    if data or any(place.glob("checkpoint_*.pt")) or not (place / "config.json").exists():
        return load_model(place, data)
    try:
        from fairseq_flash.export import load_folder  # only here, as it needs the extra hf
    except ModuleNotFoundError as error:
        raise ValueError(f"{place} needs the package {error.name}: pip install {error.name}") from None
    return load_folder(place)


parse, main = command.parse, functools.partial(command.main, load=load)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
