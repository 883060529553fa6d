"""The command ``fairseq-flash``: all that the project can do, from any folder, with or without a clone.

Its sub-commands are the files of ``scripts/``, which a wheel carries as ``fairseq_flash_commands``, and those
tools of fairseq that take a ``--user-dir``, which is filled in.
"""

import argparse
import ast
import importlib
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import fairseq_flash

__all__ = ["compare_lm", "describe", "generate", "main", "prepare_lm", "tell_missing"]

PACKAGE = Path(fairseq_flash.__file__).resolve().parent
INSTALLED = PACKAGE.parent / "fairseq_flash_commands"
SCRIPTS = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "scripts"
COMMANDS = (
    *("prepare-lm", "prepare-corpus", "cut-corpus", "prepare-translation", "prepare-classification"),
    *("compare-lm", "compare-masked-lm", "compare-translation"),
    *("generate", "describe", "health", "plot", "extrapolate", "yardsticks"),
    *("benchmark-training", "benchmark-generation", "benchmark-ops", "benchmark-fairseq-train"),
    "benchmark-sequence-parallel",
    *("export-hf", "import-hf"),
)
#: fairseq's own; its generate has another name here.
TOOLS = {
    "preprocess": "preprocess",
    "train": "train",
    "hydra-train": "hydra_train",
    "validate": "validate",
    "eval-lm": "eval_lm",
    "generate-text": "generate",
    "interactive": "interactive",
}
#: Where results go without a clone: into the folder that the user is in, as those of compare-* always do.
PLACES = {
    "extrapolate": {"--output": "results/extrapolation.csv"},
    "yardsticks": {"--output": "results/yardsticks.csv"},
    "plot": {"--results": "results"},
    "benchmark-training": {"--output": "results/training.csv"},
    "benchmark-generation": {"--output": "results/generation.csv"},
    "benchmark-ops": {"--output": "results/ops.csv"},
    "benchmark-fairseq-train": {"--output": "results/fairseq_train.csv"},
    "benchmark-sequence-parallel": {"--output": "results/sequence_parallel.csv"},
}
EXTRAS = {
    "matplotlib": "plot",
    "pandas": "plot",
    "triton": "triton",
    "safetensors": "hf",
    "transformers": "hf",
}


def main(arguments: Optional[list[str]] = None) -> int:
    """Runs ``fairseq-flash``.

    Args:
        arguments: Without the program's name; those of this process by default.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        "fairseq-flash",
        description="FLASH for fairseq: prepares text, trains, generates, compares, measures.",
        epilog=_list_of_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=fairseq_flash.__version__)
    parser.add_argument("command", choices=(*COMMANDS, *TOOLS), metavar="COMMAND", help="see below")
    # What stands behind the command is the command's own.
    command = parser.parse_args(arguments[:1]).command
    return _run(f"fairseq-flash {command}", command, arguments[1:])


def prepare_lm() -> int:
    """Runs ``flash-prepare-lm``."""
    return _run("flash-prepare-lm", "prepare-lm", sys.argv[1:])


def compare_lm() -> int:
    """Runs ``flash-compare-lm``."""
    return _run("flash-compare-lm", "compare-lm", sys.argv[1:])


def describe() -> int:
    """Runs ``flash-describe``."""
    return _run("flash-describe", "describe", sys.argv[1:])


def generate() -> int:
    """Runs ``flash-generate``."""
    return _run("flash-generate", "generate", sys.argv[1:])


def _run(program: str, command: str, arguments: list[str]) -> int:
    try:
        if command in TOOLS:
            return _run_tool(command, arguments)
        sys.argv[1:] = _with_places(command, arguments)
        # As Python does for a file that it is given; runpy leaves it out.
        sys.path.insert(0, str(SCRIPTS))
        runpy.run_path(str(_script(command)), run_name="__main__")
    except ModuleNotFoundError as error:
        return tell_missing(error, program, command, arguments)
    return 0


def tell_missing(error: ModuleNotFoundError, program: str, command: str, arguments: list[str]) -> int:
    """Names a package that is not installed, and prints the help that was asked for all the same.

    Args:
        error: Of the import.
        program: As it was called.
        command: One of ``COMMANDS`` or ``TOOLS``.
        arguments: Of the program.

    Returns:
        The exit status.

    Raises:
        ModuleNotFoundError: the same, where it is no package that could be installed.
    """
    name = (error.name or "").partition(".")[0]
    if not name or find_spec(name) is not None:
        raise error
    if {"-h", "--help"} & set(arguments) and command in COMMANDS:
        print(_docstring(command))
    print(f"{program}: {name} is not installed; {_remedy(name)}", file=sys.stderr)
    return 2


def _run_tool(command: str, arguments: list[str]) -> int:
    """Runs a tool of fairseq with the plug-in already there."""
    own = ["--user-dir", str(PACKAGE)]
    given = any(word.partition("=")[0] == "--user-dir" for word in arguments)
    if command == "hydra-train":
        given = any(word.lstrip("+").startswith("common.user_dir=") for word in arguments)
        own = [f"common.user_dir={PACKAGE}"]
    sys.argv = [f"fairseq-{TOOLS[command].replace('_', '-')}", *([] if given else own), *arguments]
    importlib.import_module(f"fairseq_cli.{TOOLS[command]}").cli_main()
    return 0


def _with_places(command: str, arguments: list[str]) -> list[str]:
    """The arguments behind the places of results, unless a clone has its own; the last of two counts."""
    if SCRIPTS != INSTALLED or "--quick" in arguments:
        return arguments
    places = ((option, str(Path.cwd() / place)) for option, place in PLACES.get(command, {}).items())
    return [*(word for pair in places for word in pair), *arguments]


def _remedy(name: str) -> str:
    if name in EXTRAS:
        return f"allowed: pip install 'fairseq-flash[{EXTRAS[name]}]'"
    return f"allowed: pip install {'ve-fairseq' if name.startswith('fairseq') else name}"


def _script(command: str) -> Path:
    return SCRIPTS / f"{command.replace('-', '_')}.py"


def _docstring(command: str) -> str:
    return ast.get_docstring(ast.parse(_script(command).read_text(encoding="utf-8"))) or ""


def _list_of_commands() -> str:
    lines = [f"  {command:28}{_docstring(command).partition(chr(10))[0]}" for command in COMMANDS]
    tools = [
        f"  {tool:28}fairseq-{module.replace('_', '-')} with --user-dir" for tool, module in TOOLS.items()
    ]
    return "\n".join(["commands (each has a --help of its own):", *lines, "", "tools of fairseq:", *tools])
