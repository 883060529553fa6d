"""Writes a trained flash_lm or flash_masked_lm as a folder that transformers loads.

    python scripts/export_hf.py checkpoints/ hf/books --data data-bin/books
    python scripts/export_hf.py checkpoints/ hf/small --data data-bin/books --dtype bfloat16    half the size

The folder holds the weights, the tokenizer and readable code that computes the model without fairseq, and
a card (README.md) that tells data, training, loss and limits:
AutoModelForCausalLM.from_pretrained("hf/books", trust_remote_code=True). See docs/huggingface.md.
"""

import sys

from fairseq_flash.console import tell_missing

if __name__ == "__main__":
    try:
        from fairseq_flash.export.command import export_main
    except ModuleNotFoundError as error:
        sys.exit(tell_missing(error, "export_hf.py", "export-hf", sys.argv[1:]))
    sys.exit(export_main(sys.argv[1:], __doc__))
