"""What a checkpoint was trained with, kept beside its weights: options that no weight tells, and the words.

A model read with another chunk size, or divided by something else, computes without complaint and predicts
worse. So each state dict carries the options that decide what is computed, whoever loads it and however:
resuming, fine-tuning, evaluation with ``--model-overrides``, or plain PyTorch. It is JSON as a vector of
float64, because all that handles state dicts (averages, EMA, noise) then leaves it as it is.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, BaseFairseqModel
from omegaconf import DictConfig, open_dict

from fairseq_flash.models._option_checks import warn_once
from fairseq_flash.models._options import FlashLanguageModelConfig, FlashMaskedLMConfig, FlashSeq2SeqConfig
from fairseq_flash.models._places import find_places
from fairseq_flash.modules.transformer_block import default_ffn_embed_dim

__all__ = ["RememberingModel", "config_of", "remember_options_of_checkpoints", "trained_options"]

logger = logging.getLogger(__name__)

#: Where ``torch.nn.Module`` keeps extra state of the outermost module.
KEY = "_extra_state"
CONFIGS = {
    "flash_lm": FlashLanguageModelConfig,
    "flash_masked_lm": FlashMaskedLMConfig,
    "flash_seq2seq": FlashSeq2SeqConfig,
}
#: What fairseq's hub lays over every checkpoint, whatever its subwords are.
USED_BY_THE_HUB = {"sentencepiece_model", "bpe_codes", "bpe_merges", "bpe_vocab", "generation_args"}
#: Change neither what is computed nor, but for ``n_ref``, which a buffer tells, a weight.
#: Every other option is compared, new ones too.
FREE = {
    *("_name", "init", "n_ref", "max_positions", "load_checkpoint_heads"),
    *("dropout", "attention_dropout", "adaptive_softmax_dropout", "pooler_dropout"),
    *("checkpoint_activations", "offload_activations", "compile", "backend", "diagnostics_interval"),
    *("vocabulary_loss", "no_graph"),
    "change_trained_options",
}
#: What decides as well, and records of before do not name, as there was no choice.
NEWER = {"shift_keys": False}


def trained_options(cfg: Any, config: type) -> dict[str, Any]:
    """The options that decide what a model computes from its weights.

    Args:
        cfg: Of one of the three models, as fairseq gives it; options that it lacks have their defaults.
        config: The dataclass of the model.

    Returns:
        Plain values by name, without those that have no effect beside the others.
    """
    options = {
        option.name: _plain(getattr(cfg, option.name, option.default))
        for option in dataclasses.fields(config)
        if option.name not in FREE
    }
    attention, gau = options["attention"], options.get("block", "gau") == "gau"
    without_effect = {
        "chunk_size": attention == "quadratic",
        "linear_norm": attention in ("quadratic", "local"),
        "relative_bias": attention == "global" or not gau,
        "expansion_factor": not gau,
        "glu": gau,
        "ffn_embed_dim": gau,
        "adaptive_input_factor": not options.get("adaptive_input"),
        "adaptive_softmax_factor": options.get("adaptive_softmax_cutoff") is None,
    }
    if not gau and options["ffn_embed_dim"] is None:
        options["ffn_embed_dim"] = float(default_ffn_embed_dim(cfg.embed_dim, bool(options["glu"])))
    options["relative_bias"] = options["relative_bias"] or "rotary"
    return {name: value for name, value in options.items() if not without_effect.get(name)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    return float(value) if isinstance(value, (int, float)) else str(value)


def _encode(record: dict[str, Any]) -> torch.Tensor:
    text = json.dumps(record, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.float64, device="cpu")


def _decode(vector: torch.Tensor) -> dict[str, Any]:
    try:
        record = json.loads(bytes(vector.double().round().int().tolist()))
        return {"options": dict(record.get("options", {})), "words": record.get("words")}
    except (AttributeError, TypeError, ValueError):
        logger.warning("the checkpoint's record of its options is not readable; they are not compared")
        return {}


class RememberingModel(BaseFairseqModel):
    """A model whose state dict says what it was trained with; refuses one of other options."""

    _record: Optional[dict[str, Any]] = None

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        **kwargs: Any,
    ) -> Any:
        """As fairseq's, from paths of any kind.

        Raises:
            ValueError: an argument is no path, or the checkpoint is refused.
            FileNotFoundError: a folder or file does not exist.
        """
        registered = cls.hub_models()
        places, options = find_places(registered, model_name_or_path, checkpoint_file, data_name_or_path)
        interface = super().from_pretrained(*places, **{**options, **kwargs})
        cls.check_class(interface.models, places[1])
        return interface

    @classmethod
    def check_class(cls, models: Iterable[Any], checkpoint: str) -> None:
        """Refuses models that are not of this class.

        Raises:
            ValueError: so it is.
        """
        for model in models:
            if not isinstance(model, cls):
                other = type(model).__name__
                raise ValueError(
                    f"{checkpoint!r} holds a {other}, not a {cls.__name__}; allowed: {other}.from_pretrained"
                )

    def prepare_for_inference_(self, cfg: Any) -> None:
        """As fairseq's.

        Raises:
            ValueError: ``--retain-dropout``, which only modules of fairseq's own know.
        """
        if getattr(cfg.generation, "retain_dropout", False):
            raise ValueError(
                "--retain-dropout is not allowed: these models generate without; allowed: without"
            )
        super().prepare_for_inference_(cfg)

    def remember(self, cfg: Any, config: type, *dictionaries: Dictionary) -> None:
        """Takes down the options and the words that the model is built with."""
        words = "\n".join("\n".join(dictionary.symbols) for dictionary in dictionaries)
        digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        self._record = {"options": trained_options(cfg, config), "words": digest}
        self._may_change = bool(getattr(cfg, "change_trained_options", False))

    @property
    def trained_with(self) -> dict[str, Any]:
        """The options that decide what the model computes from its weights."""
        return dict(self._record["options"]) if self._record else {}

    def get_extra_state(self) -> torch.Tensor:
        """The record, as it stands in the state dict."""
        return _encode(self._record or {})

    def set_extra_state(self, state: torch.Tensor) -> None:
        """The record stays that of this model: what differs was refused, or is meant."""

    def load_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> Any:
        """As fairseq's, after comparing what the checkpoint was trained with.

        Raises:
            ValueError: an option differs, or weights are missing, unknown or of another shape.
        """
        stored = _decode(state_dict[KEY]) if KEY in state_dict else {}
        options = stored.get("options", {})
        options = options and NEWER | options
        if any(name.startswith("classification_heads.") for name in state_dict):
            options.setdefault("pooling", "first")  # of heads of before there was a choice
        else:
            options.pop("pooling", None)  # decides nothing yet
        self._compare_options(options)
        words = stored.get("words")
        if self._record and words and words != self._record["words"]:
            warn_once(
                "the dictionary has other words than that which the checkpoint was trained with; allowed for "
                "the same text: data prepared with its dict.txt"
            )
        for name, weight in self.named_parameters():
            given = state_dict.get(name, weight)
            if isinstance(given, torch.Tensor) and not given.is_floating_point():
                raise ValueError(f"the checkpoint's {name} is {given.dtype}; allowed: floating point numbers")
        # Checkpoints of before have no record.
        state_dict[KEY] = self.get_extra_state()
        try:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        except ValueError:
            raise
        except Exception as error:  # of PyTorch, or of fairseq's modules while they upgrade it
            causes = " ".join(str(error).split())
            raise ValueError(
                f"the checkpoint does not fit the options of this model: {causes}; allowed: the --arch and "
                "the options that it was trained with"
            ) from error

    def _compare_options(self, stored: dict[str, Any]) -> None:
        own = self._record["options"] if self._record else {}
        differing = [
            f"--{name.replace('_', '-')} {_shown(own[name])} (trained with {_shown(stored[name])})"
            for name in own
            if name in stored and stored[name] != own[name]
        ]
        # An option that has an effect on one side alone follows from another that differs.
        if not differing:
            return
        text = f"options differ from those that the checkpoint was trained with: {', '.join(differing)}"
        if not self._may_change:
            raise ValueError(
                f"{text}; allowed: its own, or --change-trained-options (change_trained_options=True among "
                "overrides) where the weights fit all the same"
            )
        warn_once(f"{text}; used all the same, as --change-trained-options asks for")


def _shown(value: Any) -> str:
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)[:200]


def remember_options_of_checkpoints() -> None:
    """Gives checkpoints of before their record, from their own configuration, as fairseq reads them.

    fairseq lays ``--model-overrides`` over a checkpoint's configuration while it reads it, and tells a model
    that loads only the result.
    """
    if hasattr(checkpoint_utils, "_flash_options"):
        return
    overwrite, upgrade = checkpoint_utils.overwrite_args_by_name, checkpoint_utils._upgrade_state_dict
    checkpoint_utils._flash_options = True

    def overwrite_after_noting(cfg: Any, overrides: dict[str, Any]) -> None:
        """As fairseq's ``overwrite_args_by_name``, once the checkpoint's own options have been noted."""
        options = cfg.__dict__["_flash_options"] = _options_of(cfg)
        if options:
            # An override of what an older checkpoint's configuration lacks would be dropped.
            with open_dict(cfg):
                for option in dataclasses.fields(config_of(cfg)):
                    cfg.model.setdefault(option.name, option.default)
        overwrite(cfg, overrides)
        if options:
            _warn_of_unused(cfg, overrides)

    def upgrade_with_record(state: dict[str, Any]) -> dict[str, Any]:
        """As fairseq's ``_upgrade_state_dict``; gives the weights the record that they lack."""
        state = upgrade(state)
        cfg = state.get("cfg")
        options = getattr(cfg, "__dict__", {}).get("_flash_options") or _options_of(cfg)
        if options and isinstance(state.get("model"), dict):
            state["model"].setdefault(KEY, _encode({"options": options}))
        return state

    checkpoint_utils.overwrite_args_by_name = overwrite_after_noting
    checkpoint_utils._upgrade_state_dict = upgrade_with_record


def _warn_of_unused(cfg: DictConfig, overrides: dict[str, Any]) -> None:
    """Says which overrides are no option of the checkpoint: fairseq drops them."""
    known = {name: True for part in cfg.values() if isinstance(part, DictConfig) for name in part} | dict(cfg)
    for name in overrides:
        architecture = name in ("_name", "model") and isinstance(overrides[name], str)
        if architecture or (name not in known and name not in USED_BY_THE_HUB):
            near = difflib.get_close_matches(str(name).replace("-", "_"), map(str, known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near and not architecture else ""
            warn_once(f"override {name!r} is no option of the checkpoint and has no effect{hint}")


def config_of(cfg: Any) -> Optional[type]:
    """The dataclass of the model that a whole configuration is of, if it is one of ours."""
    name = getattr(cfg.get("model"), "_name", None) if hasattr(cfg, "get") else None
    return CONFIGS.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))


def _options_of(cfg: Any) -> Optional[dict[str, Any]]:
    config = config_of(cfg)
    return config and trained_options(cfg.model, config)
