"""Values of fairseq's options that cannot be: refused by name at one door, before work begins.

fairseq takes most of them: a negative one often counts as if none was given, zero as no limit, and what is
not a number is compared with and never reached. Others end later, in an error without the option's name, in
a training that makes no update, or in a signal. What an option of a model may be is said by the model.
"""

import argparse
import ast
import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from fairseq_flash._compat.healing import check_first, wrap

__all__ = ["prepare", "refuse_values"]

#: What is allowed, in words, and whether a value is.
Allowed = tuple[str, Callable[[Any], bool]]


def _from(least: float, otherwise: float = math.nan) -> Allowed:
    """Numbers from ``least`` on, infinity among them; or one other that switches the option off."""
    text = f"{least} or more" + (f", or {otherwise}" if otherwise == otherwise else "")
    return text, lambda value: value >= least or value == otherwise


def _between(least: float, most: float) -> Allowed:
    return f"{least} to {most}", lambda value: least <= value <= most


_ABOVE_0: Allowed = ("a number above 0", lambda value: 0 < value < math.inf)
_NUMBER: Allowed = ("a number", lambda value: not math.isnan(value))
_SHARE: Allowed = _between(0, 1)
_UNSIGNED: Allowed = ("0 or more", lambda value: 0 <= value < math.inf)
_SEED: Allowed = (
    f"0 to {2**32 - 2**16}, as fairseq adds the epoch to it and numpy takes no more than {2**32 - 1}",
    lambda value: 0 <= value <= 2**32 - 2**16,
)

#: By part of the configuration and option. An option of several values is one if all of them are.
ALLOWED: dict[str, dict[str, Allowed]] = {
    "common": {"seed": _SEED, "log_interval": _from(1)},
    "distributed_training": {"distributed_world_size": _from(1)},
    "dataset": {
        # Of max_tokens -1 fairseq's tools make no limit, but its training a limit that no row keeps.
        **dict.fromkeys(("max_tokens", "batch_size", "max_tokens_valid", "batch_size_valid"), _from(1)),
        **dict.fromkeys(("required_batch_size_multiple", "required_seq_len_multiple"), _from(1)),
        **dict.fromkeys(("max_valid_steps", "validate_interval", "num_shards"), _from(1)),
        **dict.fromkeys(("num_workers", "data_buffer_size", "shard_id"), _from(0)),
    },
    "optimization": {
        **dict.fromkeys(("max_epoch", "max_update"), _from(0)),
        **dict.fromkeys(("stop_time_hours", "clip_norm"), _from(0, otherwise=-1)),
        **{"update_freq": _from(1), "lr": _UNSIGNED},
    },
    "checkpoint": dict.fromkeys(("save_interval", "checkpoint_shard_count"), _from(1)),
    "ema": {"ema_decay": _SHARE, "ema_update_freq": _from(1), "ema_start_update": _from(0)},
    "optimizer": {"weight_decay": _UNSIGNED, "adam_eps": _ABOVE_0, "momentum": _UNSIGNED},
    "lr_scheduler": {
        **{"warmup_updates": _from(0), "total_num_update": _from(1)},
        **{"power": _UNSIGNED, "lr_shrink": _ABOVE_0},
    },
    "criterion": {"label_smoothing": _SHARE, "ignore_prefix_size": _from(0), "rdrop_alpha": _UNSIGNED},
    "task": {
        **dict.fromkeys(("tokens_per_sample", "max_source_positions", "max_target_positions"), _from(1)),
        **{"upsample_primary": _from(1, otherwise=-1), "num_batch_buckets": _from(0)},
    },
    "generation": {
        **{"beam": _from(1), "nbest": _from(1), "max_len_a": _UNSIGNED, "min_len": _from(0)},
        **{"lenpen": _NUMBER, "unkpen": _NUMBER, "lm_weight": _NUMBER, "temperature": _ABOVE_0},
        **dict.fromkeys(("prefix_size", "no_repeat_ngram_size"), _from(0)),
        **{"diverse_beam_groups": _from(1, otherwise=-1), "diversity_rate": _from(0, otherwise=-1)},
        "sampling_topk": ("1 or more, or -1 for all words", lambda k: k >= 1 or k == -1),
        "sampling_topp": ("above 0 to 1, or -1 for all words", lambda p: 0 < p <= 1 or p == -1),
    },
    "eval_lm": {"context_window": _from(0), "softmax_batch": _from(0)},
}
#: Of tasks that mask words; models of sound have names of these for options of their own, where 0 is none.
_MASKING: dict[str, Allowed] = {
    "mask_prob": ("above 0 to below 1", lambda value: 0 < value < 1),
    **dict.fromkeys(("leave_unmasked_prob", "random_token_prob"), _SHARE),
    **{"mask_multiple_length": _from(1), "mask_stdev": _UNSIGNED},
}


