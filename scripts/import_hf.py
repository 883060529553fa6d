"""Makes a fairseq checkpoint of what export_hf.py wrote, or transformers saved since.

    python scripts/import_hf.py hf/books imported/checkpoint_best.pt

The dictionary and the sentencepiece model lie beside it; no code from the folder runs.
"""

import sys

from fairseq_flash.export.command import import_main

if __name__ == "__main__":
    sys.exit(import_main(sys.argv[1:], __doc__))
