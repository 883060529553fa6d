"""fairseq's RoBERTa with a choice of what its classification heads see, to compare flash_masked_lm with."""

from typing import Any, Optional

import torch
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta.model import RobertaModel, base_architecture, roberta_prenorm_architecture

from fairseq_flash.modules import POOLINGS, Pooling

__all__ = ["PooledRoberta"]


@register_model("pooled_roberta")
class PooledRoberta(RobertaModel):
    """RoBERTa with ``--pooling``; its checkpoints and RoBERTa's are the same up to the heads."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """RoBERTa's options and one more."""
        RobertaModel.add_args(parser)
        parser.add_argument("--pooling", choices=POOLINGS, default="first", help="what heads see of a row")

    def register_classification_head(
        self, name: str, num_classes: Optional[int] = None, inner_dim: Optional[int] = None, **unused: Any
    ) -> None:
        """As RoBERTa's, with the pooling in front."""
        super().register_classification_head(name, num_classes, inner_dim, **unused)
        pooling = Pooling(getattr(self.args, "pooling", "first"), self.args.encoder_embed_dim)
        self.classification_heads[name].pooling = pooling

    def forward(
        self,
        src_tokens: torch.Tensor,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        classification_head_name: Optional[str] = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As RoBERTa's; a head is given one vector a row."""
        only = features_only or classification_head_name is not None
        features, extra = super().forward(src_tokens, only, return_all_hiddens, **kwargs)
        if classification_head_name is None:
            return features, extra
        head = self.classification_heads[classification_head_name]
        return head(head.pooling(features, src_tokens.eq(self.encoder.dictionary.pad()))), extra


register_model_architecture("pooled_roberta", "pooled_roberta")(base_architecture)
register_model_architecture("pooled_roberta", "pooled_roberta_prenorm")(roberta_prenorm_architecture)
