"""What fairseq needs on this Python, numpy and torch, and the places where it trusts a checkpoint too much.

Everything was tried with ve-fairseq 0.12.3, torch 2.13, numpy 2.4, hydra 1.3 and omegaconf 2.3 on Python
3.11. Each healing names its reason and the versions that need it, does nothing where it is not needed, and
may run twice.

Two things happen before ``--user-dir`` is read and so cannot be healed from here: the line "Please install
tensorboardX" (hence tensorboardX is a dependency of this package) and warnings about fairseq's own syntax.
"""

import argparse
import ast
import collections
import functools
import inspect
import logging
import os
import pickle
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import omegaconf
import torch

__all__ = ["prepare_host"]

_LARGEST_REPEAT = 10_000  # items; `[(512, 3)] * 20` is ordinary, `[0] * 10**9` is an attack on the memory

# (message, category, module): what fairseq does not do right and a user can do nothing about.
_NOISE = (
    (r"hydra\.experimental\.(initialize|compose)\(\) is no longer experimental", UserWarning, r"hydra\."),
    (r"\s*The version_base parameter is not specified", UserWarning, r"hydra\."),
    (r"In 'config': Usage of deprecated keyword in package header", UserWarning, r"hydra\."),
    (r"\s*'config' is validated against ConfigStore schema with the same name", UserWarning, r""),
    (r"\s*The strict flag in the compose API is deprecated", UserWarning, r"hydra\."),
    (r"'pin_memory' argument is set as true but no accelerator is found", UserWarning, r"torch\.utils\.data"),
    (r"`torch\.cuda\.amp\.autocast\(args\.\.\.\)` is deprecated", FutureWarning, r"fairseq\."),
    (r"amp_C fused kernels unavailable", UserWarning, r"fairseq\."),
    (r"Support for mismatched key_padding_mask and attn_mask is deprecated", UserWarning, r"torch\.nn"),
)
# tests/test_compat.py finds any that is missing.
_MODULES_WITH_EVAL = (
    *("utils", "criterions.ctc", "data.audio.raw_audio_dataset", "data.codedataset"),
    *("optim.adafactor", "optim.adam", "optim.adamax", "optim.cpu_adam", "optim.fused_lamb"),
    *("models.fconv", "models.fconv_lm", "models.fconv_self_att", "models.lightconv_lm"),
    *("models.transformer_lm", "models.hubert.hubert", "models.multires_hubert.multires_hubert"),
    *("models.wav2vec.wav2vec", "models.wav2vec.wav2vec2", "models.speech_to_text.s2t_wav_transformer"),
)
# What logs its whole configuration: the tools, and from_pretrained().
_CONFIG_LOGGERS = (
    *(f"fairseq_cli.{tool}" for tool in ("train", "validate", "generate", "eval_lm", "interactive")),
    "fairseq.models.fairseq_model",
)


def prepare_host() -> None:
    """Makes fairseq run on current numpy and torch, and keeps it from running code out of a checkpoint.

    Idempotent; works before or after fairseq's own modules are imported. Call it before a model is
    registered.
    """
    _silence_noise()
    _restore_numpy_compat()
    _allow_harmless_classes()
    _explain_refused_checkpoints()
    _explain_unfit_checkpoints()
    _read_config_strings_as_values()
    _keep_bf16_off_tpu()
    _explain_fp16_without_gpu()
    _copy_checkpoints_atomically()
    _keep_arrays_out_of_checkpoints()
    _accept_blank_prompts()
    _keep_every_batch()
    _name_unusable_splits()
    _join_byte_pieces()
    _shorten_config_dump()


def _wrap(owner: Any, name: str, heal: Callable[[Callable], Callable]) -> None:
    """Replaces ``owner.name`` by ``heal`` of it, once; static and class methods stay what they are."""
    raw = inspect.getattr_static(owner, name)
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind else raw
    if getattr(original, "_healed_by_fairseq_flash", False):
        return
    healed = functools.wraps(original)(heal(original))
    healed._healed_by_fairseq_flash = True
    setattr(owner, name, kind(healed) if kind else healed)


def _silence_noise() -> None:
    """Hides the exact warnings of ``_NOISE``: hydra >= 1.1, torch >= 2.4.

    Appended, so that ``-W`` or ``PYTHONWARNINGS`` still win. The logged line appears only where tensorboardX
    is missing and this package is imported before fairseq.
    """
    for message, category, module in _NOISE:
        warnings.filterwarnings("ignore", message=message, category=category, module=module, append=True)
    logging.getLogger("fairseq.tasks.text_to_speech").addFilter(_is_not_tensorboard_advice)


def _is_not_tensorboard_advice(record: logging.LogRecord) -> bool:
    return "install tensorboardX" not in record.getMessage()


