"""AdamW by PyTorch's fused kernel, for every model of fairseq: ``--optimizer fused_adam``.

fairseq's own ``adam`` goes through the parameters one by one, ten operations each, unless apex is installed;
on a GPU the host then takes longer for an update's end than the device for half a forward pass.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from fairseq_flash._compat.values import betas_of

__all__ = ["FusedAdam", "FusedAdamConfig"]


@dataclass
class FusedAdamConfig(FairseqDataclass):
    """Options of ``--optimizer fused_adam``: those of ``adam``."""

    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "betas for Adam optimizer"})
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon for Adam optimizer"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    lr: list[float] = II("optimization.lr")


@register_optimizer("fused_adam", dataclass=FusedAdamConfig)
class FusedAdam(FairseqOptimizer):
    """``torch.optim.AdamW`` in one kernel; weights in float32, or a copy of them as with ``--bf16``.

    It differs from fairseq's ``adam`` in one place: ``--adam-eps`` is added after the second moment is freed
    of its bias, as the paper has it, and not before.

    Args:
        cfg: The options.
        params: Parameters, or groups of them.

    Raises:
        ValueError: the betas are not two numbers from 0 to below 1.

    Source: Loshchilov and Hutter 2019.
    """

    def __init__(self, cfg: FusedAdamConfig, params: Iterable) -> None:
        super().__init__(cfg)
        self._optimizer = torch.optim.AdamW(params, fused=True, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What the command line says in place of a checkpoint."""
        cfg = self.cfg
        rates = cfg.lr if isinstance(cfg.lr, Iterable) else [cfg.lr]
        betas = betas_of(cfg.adam_betas)
        if betas is None:
            raise ValueError(
                f"--adam-betas {cfg.adam_betas}; "
                "allowed: two numbers from 0 to below 1, such as '(0.9, 0.98)'"
            )
        return {
            "lr": next(iter(rates)),
            "betas": betas,
            "eps": cfg.adam_eps,
            "weight_decay": cfg.weight_decay,
        }

    @property
    def supports_flat_params(self) -> bool:
        """Every number is updated by itself."""
        return True

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Optional[Callable] = None) -> torch.Tensor:
        """As fairseq's, without a loop over the parameters."""
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1))
        return norm
