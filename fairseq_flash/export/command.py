"""The command lines of ``export-hf`` and ``import-hf``."""

import argparse
import sys
from pathlib import Path

import torch

from fairseq_flash.export.read import import_folder
from fairseq_flash.export.write import export_checkpoint

__all__ = ["export_main", "import_main"]

DTYPES = ("float32", "bfloat16")


def export_main(arguments: list[str], description: str) -> int:
    """Runs ``export-hf``.

    Args:
        arguments: Without the program's name.
        description: What it says of itself.

    Returns:
        The exit status.
    """
    parser = _parser(description)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of checkpoint_best.pt")
    parser.add_argument("folder", type=Path, metavar="DIR", help="to write to: new, or empty")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="of dict.txt; default: the checkpoint's folder"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="to round the weights to (as they are)")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    return _guarded(parser.prog, export_checkpoint, options.checkpoint, options.folder, options.data, dtype)


def import_main(arguments: list[str], description: str) -> int:
    """Runs ``import-hf``; as :func:`export_main`."""
    parser = _parser(description)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what export-hf or transformers wrote")
    parser.add_argument("checkpoint", type=Path, help="to write; dict.txt goes beside it")
    options = parser.parse_args(arguments)
    return _guarded(parser.prog, import_folder, options.folder, options.checkpoint)


def _parser(description: str) -> argparse.ArgumentParser:
    summary, details = description.split("\n\n", 1)
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=summary, epilog=details, formatter_class=raw)


def _guarded(program: str, function: object, *arguments: object) -> int:
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
