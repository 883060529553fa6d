"""Why no checkpoint runs code or takes the memory, and why a damaged one is not read.

A checkpoint is a pickle in a zip archive, and a pickle is a program. Four doors lead from it to the machine:

1. The pickle itself. torch >= 2.6 reads it with ``weights_only=True``: plain values, tensors, and calls of
   listed classes only. fairseq writes a few more classes than torch lists, so ``_allow_harmless_classes``
   lists exactly these. The check is never turned off, not even for a file that the user trusts. What another
   process broadcasts on resume is read in the same way.
2. A listed class may be called with any arguments and be given any state, so only containers are listed:
   none imports, calls or looks up what it is given. numpy's own ``dtype`` and ``scalar`` are not among them;
   two stand-ins read plain numbers in their place. Arrays are written as tensors and need nothing.
3. Strings of the configuration that fairseq gives to ``eval``. ``_read_config_strings_as_values`` puts a
   reader of plain values in the place of every ``eval`` in fairseq.
4. An interpolation ``${...}`` in a configuration may run a resolver, as it may in the plain dict that fairseq
   turns into nodes anyway: omegaconf's and hydra's read the environment, the clock and the configuration,
   and none of them runs code.

A fifth door is the memory: a few bytes may ask for gigabytes, as a class of torch's own list does that takes
a size, a storage that claims more numbers than the file has, a container that is used a million times. So
every file is first read without making anything of it (``dry_run``), which finds a flipped bit as well.

What is refused is refused by the file's name, without torch's advice to turn the check off.
"""

import argparse
import ast
import collections
import logging
import pickle
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

import numpy
import omegaconf
import torch

from fairseq_flash._compat.dry_run import examine
from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

_LARGEST_REPEAT = 10_000  # items; `[(512, 3)] * 20` is ordinary, `[0] * 10**9` is an attack on the memory

# tests/test_compat.py finds any that is missing.
_MODULES_WITH_EVAL = (
    *("utils", "criterions.ctc", "data.audio.raw_audio_dataset", "data.codedataset"),
    *("optim.adafactor", "optim.adam", "optim.adamax", "optim.cpu_adam", "optim.fused_lamb"),
    *("models.fconv", "models.fconv_lm", "models.fconv_self_att", "models.lightconv_lm"),
    *("models.transformer_lm", "models.hubert.hubert", "models.multires_hubert.multires_hubert"),
    *("models.wav2vec.wav2vec", "models.wav2vec.wav2vec2", "models.speech_to_text.s2t_wav_transformer"),
)


def prepare() -> None:
    """Applies every healing of this file."""
    _allow_harmless_classes()
    _refuse_unfit_checkpoints()
    _read_config_strings_as_values()


class _NumberType:
    """Stands for ``numpy.dtype`` while a checkpoint is read; takes the types of plain numbers only.

    The real one would restore object and structured types too, whose bytes are then read as pointers.
    """

    def __init__(self, name: str, *_flags: Any) -> None:
        if not re.fullmatch(r"[biuf][1248]", str(name)):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r}) is not the type of a plain number")
        self.dtype = numpy.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _number(kind: _NumberType, data: bytes) -> numpy.generic:
    """Stands for numpy's ``scalar`` while a checkpoint is read."""
    if not isinstance(kind, _NumberType):
        raise pickle.UnpicklingError(f"GLOBAL numpy scalar of {type(kind).__name__} is not a plain number")
    return numpy.frombuffer(data, kind.dtype)[0]


