"""Lets a flash_lm go on from a prompt, and shows the text as it is made.

    python scripts/generate.py checkpoints/ --data data-bin/books --prompt "It was" --top-k 10
    python scripts/generate.py checkpoints/ --data data-bin/books --save-state book.pt --tokens 0 < book.txt
    python scripts/generate.py checkpoints/ --data data-bin/books --load-state book.pt --prompt "And then"

The prompt is read in one pass, and every token after it costs the same however long the prompt was. What is
written is what follows the prompt, and nothing else. A line of the prompt is a paragraph, as in
prepare_lm.py: it ends with </s>, the last one if a line end follows. Without --prompt it comes from the
standard input, less one line end. --greedy gives the text of fairseq-generate --beam 1.

A state file holds tensors and no code; it fits the very weights and dictionary that it was saved with.
"""

import argparse
import codecs
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.search import Sampling

from fairseq_flash.modules import DecodingState

__all__ = ["Reader", "StreamedText", "encode", "load_state", "main", "save_state"]

SENTENCEPIECE = "sentencepiece.bpe.model"
STATE_FORMAT = "fairseq_flash decoding state 1"
PIECE = 4096  # tokens of a prompt that are read at a time: their number does not enter the memory


class Reader:
    """A model with the state after the tokens that it has read; the last one is still to be fed.

    Args:
        model: A ``flash_lm`` in evaluation mode.
        start: The token that a text begins with.
    """

    def __init__(self, model: torch.nn.Module, start: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.state = model.decoder.stack.empty_state(torch.zeros(1, 1, device=self.device))
        self.pending = start

    @torch.no_grad()
    def read(self, tokens: list[int]) -> None:
        """Goes on to the last of ``tokens``, in parallel."""
        context = torch.tensor([[self.pending, *tokens]], device=self.device)
        for piece in context[:, :-1].split(PIECE, dim=1) if tokens else ():
            _, self.state = self.model.decoder.stack(piece, None, self.state)
        self.pending = int(context[0, -1])

    @torch.no_grad()
    def predict(self, temperature: float) -> torch.Tensor:
        """Feeds the last token; log-probabilities of the next one, ``(1, vocabulary)``."""
        token = torch.tensor([[self.pending]], device=self.device)
        features, self.state = self.model.decoder.stack(token, None, self.state)
        logits = self.model.decoder.output_layer(features) / temperature
        return self.model.get_normalized_probs((logits, None), log_probs=True, sample=None)[:, -1]


class StreamedText:
    """Turns tokens into text one by one: words, or pieces of sentencepiece, whose bytes become characters.

    Args:
        dictionary: The model's.
        pieces: Whether symbols are sentencepiece's, with their own signs for spaces and bytes.
        at_line_start: Whether no word stands before the first token.
    """

    def __init__(self, dictionary: Dictionary, pieces: bool, at_line_start: bool) -> None:
        self.dictionary, self.pieces, self.at_line_start = dictionary, pieces, at_line_start
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that ``token`` adds: nothing while a character lacks bytes, a line end for ``</s>``."""
        if token == self.dictionary.eos():
            self.at_line_start = True
            return self._bytes.decode(b"", final=True) + "\n"
        symbol = self.dictionary[token]
        byte = re.fullmatch("<0x([0-9A-F]{2})>", symbol) if self.pieces else None
        if byte:
            self.at_line_start = False
            return self._bytes.decode(bytes.fromhex(byte[1]))
        text = symbol.replace("\u2581", " ") if self.pieces else f" {symbol}"
        if self.at_line_start:
            text = text.removeprefix(" ")
        self.at_line_start = False
        return self._bytes.decode(b"", final=True) + text


def encode(text: str, dictionary: Dictionary, model: Optional[Path]) -> list[int]:
    """Tokens of a prompt; ``model`` is the sentencepiece model, None for words between spaces."""
    split: Callable[[str], list[str]] = str.split
    if model is not None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(model))
        split = processor.encode_as_pieces
    tokens = []
    for line in text.split("\n"):
        tokens += [*(dictionary.index(symbol) for symbol in split(line)), dictionary.eos()]
    return tokens[:-1]


def generate(reader: Reader, choose: Callable[[torch.Tensor], int], temperature: float) -> Iterator[int]:
    """Tokens after what ``reader`` has read, without end."""
    while True:
        token = choose(reader.predict(temperature))
        yield token
        reader.pending = token


def chooser(
    dictionary: Dictionary, options: argparse.Namespace, first: bool
) -> Callable[[torch.Tensor], int]:
    """How the next token is chosen from log-probabilities ``(1, vocabulary)``, as fairseq does.

    Args:
        dictionary: The model's.
        options: The command line.
        first: Whether there is no prompt, so that the text must not end before it begins.
    """
    sampling = Sampling(dictionary, options.top_k, options.top_p)

    def choose(log_probs: torch.Tensor) -> int:
        nonlocal first
        log_probs[:, dictionary.pad()] = -torch.inf
        if first:
            log_probs[:, dictionary.eos()] = -torch.inf
        first = False
        if options.greedy:
            return int(log_probs.argmax())
        return int(sampling.step(0, log_probs.unsqueeze(1), None)[1])

    return choose


def fingerprint(model: torch.nn.Module, dictionary: Dictionary) -> str:
    """A digest of the weights and the dictionary."""
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_state(path: Path, reader: Reader, mark: str) -> None:
    """Writes what ``reader`` has read, for the model of fingerprint ``mark``; a kill leaves the old file."""
    layers = [_fields(layer, "cpu") for layer in reader.state.layers]
    new = path.with_name(path.name + ".new")
    content = {"format": STATE_FORMAT, "model": mark, "pending": reader.pending, "layers": layers}
    torch.save(content, new)
    os.replace(new, path)


def load_state(path: Path, reader: Reader, mark: str) -> None:
    """Lets ``reader`` go on where another one was saved; runs no code from the file.

    Raises:
        ValueError: the file is something else, or of another model.
    """
    try:
        content = torch.load(path, map_location=reader.device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"--load-state {path} does not exist") from None
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"--load-state {path} cannot be read as a state: {error}") from None
    fields = {"format", "model", "pending", "layers"}
    if not isinstance(content, dict) or content.keys() != fields or content["format"] != STATE_FORMAT:
        raise ValueError(f"--load-state {path} is not a state that generate.py saved")
    if content["model"] != mark:
        raise ValueError(
            f"--load-state {path} was saved with other weights or another dictionary "
            f"({content['model'][:12]}); this model is {mark[:12]}"
        )
    layers = []
    for index, empty in enumerate(reader.state.layers):
        stored = content["layers"][index]
        _check_layer(path, index, _fields(empty, reader.device), stored)
        layers.append(empty._replace(**stored))
    reader.state, reader.pending = DecodingState(tuple(layers)), int(content["pending"])


def _fields(layer: Any, device: Any) -> dict[str, Any]:
    """What a layer's state holds, tensors and integers, on ``device``."""
    held = {name: x for name, x in layer._asdict().items() if x is not None}
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in held.items()}