def _restore_numpy_compat() -> None:
    """Gives numpy >= 2.0 its old alias ``numpy.compat.long``.

    ``token_block_dataset.py`` and ``language_pair_dataset.py`` use it with ``--sample-break-mode eos``.
    """
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)


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

    A listed class may be called with any arguments and get any state, so only containers are listed: none
    imports, calls or looks up what it is given. ``Namespace`` is in every checkpoint of a class without a
    dataclass (sgd, adafactor, ...); the omegaconf nodes and the placeholder travel between processes on
    resume; a numpy number is the score of a task that counts with numpy. Types such as ``int`` are the
    annotations inside omegaconf's metadata. An interpolation in a node may run a resolver, as it may in the
    plain dict that fairseq turns into nodes anyway: omegaconf's and hydra's read the environment, the clock
    and the config, and none of them runs code.
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


def _explain_refused_checkpoints() -> None:
    """Says which file torch >= 2.6 refuses, and why; torch's own text advises to turn the check off."""
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils

    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        _wrap(checkpoint_utils, name, functools.partial(_refuse_clearly, source="checkpoint {!r}"))
    source = "what another process sent"
    _wrap(distributed_utils, "_broadcast_object_slow", functools.partial(_refuse_clearly, source=source))


def _refuse_clearly(load: Callable, source: str) -> Callable:
    def healed(subject: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(subject, *args, **kwargs)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"code, or a class that is not allowed: {found[1]}" if found else "what is not plain data"
            raise pickle.UnpicklingError(
                f"{source.format(subject)} was refused and nothing in it was executed: it holds {what}. "
                "Allowed are tensors, plain values and the containers that fairseq writes. Do not use a file "
                "that you did not expect to hold code; if the class is your own and harmless, list it with "
                "torch.serialization.add_safe_globals in your --user-dir."
            ) from None

    return healed


def _explain_unfit_checkpoints() -> None:
    """Says why a model refuses a checkpoint; fairseq 0.12 only asks that "the architectures match"."""
    from fairseq.trainer import Trainer

    def heal(load: Callable) -> Callable:
        def healed(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return load(self, *args, **kwargs)
            except Exception as error:
                what, cause = str(error).partition(";")[0], error.__context__
                if what.startswith("Cannot load model parameters") and isinstance(cause, ValueError):
                    raise ValueError(f"{what}: {cause}") from cause
                raise

        return healed

    _wrap(Trainer, "load_checkpoint", heal)


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

    _wrap(options, "parse_args_and_arch", heal)


def _explain_fp16_without_gpu() -> None:
    """Turns the CUDA error of ``--fp16`` on a machine without a GPU into advice; any version."""
    from fairseq.optim import fp16_optimizer

    def heal(build: Callable) -> Callable:
        def healed(cls: type, args: Any, params: Any, flatten: bool = True) -> Any:
            if flatten and not torch.cuda.is_available():
                raise ValueError(
                    "--fp16 needs a GPU and there is none: leave it out, or train with --bf16, or (slow) "
                    "with --fp16 --fp16-no-flatten-grads"
                )
            return build(cls, args, params, flatten)

        return healed

    _wrap(fp16_optimizer._FP16OptimizerMixin, "build_fp32_params", heal)


def _copy_checkpoints_atomically() -> None:
    """Copies ``checkpoint_last.pt`` and its like beside the target and renames; any version.

    ``PathManager.copy`` writes into the target itself: a kill in between leaves a truncated file and a run
    that can not be resumed. (fairseq already renames the first file it writes.
    ``--write-checkpoints-asynchronously`` makes no copies, and its one file is not atomic.)
    """
    from fairseq.file_io import PathManager

    def heal(copy: Callable) -> Callable:
        def healed(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
            refused = os.path.exists(dst_path) and not overwrite
            if refused or PathManager.path_requires_pathmanager(dst_path):
                return copy(src_path, dst_path, overwrite)
            done = copy(src_path, dst_path + ".tmp", True)
            os.replace(dst_path + ".tmp", dst_path)
            return done and dst_path

        return healed

    _wrap(PathManager, "copy", heal)


def _keep_arrays_out_of_checkpoints() -> None:
    """Writes the counts of ``--eval-bleu`` as tensors: as numpy arrays, torch >= 2.6 refuses to read them.

    So nothing more needs to be allowed in a checkpoint; a meter that is restored counts on with arrays.
    """
    from fairseq.logging.meters import AverageMeter

    def write(state_dict: Callable) -> Callable:
        def healed(self) -> dict[str, Any]:
            state = state_dict(self).items()
            return {k: torch.from_numpy(v) if isinstance(v, numpy.ndarray) else v for k, v in state}

        return healed

    def read(load_state_dict: Callable) -> Callable:
        def healed(self, state: dict[str, Any]) -> None:
            arrays = {k: v.numpy() for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}
            load_state_dict(self, {**state, **arrays})

        return healed

    _wrap(AverageMeter, "state_dict", write)
    _wrap(AverageMeter, "load_state_dict", read)


def _accept_blank_prompts() -> None:
    """Lets a language model continue a blank line; fairseq 0.12 fails with ``assert step < max_len``.

    With ``--prefix-size`` the prefix of a blank line is the end of the sentence, forced as the first token:
    one hypothesis of the beam ends there, the others score minus infinity and never end. An empty prompt
    forces nothing.
    """
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal(step: Callable) -> Callable:
        def healed(self, generator, models, sample, prefix_tokens=None, constraints=None):
            if prefix_tokens is not None and prefix_tokens.size(1) > 0:
                blank = prefix_tokens[:, :1].eq(self.source_dictionary.eos())
                prefix_tokens = prefix_tokens.masked_fill(blank, self.source_dictionary.pad())
            return step(self, generator, models, sample, prefix_tokens, constraints)

        return healed

    _wrap(LanguageModelingTask, "inference_step", heal)


def _keep_every_batch() -> None:
    """Gives back the last batch, which fairseq 0.12 drops unless it holds a multiple of eight sentences.

    With the default ``--required-batch-size-multiple 8``, fairseq-generate and validation silently leave out
    up to seven sentences, and a split with one small batch counts as empty.
    """
    from fairseq.data import data_utils

    def heal(batch_by_size: Callable) -> Callable:
        def healed(indices: Any, *args: Any, **kwargs: Any) -> list:
            if not isinstance(indices, numpy.ndarray):
                indices = numpy.fromiter(indices, dtype=numpy.int64, count=-1)
            if len(indices) == 0:
                return []
            batches = list(batch_by_size(indices, *args, **kwargs))
            fixed_shapes = kwargs.get("fixed_shapes", args[5] if len(args) > 5 else None)
            taken = sum(map(len, batches))
            if fixed_shapes is None and taken < len(indices):
                batches.append(indices[taken:])
            return batches

        return healed

    _wrap(data_utils, "batch_by_size", heal)


def _name_unusable_splits() -> None:
    """Names the split that is empty or smaller than one block: fairseq fails obscurely, or goes on."""
    from fairseq.tasks.language_modeling import LanguageModelingTask

    def heal(load: Callable) -> Callable:
        def healed(self, split: str, *args: Any, **kwargs: Any) -> Any:
            try:
                loaded = load(self, split, *args, **kwargs)
            except ValueError as error:
                if "mmap an empty file" not in str(error):
                    raise
                raise ValueError(
                    f"split {split!r} of {self.args.data!r} is empty; allowed: fairseq-preprocess on at "
                    "least one line"
                ) from None
            tokens, block = int(self.datasets[split].sizes.sum()), self.args.tokens_per_sample
            whole = str(self.args.sample_break_mode or "none") == "none"
            if split.startswith("train") and whole and tokens < block:
                raise ValueError(
                    f"split {split!r} of {self.args.data!r} has {tokens} tokens, less than one block of "
                    f"--tokens-per-sample {block}; allowed: at most {tokens}"
                )
            return loaded

        return healed

    _wrap(LanguageModelingTask, "load_dataset", heal)


def _join_byte_pieces() -> None:
    """Shows characters that sentencepiece wrote as bytes, ``<0xC3> <0xA9>``, as the characters they are.

    Wherever fairseq turns pieces into text: ``--bpe sentencepiece`` and ``--remove-bpe sentencepiece``.
    """
    from fairseq.data import data_utils
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

    def healed_decode(decode: Callable) -> Callable:
        return lambda self, pieces: decode(self, _without_byte_pieces(pieces))

    def healed_post_process(post_process: Callable) -> Callable:
        def healed(sentence: str, symbol: str) -> str:
            if symbol == "sentencepiece":
                sentence = _without_byte_pieces(sentence)
            return post_process(sentence, symbol)

        return healed

    _wrap(SentencepieceBPE, "decode", healed_decode)
    _wrap(data_utils, "post_process", healed_post_process)


def _without_byte_pieces(pieces: str) -> str:
    def joined(found: re.Match) -> str:
        # Only a whole piece is a byte: a text's own "<0x41>" is split into others.
        return bytes.fromhex(re.sub(r"<0x|>| ", "", found[0])).decode(errors="replace")

    return re.sub(r"(?<![^ ])<0x[0-9A-F]{2}>(?: <0x[0-9A-F]{2}>)*(?![^ ])", joined, pieces)


def _shorten_config_dump() -> None:
    """Logs one line in place of 8 KB of configuration; ``LOGLEVEL=DEBUG`` keeps it, checkpoints hold it."""
    for name in _CONFIG_LOGGERS:
        logging.getLogger(name).addFilter(_shorten_config)


def _shorten_config(record: logging.LogRecord) -> bool:
    if isinstance(record.msg, omegaconf.DictConfig) and os.environ.get("LOGLEVEL", "").upper() != "DEBUG":
        # Only training has read the model's options by then.
        train = record.name == "fairseq_cli.train"
        names = ("task", "model", "criterion", "optimizer") if train else ("task",)
        parts = [(name, record.msg.get(name)) for name in names]
        names = ", ".join(f"{name} {getattr(part, '_name', part)}" for name, part in parts)
        record.msg, record.args = f"{names} (LOGLEVEL=DEBUG logs the whole configuration)", None
    return True
