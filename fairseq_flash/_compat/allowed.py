"""What options of fairseq may be, each by itself: the tables that ``values`` looks up."""

import math
from collections.abc import Callable
from typing import Any

__all__ = ["ALLOWED", "MASKING", "Allowed"]

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
MASKING: dict[str, Allowed] = {
    "mask_prob": ("above 0 to below 1", lambda value: 0 < value < 1),
    **dict.fromkeys(("leave_unmasked_prob", "random_token_prob"), _SHARE),
    **{"mask_multiple_length": _from(1), "mask_stdev": _UNSIGNED},
}
