"""Losses that fairseq logs wrongly."""

from collections.abc import Callable
from typing import Any

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]


def prepare() -> None:
    """Applies every healing of this file."""
    _log_the_loss_of_one_pass()


def _log_the_loss_of_one_pass() -> None:
    """Logs of R-Drop the losses of one pass, and evaluates each row once.

    With ``--rdrop-alpha`` fairseq 0.12 reads each row twice, adds both losses and divides by the tokens of
    one: loss and nll_loss are twice those of a token, the perplexity is its square, in validation too, where
    no dropout makes the passes differ. What is trained stays the sum, as the paper has it (Liang et al. 2021,
    R-Drop, section 2.2); what is logged is half of it: nll_loss is that of a token, as of other criterions,
    and so is the perplexity; the loss of training holds half of alpha times the divergence as well. Of one
    pass the divergence is zero and not logged.
    """
    from fairseq.criterions.label_smoothed_cross_entropy_with_rdrop import (
        RdropLabelSmoothedCrossEntropyCriterion,
    )

    def heal(forward: Callable) -> Callable:
        def healed(self, model: Any, sample: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict]:
            alpha = self.rdrop_alpha
            self.rdrop_alpha = alpha if model.training else 0.0
            try:
                loss, size, log = forward(self, model, sample, *args, **kwargs)
                if self.rdrop_alpha > 0:
                    log.update(loss=log["loss"] / 2, nll_loss=log["nll_loss"] / 2)
            finally:
                self.rdrop_alpha = alpha
            return loss, size, log

        return healed

    wrap(RdropLabelSmoothedCrossEntropyCriterion, "forward", heal)
