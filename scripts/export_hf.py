"""Writes a trained flash_lm or flash_masked_lm as a folder that transformers loads.

    python scripts/export_hf.py checkpoints/ hf/books --data data-bin/books
    python scripts/export_hf.py checkpoints/ hf/small --data data-bin/books --dtype bfloat16    half the size

The folder holds the weights, the tokenizer and readable code that computes the model without fairseq, and
a card (README.md) that tells data, training, loss and limits:
AutoModelForCausalLM.from_pretrained("hf/books", trust_remote_code=True). See docs/huggingface.md.
"""

import sys

from fairseq_flash.export.command import export_main

if __name__ == "__main__":
    sys.exit(export_main(sys.argv[1:], __doc__))
