"""Lets a flash_lm go on from a prompt, and shows the text as it is made.

    python scripts/generate.py checkpoints/ --data data-bin/books --prompt "It was" --top-k 10

As flash-generate; the rest stands in fairseq_flash/generation/command.py, and --help shows it.
"""

import sys

from fairseq_flash.generation.command import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
