"""Around an update a GPU waits for the host: what fairseq does there for each weight is done at once."""

from collections.abc import Callable
from typing import Any, Optional

import torch

from fairseq_flash._compat.healing import wrap

__all__ = ["prepare"]


def prepare() -> None:
    """Applies every healing of this file."""
    _copy_all_weights_at_once()
    _seed_what_is_there()


def _copy_all_weights_at_once() -> None:
    """Blanks and copies all gradients at once, then all weights; fairseq 0.12 goes through them singly.

    With ``--bf16`` and ``--fp16`` a GPU waits while the host starts three kernels for each weight. The
    numbers stay the same to the bit, of every model.
    """
    from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin

    def heal_gradients(sync: Callable) -> Callable:
        def healed(self: Any) -> None:
            # Asked for three times an update, and needed once.
            if not self._needs_sync:
                return
            found, wide = [p.grad for p in self.fp16_params if p.requires_grad], _copies(self, "grad")
            if wide is None or any(x is None or x.is_sparse for x in found):
                sync(self)
                return
            _copy(wide, found)
            self._needs_sync = False

        return healed

    def heal_weights(sync: Callable) -> Callable:
        def healed(self: Any) -> None:
            wide = _copies(self, "data")
            if wide is None:
                sync(self)
            else:
                _copy([p for p in self.fp16_params if p.requires_grad], wide)

        return healed

    def heal_blanking(blank: Callable) -> Callable:
        def healed(self: Any) -> None:
            wide = self.fp32_params
            if not self.has_flat_params:
                torch._foreach_zero_([p.grad for p in wide if p.grad is not None])
                # So that fairseq finds none of them left to blank.
                self.fp32_params = []
            try:
                blank(self)
            finally:
                self.fp32_params = wide

        return healed

    wrap(_FP16OptimizerMixin, "zero_grad", heal_blanking)
    wrap(_FP16OptimizerMixin, "_sync_fp16_grads_to_fp32", heal_gradients)
    wrap(_FP16OptimizerMixin, "_sync_fp32_params_to_fp16", heal_weights)


def _seed_what_is_there() -> None:
    """Seeds the CPU and the CUDA devices before each update, not every kind of device that torch knows.

    For each kind that is not there ``torch.manual_seed`` formats the stack of calls, while the GPU waits.
    """
    from fairseq import utils

    def heal(seed_all: Callable) -> Callable:
        def healed(self: Any, seed: int) -> None:
            if utils.xm is not None or torch.backends.mps.is_available():
                seed_all(self, seed)
                return
            self.rng_state = utils.get_rng_state()
            torch.default_generator.manual_seed(seed)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(seed)

        return healed

    wrap(utils.set_torch_seed, "__init__", heal)


def _copies(optimizer: Any, name: str) -> Optional[list[torch.Tensor]]:
    """Data or gradients in float32 of all weights that learn; None where there are not all in one place."""
    wide, narrow = optimizer.fp32_params, optimizer.fp16_params
    learns = [p.requires_grad for p in narrow]
    if not optimizer.has_flat_params:
        learning = [p for p, wanted in zip(wide, learns, strict=True) if wanted]
        found = learning if name == "data" else [p.grad for p in learning]
        return None if any(x is None for x in found) else found
    if not isinstance(wide, dict) or len(wide) != 1 or not all(learns):
        return None
    return list(getattr(next(iter(wide.values())), name).data.split([p.numel() for p in narrow]))


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    # Even a view that changes nothing takes the host as long as a kernel.
    same = [x if x.shape == y.shape else x.reshape(y.shape) for x, y in zip(sources, targets, strict=True)]
    torch._foreach_copy_(targets, same)
