"""What a user reads: no noise that they can do nothing about, and errors that say the cause."""

import argparse
import ast
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import omegaconf
import torch

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]

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
    # Of the targets before the last word, which no model here is trained on.
    (r"overflow encountered in scalar subtract", RuntimeWarning, r"fairseq\.data\.token_block_dataset"),
    (r"Support for mismatched key_padding_mask and attn_mask is deprecated", UserWarning, r"torch\.nn"),
)

# What logs its whole configuration: the tools, and from_pretrained().
_CONFIG_LOGGERS = (
    *(f"fairseq_cli.{tool}" for tool in ("train", "validate", "generate", "eval_lm", "interactive")),
    "fairseq.models.fairseq_model",
)


# What transformer, transformer_lm and roberta call the options of our models.
_OPTIONS = {
    "--decoder-layers": "--layers",
    "--encoder-layers": "--layers",
    "--decoder-embed-dim": "--embed-dim",
    "--encoder-embed-dim": "--embed-dim",
    "--decoder-input-dim": "--embed-dim",
    "--decoder-output-dim": "--embed-dim",
    "--decoder-ffn-embed-dim": "--ffn-embed-dim (with --block transformer; of units, --expansion-factor)",
    "--encoder-ffn-embed-dim": "--ffn-embed-dim (with --block transformer; of units, --expansion-factor)",
    "--decoder-attention-heads": "--attention-dim (the size of the single head, or of each)",
    "--encoder-attention-heads": "--attention-dim (the size of the single head, or of each)",
    "--activation-dropout": "--dropout",
    "--relu-dropout": "--dropout",
    "--decoder-normalize-before": "--norm (each layer is normed before, always)",
    "--no-decoder-final-norm": "--norm (the last layer is followed by one, always)",
    "--no-token-positional-embeddings": "the default (--scaled-sin adds absolute positions)",
    "--decoder-learned-pos": "--scaled-sin (absolute positions are sines; relative ones are always there)",
}


def prepare() -> None:
    """Applies every healing of this file."""
    _silence_noise()
    _shorten_config_dump()
    _explain_fp16_without_gpu()
    _explain_unfit_checkpoints()
    _explain_unfit_schedules()
    _name_our_options()
    _refuse_alignments()


def _silence_noise() -> None:
    """Hides the exact warnings of ``_NOISE``: hydra >= 1.1, torch >= 2.4.

    Appended, so that ``-W`` or ``PYTHONWARNINGS`` still win. The logged line on tensorboardX appears only
    where it is missing and this package is imported before fairseq; those of hydra's jobs wherever fairseq's
    options are read outside of its tools.
    """
    for message, category, module in _NOISE:
        warnings.filterwarnings("ignore", message=message, category=category, module=module, append=True)
    logging.getLogger("fairseq.tasks.text_to_speech").addFilter(_is_not_tensorboard_advice)
    logging.getLogger("hydra.core.utils").addFilter(_is_not_a_name_of_a_job)


def _is_not_tensorboard_advice(record: logging.LogRecord) -> bool:
    return "install tensorboardX" not in record.getMessage()


def _is_not_a_name_of_a_job(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting JobRuntime:")


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

    wrap(fp16_optimizer._FP16OptimizerMixin, "build_fp32_params", heal)


def _explain_unfit_checkpoints() -> None:
    """Says why a checkpoint is refused; fairseq 0.12 only asks that "the architectures match".

    Its optimizer, of a model with other weights, is refused by torch with no word of an option.
    """
    from fairseq.trainer import Trainer

    def heal(load: Callable) -> Callable:
        def healed(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return load(self, *args, **kwargs)
            except Exception as error:
                what, cause = str(error).partition(";")[0], error.__context__
                if what.startswith("Cannot load model parameters") and isinstance(cause, ValueError):
                    raise ValueError(f"{what}: {cause}") from cause
                if "doesn't match the size of optimizer's group" in what:
                    raise ValueError(
                        "the checkpoint's optimizer is of a model with other weights; allowed: "
                        "--reset-optimizer, or --finetune-from-model"
                    ) from error
                raise

        return healed

    wrap(Trainer, "load_checkpoint", heal)


def _explain_unfit_schedules() -> None:
    """Names what a checkpoint's optimizer and schedule cannot go on with.

    fairseq 0.12 ends in KeyError 'best' where the schedule is of another kind, and puts any name of
    ``--optimizer-overrides`` beside the optimizer's own, where nothing looks at it.
    """
    from fairseq.optim import FairseqOptimizer
    from fairseq.optim.lr_scheduler import FairseqLRScheduler

    def heal_schedule(load: Callable) -> Callable:
        def healed(self, state_dict: dict[str, Any]) -> None:
            if "best" not in state_dict:
                raise ValueError(
                    f"the checkpoint's --lr-scheduler is not {type(self).__name__}; allowed: the one that it "
                    "was trained with, or --reset-lr-scheduler"
                )
            load(self, state_dict)

        return healed

    def heal_optimizer(load: Callable) -> Callable:
        def healed(self, state_dict: Any, optimizer_overrides: Any = None) -> None:
            known = sorted(name for name in self.param_groups[0] if name != "params")
            for name in optimizer_overrides or {}:
                if name not in known:
                    raise ValueError(
                        f"--optimizer-overrides: the optimizer has no {name!r}; allowed: {', '.join(known)}"
                    )
            load(self, state_dict, optimizer_overrides)

        return healed

    wrap(FairseqLRScheduler, "load_state_dict", heal_schedule)
    wrap(FairseqOptimizer, "load_state_dict", heal_optimizer)


def _name_our_options() -> None:
    """Tells who gives one of our models an option of fairseq's by the name it has there, or no task."""
    from fairseq import options

    def heal(parse: Callable) -> Callable:
        def healed(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            refuse = parser.error

            def explained(message: str) -> None:
                given = [word.partition("=")[0] for word in message.split()]
                names = [f"{name} is {_OPTIONS[name]}" for name in given if name in _OPTIONS]
                hint = f" (for the models of fairseq_flash, {'; '.join(names)})" if names else ""
                refuse(message + hint)

            parser.error = explained
            try:
                parsed = parse(parser, *args, **kwargs)
            except KeyError as error:
                if error.args != (None,):
                    raise
                # fairseq-validate has no default.
                parser.error("--task is missing; allowed: the task that the checkpoint was trained with")
            _check_overrides(getattr(parsed, "model_overrides", "{}"), parser)
            return parsed

        return healed

    wrap(options, "parse_args_and_arch", heal)


def _check_overrides(text: str, parser: argparse.ArgumentParser) -> None:
    try:
        fits = isinstance(ast.literal_eval(text), dict)
    except (ValueError, SyntaxError):
        fits = "(" in text  # an expression, which some tools take
    if not fits:
        parser.error(f"--model-overrides {text!r} is not allowed; allowed: such as \"{{'chunk_size': 64}}\"")


def _refuse_alignments() -> None:
    """Says before the first sentence that ``--print-alignment`` needs weights, which ours lack."""
    from fairseq.sequence_generator import SequenceGeneratorWithAlignment

    def heal(init: Callable) -> Callable:
        def healed(self, models: Any, *args: Any, **kwargs: Any) -> None:
            if not all(getattr(model.decoder, "has_attention_weights", True) for model in models):
                raise ValueError(
                    "--print-alignment is not allowed: gated attention gives no weights to align"
                )
            init(self, models, *args, **kwargs)

        return healed

    wrap(SequenceGeneratorWithAlignment, "__init__", heal)