def prepare() -> None:
    """Applies every healing of this file."""
    _look_at_values_before_work()


def _look_at_values_before_work() -> None:
    """Looks at the options of each tool where all of them begin, before a folder is made or read.

    Those of a command line where it is read, as fairseq-generate begins nowhere else; those of a recipe where
    the work is begun.
    """
    from fairseq import options

    def heal_parse(parse: Callable) -> Callable:
        def healed(*args: Any, **kwargs: Any) -> Any:
            parsed = parse(*args, **kwargs)
            if kwargs.get("suppress_defaults"):
                return parsed  # a part of what has been looked at
            words = parsed[0] if isinstance(parsed, tuple) else parsed
            _look(types.SimpleNamespace(**{part: _Part(words, part) for part in ALLOWED}))
            return parsed

        return healed

    wrap(options, "parse_args_and_arch", heal_parse)
    check_first(_look)


class _Part:
    """A part of the configuration, of a command line, where each option has one name."""

    def __init__(self, words: argparse.Namespace, part: str) -> None:
        self.__dict__.update(vars(words), _name=getattr(words, part, None))


def _look(cfg: Any) -> None:
    for part in ALLOWED:
        refuse_values(part, getattr(cfg, part, None))
    _refuse(_misfits(cfg))


def refuse_values(part: str, options: Any) -> None:
    """Refuses a value that is not in ``ALLOWED``, and of generation those that do not go together.

    Args:
        part: Of the configuration.
        options: What it holds; what is not given is allowed.

    Raises:
        ValueError: an option has such a value.
    """
    _refuse(_outside(ALLOWED[part], functools.partial(_value, options)))
    if part == "generation" and options is not None:
        _refuse(_misfits_of_generation(options))


#: Name, value and what is wrong with it.
Misfits = Iterable[tuple[str, Any, str]]


def _outside(allowed: dict[str, Allowed], of: Callable[[str], Any]) -> Misfits:
    for name, (text, fits) in allowed.items():
        value = of(name)
        values = value if isinstance(value, (list, ListConfig)) else [value]
        if not all(fits(one) for one in values if isinstance(one, (int, float))):
            yield name, ",".join(map(str, values)), f"is not allowed; allowed: {text}"


def _refuse(misfits: Misfits) -> None:
    for name, value, problem in misfits:
        shown = "" if value is True else f" {value}"
        raise ValueError(f"--{name.replace('_', '-')}{shown} {problem}")


def _value(options: Any, name: str) -> Any:
    """An option that is given or has a default; None otherwise. Of nodes, dicts and plain objects."""
    if isinstance(options, DictConfig):
        return None if OmegaConf.is_missing(options, name) else options.get(name)
    return getattr(options, name, None)


#: By part and the switch that they need: options that have no effect without it, with their defaults.
_BESIDE = {
    ("ema", "store_ema"): {"ema_decay": 0.9999, "ema_start_update": 0, "ema_seed_model": None},
    ("task", "eval_bleu"): {
        **{"eval_bleu_args": "{}", "eval_bleu_detok": "space", "eval_bleu_detok_args": "{}"},
        **{"eval_tokenized_bleu": False, "eval_bleu_remove_bpe": None, "eval_bleu_print_samples": False},
    },
}


