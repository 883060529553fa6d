"""The loss over the vocabulary without its largest tensors, under fairseq's own ``cross_entropy``.

fairseq asks a model for logits, then for their log-probabilities, and takes the loss of these: ``(b, n, V)``
is written three times, twice in float32. What is returned here stands for that tensor and is computed only
when somebody looks at it; where its loss is all that is asked for, the product with the vocabulary and the
loss are one piece of compiled code, or go through the rows in pieces.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.nn import functional

__all__ = ["LOSSES", "LazyLogits", "loss_objections", "resolve_loss"]

#: How the loss is computed: as fairseq does, as compiled code, or in pieces that are never there together.
LOSSES = ("plain", "compiled", "chunked")

# Of a tensor that stands for another, these can be told without computing it.
_KNOWN = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.shape.__get__}
_KNOWN |= {torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.__len__}


class LazyLogits(torch.Tensor):
    """Logits ``features @ weight.T``, or their log-probabilities, that nobody has needed yet.

    Every operation on it computes it first, but for a ``view`` that keeps the last axis and for
    ``nll_loss``, which computes the loss from the features.

    Args:
        features: ``(..., d)``.
        weight: ``(V, d)``.
        loss: ``"compiled"`` or ``"chunked"``.
        log_probs: Whether it stands for the log-probabilities, in float32 or wider.
    """

    @staticmethod
    def __new__(
        cls, features: torch.Tensor, weight: torch.Tensor, loss: str, log_probs: bool = False
    ) -> "LazyLogits":
        dtype = torch.promote_types(features.dtype, torch.float32) if log_probs else features.dtype
        shape = (*features.shape[:-1], weight.shape[0])
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=features.device)
        lazy.features, lazy.weight, lazy.loss, lazy.log_probs = features, weight, loss, log_probs
        lazy.version = weight._version
        return lazy

    def normalized(self) -> "LazyLogits":
        """Their log-probabilities, as lazy."""
        return LazyLogits(self.features, self.weight, self.loss, log_probs=True)

    def check(self) -> None:
        """Refuses to be computed with other weights than those that it was made with.

        Raises:
            RuntimeError: the weights have changed in between.
        """
        if self.weight._version != self.version:
            raise RuntimeError(
                "the weights of the output have changed since these logits were made; allowed: to use them "
                "before, or --vocabulary-loss plain"
            )

    def computed(self) -> torch.Tensor:
        """The tensor that this one stands for."""
        self.check()
        logits = functional.linear(self.features, self.weight)
        return torch.log_softmax(logits, dim=-1, dtype=self.dtype) if self.log_probs else logits

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None
    ) -> Any:
        """Computes what is needed for ``function``, and no more."""
        kwargs, first = kwargs or {}, args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if function in _KNOWN:
                return function(*args, **kwargs)
            if isinstance(first, LazyLogits):
                if function is torch.Tensor.view and args[1:] in {(-1, first.shape[-1]), first.shape}:
                    flat = first.features.flatten(0, -2) if len(args) == 3 else first.features
                    return LazyLogits(flat, first.weight, first.loss, first.log_probs)
                if function is functional.nll_loss and first.log_probs:
                    # What has no effect is passed on by PyTorch as None.
                    asked = {name: value for name, value in kwargs.items() if value is not None}
                    if _reduces(args, asked):
                        return _loss(first, *args[1:], **asked)
            args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.computed, (args, kwargs))
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None
    ) -> Any:
        """As :meth:`__torch_function__`, for what comes from below Python's functions."""
        args, kwargs = torch.utils._pytree.tree_map_only(
            LazyLogits, LazyLogits.computed, (args, kwargs or {})
        )
        return function(*args, **kwargs)


def _reduces(args: tuple, kwargs: dict) -> bool:
    """Whether the call is fairseq's: a sum, without weights of classes."""
    known = kwargs.keys() <= {"reduction", "ignore_index"}
    return len(args) == 2 and known and kwargs.get("reduction") == "sum"


def _loss(
    lazy: LazyLogits, target: torch.Tensor, ignore_index: int = -100, reduction: str = "sum"
) -> torch.Tensor:
    lazy.check()
    if lazy.loss == "compiled":
        torch._dynamo.maybe_mark_dynamic(lazy.features, 0)
        torch._dynamo.maybe_mark_dynamic(target, 0)
        return _compiled()(lazy.features, lazy.weight, target, ignore_index)
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        rest = dict(reduction="sum", ignore_index=ignore_index, options=options)
        return functional.linear_cross_entropy(lazy.features, lazy.weight, target, **rest)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rest = dict(reduction="sum", ignore_index=ignore_index)
    return liger_fused_linear_cross_entropy(lazy.features, lazy.weight, target, **rest)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_whole_loss, fullgraph=True)


def _whole_loss(
    features: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    wide = torch.promote_types(features.dtype, torch.float32)
    log_probs = torch.log_softmax(functional.linear(features, weight), dim=-1, dtype=wide)
    return functional.nll_loss(log_probs, target, ignore_index=ignore_index, reduction="sum")


def resolve_loss(cfg: Any, compile_objections: Callable[[], list[str]]) -> str:
    """The loss that the options of a flash_lm ask for.

    Args:
        cfg: The options.
        compile_objections: Tells why nothing can be compiled on this machine.

    Returns:
        One of ``LOSSES``.

    Raises:
        ValueError: it has no effect with these options, or cannot run here.
    """
    if cfg.vocabulary_loss is None:
        return "compiled" if cfg.compile else "plain"
    loss = str(cfg.vocabulary_loss)
    if loss != "plain" and cfg.adaptive_softmax_cutoff is not None:
        raise ValueError(
            f"--vocabulary-loss {loss} has no effect with --adaptive-softmax-cutoff; allowed: plain"
        )
    objections = loss_objections(loss, compile_objections)
    if objections:
        raise ValueError(f"--vocabulary-loss {loss} cannot run: {'; '.join(objections)}; allowed: plain")
    return loss


def loss_objections(loss: str, compile_objections: Callable[[], list[str]]) -> list[str]:
    """Why one of ``LOSSES`` cannot run on this machine; nothing if it can."""
    if loss != "chunked":
        return compile_objections() if loss == "compiled" else []
    if hasattr(functional, "linear_cross_entropy"):
        return []
    found = [f"torch {torch.__version__} has no linear_cross_entropy, which 2.13 has"]
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return [*found, "there is no GPU with the package liger-kernel"]
    return []
