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
import types
from collections.abc import Callable, Iterable
from typing import Any, Optional

from omegaconf import DictConfig, ListConfig, OmegaConf

from fairseq_flash._compat.allowed import ALLOWED, MASKING, Allowed
from fairseq_flash._compat.healing import check_first, wrap

__all__ = ["betas_of", "prepare", "refuse", "refuse_values"]


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
    refuse(_misfits(cfg))


def refuse_values(part: str, options: Any) -> None:
    """Refuses a value that is not in ``ALLOWED``, and of generation those that do not go together.

    Args:
        part: Of the configuration.
        options: What it holds; what is not given is allowed.

    Raises:
        ValueError: an option has such a value.
    """
    refuse(_outside(ALLOWED[part], functools.partial(_value, options)))
    if part == "generation" and options is not None:
        refuse(_misfits_of_generation(options))


#: Name, value and what is wrong with it.
Misfits = Iterable[tuple[str, Any, str]]


def _outside(allowed: dict[str, Allowed], of: Callable[[str], Any]) -> Misfits:
    for name, (text, fits) in allowed.items():
        value = of(name)
        values = value if isinstance(value, (list, ListConfig)) else [value]
        if not all(fits(one) for one in values if isinstance(one, (int, float))):
            yield name, ",".join(map(str, values)), f"is not allowed; allowed: {text}"


def refuse(misfits: Misfits) -> None:
    """Refuses the first of some options.

    Args:
        misfits: Name, value and what is wrong with it, of each.

    Raises:
        ValueError: there is one.
    """
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
    if betas is not None and betas_of(betas) is None:
        yield "adam_betas", betas, "is not allowed; allowed: two from 0 to below 1, such as '(0.9, 0.98)'"
    alpha = of("criterion", "rdrop_alpha")
    for part, name in (("criterion", "ignore_prefix_size"), ("task", "carry_state")) if alpha else ():
        if given := of(part, name):
            # fairseq 0.12 ends in sizes that do not match; of a row that is read twice there are two states.
            beside = f"--{name.replace('_', '-')}{'' if given is True else f' {given}'}"
            yield "rdrop_alpha", alpha, f"is not allowed with {beside}; allowed: without"
    overrides = of("checkpoint", "optimizer_overrides")
    if overrides is not None and not isinstance(_read(ast.literal_eval, overrides), dict):
        yield "optimizer_overrides", overrides, "is not allowed; allowed: such as \"{'weight_decay': 0.1}\""
    for (part, needed), defaults in _BESIDE.items():
        if not of(part, needed):
            yield from _idle(needed, defaults, functools.partial(of, part))
    if of("dataset", "disable_validation") and (of("checkpoint", "patience") or 0) > 0:
        problem = "has no effect with --disable-validation; allowed: without"
        yield "patience", of("checkpoint", "patience"), problem
    if of("task", "_name") in ("masked_lm", "flash_masked_lm", "multilingual_masked_lm"):
        yield from _outside(MASKING, functools.partial(of, "task"))
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
    for needed, names in _NEEDED.items():
        if of(needed) == known[needed]:
            yield from _idle(needed, {name: known[name] for name in names}, of)


#: What options of generation need so that they have an effect.
_NEEDED = {
    "sampling": ("sampling_topk", "sampling_topp"),
    "lm_path": ("lm_weight",),
    "diverse_beam_groups": ("diverse_beam_strength",),
}


def _idle(needed: str, defaults: dict[str, Any], of: Callable[[str], Any]) -> Misfits:
    """Those that are given without ``needed``."""
    option = f"--{needed.replace('_', '-')}"
    for name, default in defaults.items():
        if of(name) not in (None, default):
            yield name, of(name), f"has no effect without {option}; allowed: with {option}"


@functools.cache
def _defaults_of_generation() -> dict[str, Any]:
    from fairseq.dataclass.configs import GenerationConfig

    return dataclasses.asdict(GenerationConfig())


def betas_of(given: Any) -> Optional[tuple[float, float]]:
    """Adam's betas of a pair, or of text that spells one; None if it is none, each from 0 to below 1."""
    pair = _read(ast.literal_eval, given) if isinstance(given, str) else given
    try:
        first, second = map(float, pair)
    except (TypeError, ValueError):
        return None
    return (first, second) if 0 <= first < 1 and 0 <= second < 1 else None


def _read(reader: Callable[[str], Any], text: str) -> Any:
    """What ``reader`` makes of the text; None if it cannot be read."""
    try:
        return reader(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