def _misfits(cfg: Any) -> Misfits:
    """Options that could be, but not beside the others."""

    def of(part: str, name: str) -> Any:
        return _value(getattr(cfg, part, None), name)

    shards, shard = of("dataset", "num_shards"), of("dataset", "shard_id")
    if shard is not None and shard >= shards:
        yield "shard_id", shard, f"is not allowed with --num-shards {shards}; allowed: 0 to {shards - 1}"
    window, length = of("eval_lm", "context_window"), of("task", "tokens_per_sample")
    if shards is not None and shards > 1 and window is None:
        names = "--distributed-world-size and --distributed-rank" if of("generation", "beam") else "without"
        yield "num_shards", shards, f"has no effect but with fairseq-eval-lm; allowed: {names}"
    if window and length is not None and window >= length:
        beside = f"with --tokens-per-sample {length}"
        yield "context_window", window, f"is not allowed {beside}; allowed: 0 to {length - 1}"
    if of("lr_scheduler", "_name") == "inverse_sqrt" and of("lr_scheduler", "warmup_updates") == 0:
        yield "warmup_updates", 0, "is not allowed with --lr-scheduler inverse_sqrt; allowed: 1 or more"
    betas = of("optimizer", "adam_betas")
    if betas is not None and not _are_betas(betas):
        yield "adam_betas", betas, "is not allowed; allowed: two from 0 to below 1, such as '(0.9, 0.98)'"
    overrides = of("checkpoint", "optimizer_overrides")
    if overrides is not None and not isinstance(_read(ast.literal_eval, overrides), dict):
        yield "optimizer_overrides", overrides, "is not allowed; allowed: such as \"{'weight_decay': 0.1}\""
    for (part, needed), defaults in _BESIDE.items():
        option = f"--{needed.replace('_', '-')}"
        for name, default in defaults.items() if not of(part, needed) else ():
            if of(part, name) not in (None, default):
                yield name, of(part, name), f"has no effect without {option}; allowed: with {option}"
    if of("dataset", "disable_validation") and (of("checkpoint", "patience") or 0) > 0:
        problem = "has no effect with --disable-validation; allowed: without"
        yield "patience", of("checkpoint", "patience"), problem
    if of("task", "_name") in ("masked_lm", "flash_masked_lm", "multilingual_masked_lm"):
        yield from _outside(_MASKING, functools.partial(of, "task"))
    if of("task", "_name") in ("masked_lm", "flash_masked_lm"):
        yield from _misfits_of_masking(functools.partial(of, "task"))
    if of("task", "eval_bleu"):
        text = of("task", "eval_bleu_args")
        given = _read(json.loads, text)
        if not isinstance(given, dict) or not given.keys() <= _defaults_of_generation().keys():
            example = json.dumps({"beam": 4, "lenpen": 0.6})
            yield "eval_bleu_args", text, f"is not allowed; allowed: of fairseq-generate, such as '{example}'"


def _misfits_of_masking(of: Callable[[str], Any]) -> Misfits:
    left, drawn = of("leave_unmasked_prob"), of("random_token_prob")
    if left + drawn > 1:
        beside = f"with --random-token-prob {drawn}"
        yield "leave_unmasked_prob", left, f"is not allowed {beside}; allowed: both together at most 1"
    if of("tokens_per_sample") == 1:
        yield "tokens_per_sample", 1, "is not allowed, as a row begins with <s>; allowed: 2 or more"
    if of("mask_whole_words"):
        # fairseq 0.12 asks its task for options that it has not kept.
        yield "mask_whole_words", True, "is not allowed: fairseq's task knows no words; allowed: without"


def _misfits_of_generation(options: Any) -> Misfits:
    known = _defaults_of_generation()

    def of(name: str) -> Any:
        value = _value(options, name)
        return known[name] if value is None else value

    beam, least, most = of("beam"), of("min_len"), of("max_len_b")
    groups, topp = of("diverse_beam_groups"), of("sampling_topp")
    if of("nbest") > beam:
        yield "nbest", of("nbest"), f"is not allowed with --beam {beam}; allowed: 1 to {beam}"
    if least > most and of("max_len_a") == 0:
        yield "min_len", least, f"is not allowed with --max-len-b {most}; allowed: at most that"
    if groups > 0 and beam % groups:
        yield "diverse_beam_groups", groups, f"is not allowed with --beam {beam}; allowed: what divides it"
    if of("sampling_topk") > 0 and topp > 0:
        yield "sampling_topk", of("sampling_topk"), f"has no effect with --sampling-topp {topp}; allowed: one"
    for name, needed in _NEEDS.items():
        if of(name) != known[name] and of(needed) == known[needed]:
            option = f"--{needed.replace('_', '-')}"
            yield name, of(name), f"has no effect without {option}; allowed: with {option}"


#: Options of generation that have no effect without another.
_NEEDS = {
    **{"sampling_topk": "sampling", "sampling_topp": "sampling", "lm_weight": "lm_path"},
    "diverse_beam_strength": "diverse_beam_groups",
}


@functools.cache
def _defaults_of_generation() -> dict[str, Any]:
    from fairseq.dataclass.configs import GenerationConfig

    return dataclasses.asdict(GenerationConfig())


def _are_betas(betas: Any) -> bool:
    """Whether it is a pair of shares, or text that spells one."""
    pair = _read(ast.literal_eval, betas) if isinstance(betas, str) else betas
    try:
        first, second = map(float, pair)
    except (TypeError, ValueError):
        return False
    return 0 <= first < 1 and 0 <= second < 1


def _read(reader: Callable[[str], Any], text: str) -> Any:
    """What ``reader`` makes of the text; None if it cannot be read."""
    try:
        return reader(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
