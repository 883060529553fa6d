"""Models built as fairseq builds them, with weights of which all parts matter, and how near is equal."""

import functools
import string
import zlib
from argparse import Namespace
from pathlib import Path

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig

from support import tools

EPSILON = torch.finfo(torch.float64).eps
TOLERANCE = 100 * EPSILON


def write_dictionary(path: Path, words: str = string.ascii_lowercase[:16]) -> None:
    """A dictionary of one-letter words, after fairseq's own four."""
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    dictionary.save(str(path))


def configure(data: Path, task: str, *arguments: object) -> DictConfig:
    """The configuration of a command line."""
    words = [data, "--user-dir", tools.USER_DIR, "--task", task, *arguments]
    args = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    return convert_namespace_to_omegaconf(args)


def build(data: Path, task: str, *arguments: object) -> tuple[torch.nn.Module, tasks.FairseqTask]:
    """The model of a command line and its task."""
    cfg = configure(data, task, *arguments)
    made = tasks.setup_task(cfg.task)
    return made.build_model(cfg.model), made


def make_telling(
    model: torch.nn.Module, seed: str = "", lifting: tuple[str, ...] = (".bias.",)
) -> torch.nn.Module:
    """The model in float64, every weight drawn large by its name and the seed."""
    for name, parameter in model.double().eval().named_parameters():
        torch.manual_seed(zlib.crc32((name + seed).encode()))
        # Around one for a norm; above zero for what lifts scores, so that few of them fall to zero.
        lifts = any(part in name for part in lifting)
        centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.5 if lifts else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=1.0 if "gamma" in name else 0.4)
    return model


def draw(rows: int, length: int, seed: int = 0, words: int = 20) -> torch.Tensor:
    """Tokens that are neither padding nor special, (rows, length)."""
    return torch.randint(4, words, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error / EPSILON:.0f} epsilon"


@functools.cache
def generation_settings(task: str) -> Namespace:
    """How fairseq-generate searches unless told otherwise."""
    parser = options.get_generation_parser(default_task=task)
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, ["data"])).generation
