"""The command lines of all commands: help is the command's docstring, an error names what is allowed."""

import argparse
from typing import Any, Optional

__all__ = ["command_line", "require", "split_off"]


def command_line(about: str, program: Optional[str] = None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that has no options yet.

    Args:
        about: The command's docstring: its first paragraph stands above the options, the rest below.
        program: The name in messages; that of the file where it is left out.
        settings: Of ``argparse.ArgumentParser``.
    """
    first, _, rest = about.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(program, description=first, epilog=rest, formatter_class=raw, **settings)


def require(parser: argparse.ArgumentParser, options: argparse.Namespace, least: int, *names: str) -> None:
    """Refuses an option, or a value of a list, below ``least``; one that was not given may stay None."""
    for name in names:
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                option = name.replace("_", "-")
                parser.error(f"--{option} {value} is not allowed; allowed: {least} or more")


def split_off(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those behind ``--``, which go to fairseq-train."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]
