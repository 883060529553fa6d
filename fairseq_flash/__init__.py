"""FLASH (gated attention units with mixed chunk attention) as a fairseq plug-in.

Importing the package makes fairseq ready for this Python, numpy and torch, and registers the models, the
task and the optimizer; where fairseq is not installed, ``fairseq_flash.ops`` and ``fairseq_flash.modules``
work all the same.
"""

import importlib
import importlib.util
from typing import Any

__version__ = "0.2.0"

if importlib.util.find_spec("fairseq") is not None:
    from fairseq_flash._compat import prepare_host

    prepare_host()

    from fairseq_flash._compat.room import count_before_building
    from fairseq_flash.models._trained import config_of, remember_options_of_checkpoints

    remember_options_of_checkpoints()

    # Here and not only through --user-dir, which skips what belongs to a package that is imported already.
    from fairseq_flash import optim  # noqa: F401
    from fairseq_flash.models import flash_lm, flash_masked_lm, flash_seq2seq, pooled_roberta  # noqa: F401
    from fairseq_flash.tasks import flash_language_modeling, recall  # noqa: F401
    from fairseq_flash.tasks import flash_masked_lm as flash_masked_lm_task  # noqa: F401

    count_before_building(
        (flash_lm.FlashLanguageModel, flash_masked_lm.FlashMaskedLM, flash_seq2seq.FlashSeq2Seq), config_of
    )


def __getattr__(name: str) -> Any:
    """What ``modules`` holds, such as ``fairseq_flash.GatedAttentionUnit``, once it is asked for."""
    if not name.startswith("_"):
        modules = importlib.import_module("fairseq_flash.modules")
        if name in modules.__all__:
            return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
