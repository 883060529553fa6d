"""flash_masked_lm: a bidirectional FLASH that fills in masked words and classifies rows."""

import logging
from typing import Any, Optional

import torch
from fairseq import hub_utils
from fairseq.models import FairseqEncoderModel, register_model
from fairseq.models.roberta.model import RobertaClassificationHead
from torch import distributed, nn

from fairseq_flash.models._diagnostics import watch_layers
from fairseq_flash.models._embedding import build_embedding
from fairseq_flash.models._encoder import FlashEncoder
from fairseq_flash.models._hub import FlashHubInterface, count_of, find_sentencepiece
from fairseq_flash.models._layers import resolve_n_ref
from fairseq_flash.models._option_checks import check_masked_lm, check_sizes
from fairseq_flash.models._options import FlashMaskedLMConfig
from fairseq_flash.models._places import find_places
from fairseq_flash.models._presets import MASKED_LMS, register
from fairseq_flash.models._trained import RememberingModel
from fairseq_flash.models.flash_lm import normalized_probs
from fairseq_flash.modules import Pooling, build_norm

__all__ = ["PRESETS", "FlashMaskedLM", "FlashMaskedLMConfig", "MaskedLMHead"]

logger = logging.getLogger(__name__)


class MaskedLMHead(nn.Module):
    r"""Logits of the words, :math:`W_o\, \mathrm{norm}(\mathrm{gelu}(x W)) + b_o`.

    RoBERTa's; fairseq's own computes in float32 alone.

    Args:
        embed_dim: ``d``.
        words: Size of the dictionary.
        norm: ``"layernorm"``, ``"scalenorm"`` or ``"rmsnorm"``.
        init: ``"fan_in"`` or ``"paper"``, all weights N(0, 0.02).
        weight: Of the output, ``(words, d)``, to share with the embeddings; None for one of its own.
    """

    def __init__(
        self, embed_dim: int, words: int, norm: str, init: str, weight: Optional[nn.Parameter]
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        nn.init.normal_(self.dense.weight, std=0.02 if init == "paper" else embed_dim**-0.5)
        nn.init.zeros_(self.dense.bias)
        self.norm = build_norm(norm, embed_dim)
        if weight is None:
            weight = nn.Parameter(torch.empty(words, embed_dim).normal_(std=0.02))
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, features: torch.Tensor, masked_tokens: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Takes ``(b, n, d)``, gives ``(b, n, words)``, or ``(masked, words)`` of ``masked_tokens`` alone."""
        if masked_tokens is not None:
            features = features[masked_tokens]
        hidden = self.norm(nn.functional.gelu(self.dense(features)))
        return nn.functional.linear(hidden, self.weight, self.bias)


@register_model("flash_masked_lm", dataclass=FlashMaskedLMConfig)
class FlashMaskedLM(RememberingModel, FairseqEncoderModel):
    """FLASH as RoBERTa: learns to fill in masked words, then to classify rows of any length.

    Source: Hua et al. 2022, section 4 (masked language modeling); Liu et al. 2019 (RoBERTa) for the heads.
    """

    #: Of fairseq's, those that train it.
    allowed_criterions = ("masked_lm", "sentence_prediction", "sentence_ranking")
    #: Of fairseq's and ours, those that mask words, classify rows or rank them.
    allowed_tasks = frozenset(
        {"masked_lm", "flash_masked_lm", "multilingual_masked_lm", "sentence_prediction", "sentence_ranking"}
    )

    def __init__(self, cfg: FlashMaskedLMConfig, encoder: FlashEncoder) -> None:
        super().__init__(encoder)
        self.cfg = cfg
        embed_tokens = encoder.stack.embed_tokens
        weight = None if cfg.untie_weights_roberta else embed_tokens.weight
        words = embed_tokens.num_embeddings
        # Its weights are part of the encoder's, as in roberta.
        encoder.lm_head = MaskedLMHead(cfg.embed_dim, words, str(cfg.norm), str(cfg.init), weight)
        self.classification_heads = nn.ModuleDict()

    @classmethod
    def build_model(cls, cfg: FlashMaskedLMConfig, task: Any) -> "FlashMaskedLM":
        """Builds the model for a task with a ``source_dictionary``.

        Raises:
            ValueError: an option has a value that is not allowed, or would have no effect.
        """
        check_sizes(cfg)
        check_masked_lm(cfg)
        dictionary = task.source_dictionary
        embed_tokens = build_embedding(cfg, dictionary)
        model = cls(cfg, FlashEncoder(cfg, dictionary, embed_tokens, resolve_n_ref(cfg, task)))
        model.remember(cfg, FlashMaskedLMConfig, dictionary)
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
        group: Optional[distributed.ProcessGroup] = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Predicts what stands at every position or at the masked ones, or the class of each row.

        Args:
            src_tokens: ``(b, n)``; padding leads or trails, and is a word elsewhere.
            src_lengths: Ignored: the padding tells.
            features_only: Whether to stop before the vocabulary.
            return_all_hiddens: Not available: features are those of the last layer.
            classification_head_name: Of the head to apply to each row, pooled as ``--pooling`` says.
            masked_tokens: ``(b, n)``, True at the positions to predict; None for all.
            group: The processes that each hold a part of the rows, as
                :func:`~fairseq_flash.modules.part_of_rows` cuts them; None for whole rows.
            unused: What fairseq passes to every model, such as ``src_id``.

        Returns:
            Logits ``(b, n, vocabulary)`` or, in the order of ``masked_tokens``, ``(masked, vocabulary)``;
            features ``(b, n, d)``, zero at padding; or with a head, logits ``(b, classes)``. And a
            dictionary, for nothing yet.

        Raises:
            ValueError: no head has that name, a row is longer than a Toeplitz table, or rows are shared in a
                group by layers that cannot, or for a head.
        """
        if return_all_hiddens:
            raise ValueError("return_all_hiddens=True is not allowed; allowed: False, the last layer's alone")
        head = classification_head_name and self.classification_head(classification_head_name)
        if head is not None and group is not None:
            raise ValueError(
                f"group is given with classification_head_name={classification_head_name!r}; "
                "allowed is one of them"
            )
        features = self.encoder.features(src_tokens, group)
        if head is not None:
            return head(head.pooling(features, src_tokens.eq(self.encoder.padding_idx))), {}
        return (features if features_only else self.encoder.lm_head(features, masked_tokens)), {}

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
            ValueError: ``name`` has a dot, or ``num_classes`` or ``inner_dim`` is below 1, or not given.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name={name!r} is not allowed; allowed: a text without dots")
        inner_dim = self.cfg.embed_dim if inner_dim is None else inner_dim
        for argument, value in dict(num_classes=num_classes, inner_dim=inner_dim).items():
            if count_of(value) < 1:
                raise ValueError(f"{argument}={value} is not allowed; allowed: 1 or more")
        sizes = count_of(inner_dim), count_of(num_classes)
        head = RobertaClassificationHead(self.cfg.embed_dim, *sizes, "tanh", self.cfg.pooler_dropout)
        head.pooling = Pooling(str(self.cfg.pooling), self.cfg.embed_dim)
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
            model_name_or_path: Folder of the checkpoint, or a tar archive of it.
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
            FileNotFoundError: a folder or file does not exist.
        """
        registered = cls.hub_models()
        places, options = find_places(registered, model_name_or_path, checkpoint_file, data_name_or_path)
        kwargs = {**options, **kwargs, "bpe": bpe, "load_checkpoint_heads": True}
        if bpe == "sentencepiece" and "sentencepiece_model" not in kwargs:
            kwargs["sentencepiece_model"] = find_sentencepiece(places[0], places[2])
        loaded = hub_utils.from_pretrained(*places, **kwargs)
        cls.check_class(loaded["models"], places[1])
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
        self._check_dictionary(state_dict, name)
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

    def _check_dictionary(self, state_dict: dict[str, Any], name: str) -> None:
        prefix = f"{name}." if name else ""
        stored = state_dict.get(f"{prefix}encoder.stack.embed_tokens.weight")
        words = len(self.encoder.dictionary)
        if stored is not None and len(stored) != words:
            raise ValueError(
                f"the checkpoint's dictionary has {len(stored)} words, the data's {words}, "
                "with <mask>; allowed: data prepared with the dict.txt that the checkpoint was trained with"
            )

    def _check_head(self, name: str, classes: int, inner_dim: int) -> None:
        own = self.classification_heads[name].out_proj
        if (own.out_features, own.in_features) != (classes, inner_dim):
            raise ValueError(
                f"classification head {name!r} has {own.out_features} classes and inner dimension "
                f"{own.in_features}, the checkpoint's of that name {classes} and {inner_dim}; allowed: as "
                "many, or another --classification-head-name"
            )


PRESETS = register("flash_masked_lm", FlashMaskedLMConfig, MASKED_LMS)
