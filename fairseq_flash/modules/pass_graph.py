"""A pass of training recorded as two CUDA graphs, which the host starts in place of each kernel."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from fairseq_flash.modules.graphs import Graphs

__all__ = ["PassGraphs", "aliased", "is_watched"]

#: Passes of a shape in a row before it is recorded: in these, kernels are compiled and tables made.
PATIENCE = 2
#: Shapes that are recorded; each keeps its inputs, its output and its gradients.
SHAPES = 4
#: Recordings in a training: a stack that changes again and again is faster without.
MOST = 12


class PassGraphs(Graphs):
    """The passes of a stack in training, recorded once for each shape of a batch and replayed.

    A replay computes what the pass itself would, with the weights of the moment and dropout of its own, and
    its gradients are copied out, so that they can be summed over several batches. Where a recorded pass
    still waits for its backward pass, the next one runs as it is, as do batches of other shapes. All
    recordings share their memory, which holds one pass and is given back where anything lacks it.
    """

    def __init__(self) -> None:
        self._recordings: dict[Any, _Recording] = {}
        self._last: Any = None
        self._in_a_row = self._made = 0
        self._pending: Optional[weakref.ref] = None
        self._shortages = 0
        self._failed = False

    def objections(self, stack: nn.Module, tokens: torch.Tensor) -> list[str]:
        """Why a pass cannot be recorded; nothing if it can."""
        found = self.objections_to(tokens)
        if not (stack.training and torch.is_grad_enabled()):
            found.append("the stack does not train, or gradients are disabled")
        if torch.is_autocast_enabled(tokens.device.type):
            found.append("autocast keeps copies of the weights that a recording would not renew")
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            found.append("gradients are sent to other processes while others are still computed")
        if self._failed:
            found.append("an earlier recording has failed, or its memory was needed")
        return found

    def __call__(
        self, stack: nn.Module, run: Callable[..., torch.Tensor], inputs: tuple[Optional[torch.Tensor], ...]
    ) -> torch.Tensor:
        """As ``run(*inputs)``, a pass through ``stack`` that may be recorded.

        Args:
            stack: Always the same.
            run: Turns the inputs into one tensor by the weights of ``stack``.
            inputs: On the device, the first not None; those that are floating point may have gradients.

        Returns:
            What ``run`` does.
        """
        key = tuple(None if x is None else (x.shape, x.dtype, x.device, x.requires_grad) for x in inputs)
        self._in_a_row = self._in_a_row + 1 if key == self._last else 1
        self._last = key
        if self._failed or (self._pending is not None and self._pending() is not None):
            return self._plain(run, inputs)
        if key not in self._recordings and not self._record(key, stack, run, inputs):
            return self._plain(run, inputs)
        recording, pending = self._recordings[key], _Pending()
        self._pending = weakref.ref(pending)
        out = _Play.apply(recording, pending, self, *inputs, *recording.weights)
        # Looked at while the device is at work.
        if recording.described == _describe(stack):
            return out
        self._recordings.clear()
        self._in_a_row = 1
        return self._plain(run, inputs)

    def give_back(self, device: torch.device) -> None:
        """Gives the recordings' memory back if memory has run out since, be it in loss or validation.

        fairseq goes on without such a batch, and would lose each of its shape.

        Args:
            device: Of the stack.
        """
        if self._recordings and _shortages(device) > self._shortages:
            self._give_up()

    def _plain(self, run: Callable, inputs: tuple) -> torch.Tensor:
        try:
            return run(*inputs)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        self._give_up()
        return run(*inputs)

    def _give_up(self, reason: str = "memory ran out") -> None:
        warnings.warn(f"from here on passes run without CUDA graphs: {reason}", stacklevel=2)
        self._failed = True
        self._recordings.clear()
        # Behind the error's end, whose traceback holds what a half-made recording did.
        gc.collect()
        torch.cuda.empty_cache()

    def _record(self, key: Any, stack: nn.Module, run: Callable, inputs: tuple) -> bool:
        """Whether there is a recording for ``key`` now."""
        if self._in_a_row <= PATIENCE or len(self._recordings) == SHAPES or self._made == MOST:
            return False
        described = _describe(stack)
        if described is None or not any(weight.requires_grad for weight in stack.parameters()):
            return False
        others, reason = list(self._recordings.values()), ""
        try:
            made = _Recording(stack, run, inputs, described, others[0] if others else None)
        except RuntimeError as error:
            # What runs well may not be recordable on another card, or need memory that it has not.
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason:
            self._give_up(f"recording one failed: {reason}")
            return False
        self._recordings[key] = made
        self._made += 1
        self._shortages = _shortages(inputs[0].device)
        return True

    def waits_for(self, pending: _Pending) -> bool:
        """Whether this pass was the last to be replayed, and has not been differentiated."""
        return self._pending is not None and self._pending() is pending

    def end(self) -> None:
        """Lets the next pass be replayed."""
        self._pending = None


def _shortages(device: torch.device) -> int:
    """How often memory has run out on a device."""
    return torch.cuda.memory_stats_as_nested_dict(device)["num_ooms"] if device.type == "cuda" else 0


class _Pending:
    """Alive as long as a pass waits for its backward pass."""


def is_watched(layer: nn.Module) -> bool:
    """Whether hooks, on a layer, its parts or everything, want to see each pass."""
    return _has_any_global_hook() or any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in layer.modules()
    )


def _describe(stack: nn.Module) -> Optional[list]:
    """What a recording relies on beside the values of weights; None where hooks want to see each pass."""
    if is_watched(stack):
        return None
    found: list = []
    for module in stack.modules():
        # Rates of dropout, and what an attention takes as numbers.
        found.append((module.training, getattr(module, "p", None), getattr(module, "attend", None)))
        for held in (module._parameters, module._buffers):
            found += [(id(x), x.data_ptr(), x.requires_grad) for x in held.values() if x is not None]
    return found


@contextlib.contextmanager
def aliased(stack: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Gives a stack other weights that lie in the same places; yields them by the stack's own.

    What autograd knows of a weight lives as long as anybody has a loss that it led to, and belongs to the
    stream of that pass: a recording, on a stream of its own, would have to wait for it, and fails.
    """
    aliases: dict = {}
    places = [(module._parameters, name) for module in stack.modules() for name in module._parameters]
    own = [held[name] for held, name in places]
    try:
        for (held, name), weight in zip(places, own, strict=True):
            if weight is not None:
                held[name] = aliases.setdefault(weight, nn.Parameter(weight.detach(), weight.requires_grad))
        yield aliases
    finally:
        for (held, name), weight in zip(places, own, strict=True):
            held[name] = weight


