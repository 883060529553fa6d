"""Lets a flash_lm go on from a prompt, and shows the text as it is made.

    flash-generate checkpoints/ --data data-bin/books --prompt "It was" --top-k 10
    flash-generate checkpoints/ --data data-bin/books --save-state book.pt --tokens 0 < book.txt
    flash-generate checkpoints/ --data data-bin/books --load-state book.pt --prompt "And then"
    flash-generate docs/pretrained/gutenberg --prompt "It was" --top-k 10

(In a clone, python scripts/generate.py is the same command, and the last line's folder is there.) A folder
holds checkpoint_best.pt or checkpoint_last.pt, or is what export-hf wrote, of which no code is run.

The prompt is read in one pass, and every token after it costs the same however long the prompt was. What is
written is what follows the prompt, and nothing else. A line of the prompt is a paragraph, as in
prepare_lm.py: it ends with </s>, the last one if a line end follows. Without --prompt it comes from the
standard input, less one line end. --greedy gives the text of fairseq-generate --beam 1.

On a GPU a step is recorded as a CUDA graph and replayed, with the same tokens; --no-graph computes it anew.
--bf16 halves the memory of the weights and of most of the state; its tokens are not those of float32.

A state file holds tensors and no code; it fits the very weights and dictionary that it was saved with, in the
precision that it was saved in.
"""

import argparse
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import torch

from fairseq_flash._compat.dry_run import examine
from fairseq_flash.generation.choice import Choice
from fairseq_flash.generation.model import fingerprint, load_model
from fairseq_flash.generation.reader import Reader
from fairseq_flash.generation.text import StreamedText, encode

__all__ = ["main", "parse"]

SENTENCEPIECE = "sentencepiece.bpe.model"
MOST_TOKENS = 2**30
COLDEST = 1e-6  # a temperature below would make infinities of log-probabilities


#: Takes a checkpoint and the folder of its dictionary, and gives what :func:`load_model` gives.
Load = Callable[[Path, Optional[Path]], tuple[Any, Any, Path]]


def write(options: argparse.Namespace, load: Load = load_model) -> None:
    """Reads the prompt and streams what follows it."""
    _check_place(options.save_state)
    model, task, data = load(options.checkpoint, options.data)
    dictionary, pieces = task.source_dictionary, data / SENTENCEPIECE
    mark = fingerprint(model, dictionary) if options.load_state or options.save_state else ""
    if options.bf16:
        model.to(torch.bfloat16)
    if torch.cuda.is_available() and not options.cpu:
        model.cuda()
    bos = getattr(task.args, "add_bos_token", False)
    reader = Reader(model, dictionary.bos() if bos else dictionary.eos(), record=not options.no_graph)
    if options.load_state:
        _load_state(reader, options.load_state, mark, len(dictionary))
    prompt = encode(options.prompt, dictionary, pieces if pieces.exists() else None)
    choose = Choice(
        dictionary,
        greedy=options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        first=not prompt and not options.load_state,
    )
    reader.read(prompt)
    if options.save_state:
        reader.save(options.save_state, mark)
    torch.manual_seed(options.seed)
    text = StreamedText(dictionary, pieces.exists(), reader.pending in (dictionary.eos(), dictionary.bos()))
    _stream(reader, choose, text, options)


def _stream(reader: Reader, choose: Choice, text: StreamedText, options: argparse.Namespace) -> None:
    last, end = None, text.dictionary.eos()
    for _, token in zip(range(options.tokens), reader.generate(choose), strict=False):
        if token == end and (options.stop == "line" or (options.stop == "document" and last == token)):
            break
        print(text.add(token), end="", flush=True)
        last = token
    if options.tokens:
        print(flush=True)


def _check_place(path: Optional[Path]) -> None:
    """Before work begins: whether a state can be saved there."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--save-state {path} is not allowed; allowed: a file in a folder that exists")


def _load_state(reader: Reader, path: Path, mark: str, vocabulary: int) -> None:
    try:
        if path.is_file():
            examine(str(path))
        reader.load(path, mark, vocabulary)
    except pickle.UnpicklingError:
        raise ValueError(f"--load-state {path} cannot be read: it holds code, or a class") from None
    except ValueError as error:
        said = str(error)
        raise ValueError(
            f"--load-state {said if str(path) in said else f'{path} cannot be read: {said}'}"
        ) from None


def _number(kind: type, least: float, most: float, shown: str) -> Callable[[str], Union[int, float]]:
    """Reads a number in ``least`` to ``most``; ``shown`` says which."""

    def read(text: str) -> Union[int, float]:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not allowed; allowed: {shown}")
        return value

    return read


def _temperature(text: str) -> Union[int, float]:
    """0, or a number by which log-probabilities can be divided."""
    zero = text.strip() in ("0", "0.0", "0.")
    return 0.0 if zero else _number(float, COLDEST, sys.float_info.max, f"0, or {COLDEST} or more")(text)


def parse(arguments: list[str], program: Optional[str] = None) -> argparse.Namespace:
    """Reads the command line."""
    summary, details = __doc__.split("\n\n", 1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=summary, epilog=details, formatter_class=raw)
    add = parser.add_argument
    count = _number(int, 0, MOST_TOKENS, f"0 to {MOST_TOKENS}")
    seeds = _number(int, 0, 2**63 - 1, "0 to 2**63 - 1")
    likeliest = _number(int, 1, 2**31, "1 or more, up to all words")
    share = _number(float, 5e-324, 1.0, "above 0, up to 1")
    add("checkpoint", type=Path, help="a checkpoint, or a folder that holds one or is of export-hf")
    add("--data", type=Path, metavar="DIR", help="with dict.txt and, if used, sentencepiece.bpe.model")
    add("--prompt", metavar="TEXT", help="what the text begins with; default: the standard input")
    add("--tokens", type=count, default=200, metavar="N", help="to write at most (200)")
    help_stop = "at </s>, at an empty line, or only after --tokens (document)"
    add("--stop", choices=("line", "document", "never"), default="document", help=help_stop)
    add("--temperature", type=_temperature, default=1.0, metavar="T", help="0 is --greedy (1)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    some = parser.add_mutually_exclusive_group().add_argument
    some("--top-k", type=likeliest, metavar="K", help="sample among the K likeliest tokens")
    some("--top-p", type=share, metavar="P", help="sample among tokens that make up P")
    add("--seed", type=seeds, default=1, metavar="N", help="of the sampling (1)")
    add("--save-state", type=Path, metavar="FILE", help="write the state after the prompt")
    add("--load-state", type=Path, metavar="FILE", help="go on from a saved state; the prompt may be empty")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("--bf16", action="store_true", help="weights in bfloat16, on any device")
    add("--no-graph", action="store_true", help="do not record a step as a CUDA graph")
    options = parser.parse_args(arguments)
    if options.temperature == 0:
        options.greedy, options.temperature = True, 1.0
    if options.prompt is None:
        options.prompt = "" if options.load_state and sys.stdin.isatty() else _standard_input()
    return options


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt from the standard input is not {error.encoding}: {error}") from None


def main(arguments: list[str], program: Optional[str] = None, load: Load = load_model) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name.
        program: How messages name it; by default as it was started.
        load: What loads the model; checkpoints alone by default.

    Returns:
        The exit status.
    """
    program = program or Path(sys.argv[0]).name
    try:
        write(parse(arguments, program), load)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has seen enough; Python would complain again when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0
