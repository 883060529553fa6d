"""flash_masked_lm: a bidirectional FLASH that fills in masked words and classifies rows."""

import logging
from typing import Any, Optional

import torch
from fairseq import hub_utils
from fairseq.models import FairseqEncoderModel, register_model, register_model_architecture
from fairseq.models.roberta.model import RobertaClassificationHead
from torch import nn

from fairseq_flash.models._config import fill_preset
from fairseq_flash.models._diagnostics import watch_layers
from fairseq_flash.models._masked_lm_encoder import FlashEncoder, FlashMaskedLMConfig
from fairseq_flash.models._masked_lm_hub import FlashHubInterface, find_sentencepiece
from fairseq_flash.models._systems import masked_lm_architectures
from fairseq_flash.models.flash_lm import _resolve_n_ref, normalized_probs

__all__ = ["FlashEncoder", "FlashMaskedLM", "FlashMaskedLMConfig"]

logger = logging.getLogger(__name__)


@register_model("flash_masked_lm", dataclass=FlashMaskedLMConfig)
class FlashMaskedLM(FairseqEncoderModel):
    """FLASH as RoBERTa: learns to fill in masked words, then to classify rows of any length.

    Source: Hua et al. 2022, section 4 (masked language modeling); Liu et al. 2019 (RoBERTa) for the heads.
    """

    def __init__(self, cfg: FlashMaskedLMConfig, encoder: FlashEncoder) -> None:
        super().__init__(encoder)
        self.cfg = cfg
        self.classification_heads = nn.ModuleDict()

    @classmethod
    def build_model(cls, cfg: FlashMaskedLMConfig, task: Any) -> "FlashMaskedLM":
        """Builds the model for a task with a ``source_dictionary``.

        Raises:
            ValueError: an option has a value that is not allowed, or would have no effect.
        """
        model = cls(cfg, FlashEncoder(cfg, task.source_dictionary, _resolve_n_ref(cfg, task)))
        watch_layers(model, model.encoder.stack.blocks, cfg.diagnostics_interval)
        return model

    def forward(
        self,
        src_tokens: torch.Tensor,
        src_lengths: Optional[torch.Tensor] = None,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        classification_head_name: Optional[str] = None,
        masked_tokens: Optional[torch.Tensor] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As :meth:`FlashEncoder.forward`, or the logits of a classification head.

        Args:
            src_tokens: ``(b, n)``; padding leads or trails.
            src_lengths: Ignored: the padding tells.
            features_only: Whether to stop before the vocabulary.
            return_all_hiddens: Not available: features are those of the last layer.
            classification_head_name: Of the head to apply to each row's first real token.
            masked_tokens: ``(b, n)``, True at the positions to predict; None for all.
            unused: What fairseq passes to every model, such as ``src_id``.

        Returns:
            What the encoder returns, or with a head, logits ``(b, classes)``; and a dictionary.

        Raises:
            ValueError: no head has that name, or as the encoder.
        """
        if return_all_hiddens:
            raise ValueError("return_all_hiddens=True is not allowed; allowed: False, the last layer's alone")
        if classification_head_name is None:
            return self.encoder(src_tokens, src_lengths, features_only, masked_tokens)
        head = self.classification_head(classification_head_name)
        features, extra = self.encoder(src_tokens, src_lengths, features_only=True)
        return head(self.encoder.first_features(features, src_tokens)), extra

    def classification_head(self, name: str) -> nn.Module:
        """The head of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.classification_heads:
            allowed = ", ".join(self.classification_heads) or "none, until one is registered"
            raise ValueError(f"classification_head_name={name!r} is unknown; allowed: {allowed}")
        return self.classification_heads[name]

    def register_classification_head(
        self, name: str, num_classes: Optional[int] = None, inner_dim: Optional[int] = None, **unused: Any
    ) -> None:
        """Adds a head with fresh weights, in place of one of the same name.

        Args:
            name: Of the head, as ``--classification-head-name`` gives it.
            num_classes: Logits that it gives, 1 or more.
            inner_dim: Width of its hidden layer; None for ``d``.
            unused: What fairseq's hub interface passes on.

        Raises:
            ValueError: ``num_classes`` or ``inner_dim`` is below 1, or not given.
        """
        inner_dim = self.cfg.embed_dim if inner_dim is None else inner_dim
        for argument, value in dict(num_classes=num_classes, inner_dim=inner_dim).items():
            if value is None or value < 1:
                raise ValueError(f"{argument}={value} is not allowed; allowed: 1 or more")
        head = RobertaClassificationHead(
            self.cfg.embed_dim, inner_dim, num_classes, "tanh", self.cfg.pooler_dropout
        )
        like = self.encoder.lm_head.bias
        self.classification_heads[name] = head.to(dtype=like.dtype, device=like.device)

    def get_normalized_probs(
        self, net_output: tuple[torch.Tensor, Any], log_probs: bool, sample: Optional[dict[str, Any]] = None
    ) -> torch.Tensor:
        """Probabilities over the last axis of the logits, in float32 or wider."""
        return normalized_probs(net_output[0], log_probs)

    @property
    def supported_targets(self) -> set[str]:
        """What the criterions may ask for: the tokens themselves."""
        return {"self"}

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "checkpoint_best.pt",
        data_name_or_path: str = ".",
        bpe: Optional[str] = "sentencepiece",
        **kwargs: Any,
    ) -> FlashHubInterface:
        """Loads a checkpoint with its classification heads, ready for use (without dropout).

        Args:
            model_name_or_path: Folder of the checkpoint.
            checkpoint_file: Its name.
            data_name_or_path: Folder of the data that it was trained on, with its dictionaries; relative to
                the checkpoint's if it begins with a dot.
            bpe: fairseq's name of the subword model; None where the words of the text are the tokens. A
                ``sentencepiece.bpe.model`` beside the checkpoint or in the data's folder is found by itself.
            kwargs: Options of the checkpoint to override, such as ``sentencepiece_model``.

        Returns:
            An interface to features, masked words and classes.

        Raises:
            ValueError: no sentencepiece model is given or found; or as :meth:`upgrade_state_dict_named`.
        """
        if bpe == "sentencepiece" and "sentencepiece_model" not in kwargs:
            kwargs["sentencepiece_model"] = find_sentencepiece(model_name_or_path, data_name_or_path)
        loaded = hub_utils.from_pretrained(
            model_name_or_path,
            checkpoint_file,
            data_name_or_path,
            archive_map=cls.hub_models(),
            bpe=bpe,
            load_checkpoint_heads=True,
            **kwargs,
        )
        return FlashHubInterface(loaded["args"], loaded["task"], loaded["models"][0]).eval()

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        """None are published."""
        return {}

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Brings the checkpoint's classification heads and this model's together.

        A head that only the checkpoint has is left out, or registered with ``load_checkpoint_heads``; one
        that only this model has keeps its fresh weights.

        Raises:
            ValueError: a head of the same name has another size, or the dictionaries differ.
        """
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}.classification_heads." if name else "classification_heads."
        stored = {key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)}
        for head in sorted(stored):
            classes, inner_dim = state_dict[f"{prefix}{head}.out_proj.weight"].shape
            if head in self.classification_heads:
                self._check_head(head, classes, inner_dim)
            elif self.cfg.load_checkpoint_heads:
                self.register_classification_head(head, classes, inner_dim)
            else:
                logger.warning(f"the checkpoint's classification head {head!r} is not used here and left out")
                for key in [key for key in state_dict if key.startswith(f"{prefix}{head}.")]:
                    del state_dict[key]
        for key, value in self.classification_heads.state_dict().items():
            state_dict.setdefault(prefix + key, value)

    def _check_head(self, name: str, classes: int, inner_dim: int) -> None:
        own = self.classification_heads[name].out_proj
        if (own.out_features, own.in_features) != (classes, inner_dim):
            raise ValueError(
                f"classification head {name!r} has {own.out_features} classes and inner dimension "
                f"{own.in_features}, the checkpoint's of that name {classes} and {inner_dim}; allowed: as "
                "many, or another --classification-head-name"
            )


#: Architectures by name, each with its difference from the model's defaults.
PRESETS = masked_lm_architectures()


def _register(name: str, preset: dict) -> None:
    @register_model_architecture("flash_masked_lm", name)
    def fill(args: Any) -> None:
        fill_preset(args, FlashMaskedLMConfig, preset)


for _name, _preset in PRESETS.items():
    # The model's own name is an architecture already, of the defaults.
    if _name != "flash_masked_lm":
        _register(_name, _preset)