class _Recording:
    """Two graphs with their tensors, on a stream and in memory that they share with other recordings."""

    def __init__(
        self,
        stack: nn.Module,
        run: Callable,
        inputs: tuple,
        described: list,
        other: Optional[_Recording],
    ) -> None:
        _refuse_to_wait(run, inputs)
        device = inputs[0].device
        self.described = described
        self.inputs = [x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self.weights = [weight for weight in stack.parameters() if weight.requires_grad]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.pool: Any = torch.cuda.graph_pool_handle() if other is None else other.pool
        self.stream: Any = torch.cuda.Stream(device) if other is None else other.stream
        # Threads that load batches may ask for memory meanwhile.
        options: dict[str, Any] = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with _mended(device, self.pool), aliased(stack) as aliases:
            places = (*self.inputs, *(aliases[weight] for weight in self.weights))
            wanted = [x for x in places if x is not None and x.requires_grad]
            with torch.cuda.graph(self.forward, **options):
                out = run(*self.inputs)
            self.grad_out = torch.empty_like(out)
            with torch.cuda.graph(self.backward, **options):
                grads = iter(torch.autograd.grad(out, wanted, self.grad_out, allow_unused=True))
        self.out = out.detach()
        self.grads = [next(grads) if x is not None and x.requires_grad else None for x in places]
        # The memory that is read stays, where weights have moved, until that is seen.
        self.aliases = aliases


def _refuse_to_wait(run: Callable, inputs: tuple) -> None:
    """Fails where a pass waits for a number of the device, which would leave a recording half made.

    Raises:
        RuntimeError: it does.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may overlook something, which then fails in the recording
        torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _mended(device: torch.device, pool: Any) -> Iterator[None]:
    """Behind a recording that failed: the stream of before, and no part of PyTorch that still records."""
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    except BaseException:
        # Versions before the middle of 2026 leave these to the caller; later ones have no need of it.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        with contextlib.suppress(Exception):
            generator.graphsafe_set_state(generator.clone_state())
        raise


class _Play(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recording: _Recording,
        pending: _Pending,
        graphs: PassGraphs,
        *tensors: Optional[torch.Tensor],
    ) -> torch.Tensor:
        ctx.recording, ctx.pending, ctx.graphs = recording, pending, graphs
        for ours, given in zip(recording.inputs, tensors, strict=False):
            if ours is not None:
                ours.copy_(given)
        recording.forward.replay()
        return recording.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        if not ctx.graphs.waits_for(ctx.pending):
            raise RuntimeError(
                "a recorded pass is differentiated twice, or after another one; allowed: once, before the "
                "next pass, or without --compile"
            )
        recording = ctx.recording
        recording.grad_out.copy_(grad)
        recording.backward.replay()
        ctx.graphs.end()
        theirs = [x for x in recording.grads if x is not None]
        found = iter(copied := [torch.empty_like(x) for x in theirs])
        torch._foreach_copy_(copied, theirs)
        return None, None, None, *(x if x is None else next(found) for x in recording.grads)
