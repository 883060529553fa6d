"""Names and defaults that changed between fairseq and the numpy and torch of today."""

import argparse
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]


def prepare() -> None:
    """Applies every healing of this file."""
    _restore_numpy_compat()
    _keep_bf16_off_tpu()


def _restore_numpy_compat() -> None:
    """Gives numpy >= 2.0 its old alias ``numpy.compat.long``.

    ``token_block_dataset.py`` and ``language_pair_dataset.py`` use it with ``--sample-break-mode eos``.
    """
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)


def _keep_bf16_off_tpu() -> None:
    """Undoes ``tpu=True``, which ``options.py`` of fairseq 0.12 sets whenever ``--bf16`` is given.

    Only the argparse tools do it. A ``--tpu`` that the user gave, or a parser's default, stays.
    """
    from fairseq import options

    def heal(parse: Callable) -> Callable:
        def healed(parser: argparse.ArgumentParser, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
            result = parse(parser, input_args, *args, **kwargs)
            namespace = result[0] if isinstance(result, tuple) else result
            asked = "--tpu" in (sys.argv[1:] if input_args is None else input_args)
            if getattr(namespace, "tpu", False) and not asked and not parser.get_default("tpu"):
                namespace.tpu = False
            return result

        return healed

    wrap(options, "parse_args_and_arch", heal)
