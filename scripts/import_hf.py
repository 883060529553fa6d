"""Makes a fairseq checkpoint of what export_hf.py wrote, or transformers saved since.

    python scripts/import_hf.py hf/books imported/checkpoint_best.pt

The dictionary and the sentencepiece model lie beside it; no code from the folder runs.
"""

import sys

from fairseq_flash.console import tell_missing

if __name__ == "__main__":
    try:
        from fairseq_flash.export.command import import_main
    except ModuleNotFoundError as error:
        sys.exit(tell_missing(error, "import_hf.py", "import-hf", sys.argv[1:]))
    sys.exit(import_main(sys.argv[1:], __doc__))