def _check_layer(path: Path, index: int, empty: dict, stored: dict) -> None:
    """Shapes and dtypes as in an empty state, but for axes that grow and are empty there."""

    def differs(name: str) -> bool:
        ours, theirs = empty[name], stored[name]
        if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            return type(ours) is not type(theirs)
        sizes = zip(ours.shape, theirs.shape, strict=False)
        return (
            ours.dtype != theirs.dtype or ours.dim() != theirs.dim() or any(a not in (0, b) for a, b in sizes)
        )

    wrong = sorted(empty.keys() ^ stored.keys()) or [name for name in empty if differs(name)]
    if wrong:
        raise ValueError(f"--load-state {path} does not fit layer {index} of this model: {', '.join(wrong)}")


def load_model(checkpoint: Path, data: Optional[Path]) -> tuple[torch.nn.Module, Any, Path]:
    """The model in evaluation mode, its task, and the folder of its dictionary.

    Raises:
        ValueError: something is missing, or the model is none of ours.
    """
    if checkpoint.is_dir():
        names = ("checkpoint_best.pt", "checkpoint_last.pt")
        found = [checkpoint / name for name in names if (checkpoint / name).exists()]
        if not found:
            raise ValueError(f"{checkpoint} holds neither {names[0]} nor {names[1]}")
        checkpoint = found[0]
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint} does not exist")
    data = data or checkpoint.parent
    if not (data / "dict.txt").exists():
        raise ValueError(f"{data} holds no dict.txt; --data names the folder that the model was trained on")
    loaded = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data)})
    (model,), _, task = loaded
    if not hasattr(getattr(model, "decoder", None), "stack"):
        raise ValueError(f"{checkpoint} holds a {type(model).__name__}; allowed: models such as flash_lm")
    return model.eval(), task, data


