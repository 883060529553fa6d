"""Lets a flash_lm go on from a prompt, and shows the text as it is made: flash-generate, in a clone.

    python scripts/generate.py checkpoints/ --data data-bin/books --prompt "It was" --top-k 10

The rest stands in fairseq_flash/generation/command.py; --help shows it.
"""

import sys

from fairseq_flash.generation.command import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