def _allow_harmless_classes() -> None:
    """Lists what fairseq writes besides tensors and plain values, for torch >= 2.6 (``weights_only=True``).

    ``Namespace`` is in every checkpoint of a class without a dataclass (sgd, adafactor, ...); the omegaconf
    nodes and the placeholder travel between processes on resume; a numpy number is the score of a task that
    counts with numpy. Types such as ``int`` are the annotations inside omegaconf's metadata.
    """
    from fairseq.distributed.utils import _TensorPlaceholder
    from omegaconf.base import ContainerMetadata, Metadata

    torch.serialization.add_safe_globals(
        [argparse.Namespace, _TensorPlaceholder]
        + [omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.AnyNode, ContainerMetadata, Metadata]
        + [collections.defaultdict, dict, list, int]
        + [(typing.Any, "typing.Any"), (_NumberType, "numpy.dtype")]
        + [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    )


def _refuse_unfit_checkpoints() -> None:
    """Looks at each file before torch reads it, and says which one is refused, and why; any version.

    torch's own text is of many lines and advises to turn the check off. It looks at no checksum: a flipped
    bit would be a weight like any other (the cost is stated at ``examine``).
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils

    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        wrap(checkpoint_utils, name, _read_examined)
    wrap(distributed_utils, "_broadcast_object_slow", _refuse_clearly)


def _read_examined(load: Callable) -> Callable:
    def healed(path: Any, *args: Any, **kwargs: Any) -> Any:
        from fairseq.file_io import PathManager

        try:
            _check_parts(examine(PathManager.get_local_path(path)))
            state = load(path, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise _refusal(f"checkpoint {path!r}", error) from None
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            said = str(error).partition("\n")[0]
            said = f"it lacks {said}" if isinstance(error, KeyError) else said
            raise ValueError(f"checkpoint {path!r} cannot be read: {said}") from None
        _check_weights(state["model"], path)
        return state

    return healed


def _check_parts(content: Any) -> None:
    """Raises ValueError where what fairseq takes for granted is missing."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not what fairseq-train saves")
    if not isinstance(content.get("model"), dict):
        raise ValueError(f"it holds no weights ('model') but {sorted(map(str, content))[:8]}")
    if content.get("args") is None and not isinstance(content.get("cfg"), dict):
        raise ValueError("it holds weights but no configuration ('cfg' or 'args'), so no model can be built")
    # Of a node of omegaconf, there is a stand-in.
    plain = content.get("args") is None and type(content["cfg"]) is dict
    if plain and not isinstance(content["cfg"].get("model"), dict):
        raise ValueError("its configuration holds no options of a model, so none can be built")


def _check_weights(weights: dict[str, Any], path: str) -> None:
    """Raises ValueError for a weight that is NaN, and warns of an infinite one, which may be a mask."""
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            continue
        # The sum needs no memory and is finite as a rule; of half precision it may overflow.
        if weight.sum().isfinite():
            continue
        if weight.isnan().any():
            raise ValueError(
                f"checkpoint {path!r} holds NaN in {name}: its training has diverged, and nothing can be "
                "computed with it; allowed: an earlier checkpoint of the run"
            )
        if weight.isinf().any():
            logger.warning(f"checkpoint {path!r} holds infinite numbers in {name}")


def _refuse_clearly(load: Callable) -> Callable:
    def healed(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except pickle.UnpicklingError as error:
            raise _refusal("what another process sent", error) from None

    return healed


def _refusal(source: str, error: pickle.UnpicklingError) -> pickle.UnpicklingError:
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = f"code, or a class that is not allowed: {found[1]}" if found else "what is not plain data"
    return pickle.UnpicklingError(
        f"{source} was refused and nothing in it was executed: it holds {what}. "
        "Allowed are tensors, plain values and the containers that fairseq writes. Do not use a file "
        "that you did not expect to hold code; if the class is your own and harmless, list it with "
        "torch.serialization.add_safe_globals in your --user-dir."
    )


def _read_config_strings_as_values() -> None:
    """Replaces ``eval`` inside fairseq by a reader of plain values; any version.

    Models, tasks and optimizers call it on strings such as ``adaptive_softmax_cutoff``, ``adam_betas`` and
    ``conv_feature_layers``, which come from the checkpoint when one is loaded: they would run its code.
    A module's own global hides the builtin, so one name in each such module heals all its calls.
    """
    import fairseq  # noqa: F401  (brings every model, task and optimizer)

    for name in _MODULES_WITH_EVAL:
        module = sys.modules.get(f"fairseq.{name}")
        if module is not None:
            module.eval = _plain_value


def _plain_value(text: str) -> Any:
    """The number, string, tuple, list or dict that ``text`` spells, ``+`` and ``*`` of such; runs no code."""
    if not isinstance(text, str):
        raise TypeError(f"a config value to be read must be a string, got {type(text).__name__}")
    try:
        return _node_value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"config value {text[:200]!r} was not executed: it is code, or misspelt. Allowed are numbers, "
            "strings, True, False, None, and tuples, lists and dicts of them, as in '(0.9, 0.98)' or "
            "'[(512, 3)] * 4'."
        ) from None


def _node_value(node: ast.expr) -> Any:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult))):
        return ast.literal_eval(node)
    left, right = _node_value(node.left), _node_value(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    length = max((len(side) for side in (left, right) if hasattr(side, "__len__")), default=0)
    times = max((side for side in (left, right) if isinstance(side, int)), default=0)
    if length * times > _LARGEST_REPEAT:
        raise ValueError(f"{length} items, repeated {times} times")
    return left * right