def write(options: argparse.Namespace) -> None:
    """Reads the prompt and streams what follows it."""
    model, task, data = load_model(options.checkpoint, options.data)
    if torch.cuda.is_available() and not options.cpu:
        model.cuda()
    dictionary = task.source_dictionary
    bos = getattr(task.args, "add_bos_token", False)
    reader = Reader(model, dictionary.bos() if bos else dictionary.eos())
    mark = fingerprint(model, dictionary) if options.load_state or options.save_state else ""
    if options.load_state:
        load_state(options.load_state, reader, mark)
    pieces = data / SENTENCEPIECE
    prompt = encode(options.prompt, dictionary, pieces if pieces.exists() else None)
    reader.read(prompt)
    if options.save_state:
        save_state(options.save_state, reader, mark)
    torch.manual_seed(options.seed)
    begins = not prompt and not options.load_state
    text = StreamedText(dictionary, pieces.exists(), reader.pending in (dictionary.eos(), dictionary.bos()))
    last = None
    tokens = generate(reader, chooser(dictionary, options, begins), options.temperature)
    for _, token in zip(range(options.tokens), tokens, strict=False):
        ends = token == dictionary.eos()
        if ends and (options.stop == "line" or (options.stop == "document" and last == token)):
            break
        print(text.add(token), end="", flush=True)
        last = token
    if options.tokens:
        print(flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "generate.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint, or a folder with checkpoint_best.pt or _last.pt")
    add("--data", type=Path, metavar="DIR", help="with dict.txt and, if used, sentencepiece.bpe.model")
    add("--prompt", metavar="TEXT", help="what the text begins with; default: the standard input")
    add("--tokens", type=int, default=200, metavar="N", help="to write at most (200)")
    help_stop = "at </s>, at an empty line, or only after --tokens (document)"
    add("--stop", choices=("line", "document", "never"), default="document", help=help_stop)
    add("--temperature", type=float, default=1.0, metavar="T", help="0 is --greedy (1)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--top-k", type=int, default=-1, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, default=-1.0, metavar="P", help="sample among tokens that make up P")
    add("--seed", type=int, default=1, metavar="N", help="of the sampling (1)")
    add("--save-state", type=Path, metavar="FILE", help="write the state after the prompt")
    add("--load-state", type=Path, metavar="FILE", help="go on from a saved state; the prompt may be empty")
    add("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args(arguments)
    if options.top_k > 0 and options.top_p > 0:
        parser.error("--top-k and --top-p exclude each other")
    for name, allowed in (("tokens", options.tokens >= 0), ("temperature", options.temperature >= 0)):
        if not allowed:
            parser.error(f"--{name} {getattr(options, name)} must not be negative")
    if options.temperature == 0:
        options.greedy, options.temperature = True, 1.0
    if options.prompt is None:
        options.prompt = (
            "" if options.load_state and sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
        )
    return options


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    try:
        write(parse(arguments))
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        # The reader has seen enough; Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
