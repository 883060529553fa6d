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
    _restore_buckets()
    _keep_bf16_off_tpu()


def _restore_numpy_compat() -> None:
    """Gives numpy >= 2.0 its old alias ``numpy.compat.long``.

    ``token_block_dataset.py`` and ``language_pair_dataset.py`` use it with ``--sample-break-mode eos``.
    """
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)


def _restore_buckets() -> None:
    """Gives ``--num-batch-buckets`` its lengths: numpy >= 2.4 has renamed an argument of ``percentile``."""
    from fairseq.data import bucket_pad_length_dataset, data_utils

    def heal(buckets: Callable) -> Callable:
        def healed(sizes: Any, num_buckets: int) -> numpy.ndarray:
            shares = numpy.linspace(0, 100, num_buckets + 1)
            return numpy.unique(numpy.percentile(sizes, shares, method="lower")[1:])

        return healed

    for module in (data_utils, bucket_pad_length_dataset):
        wrap(module, "get_buckets", heal)


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
