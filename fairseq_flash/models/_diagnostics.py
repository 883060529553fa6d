"""Numbers about the layers during training, through fairseq's metrics: to TensorBoard and to its log."""

from collections.abc import Iterable, Iterator
from typing import Any, Optional

import torch
from fairseq.logging import metrics
from torch import nn

from fairseq_flash.modules import GatedAttentionUnit, Rows, TransformerBlock

__all__ = ["Diagnostics", "watch_layers"]

#: Parts of a layer whose input or output is looked at, as far as it has them.
PARTS = ("uvz", "out", "ffn_norm", "ffn_in", "ffn_out")
#: Queries whose scores are computed at a time: bounds the memory whatever the length.
PIECE = 256
PRIORITY = 3000  # places the numbers behind fairseq's own in a line of the log


def watch_layers(model: nn.Module, layers: Iterable[nn.Module], interval: int) -> None:
    """Lets a model report on its layers while it trains.

    Args:
        model: Called by fairseq's criterion; gets an attribute ``diagnostics``.
        layers: Its layers, reported as ``layer0`` and so on.
        interval: Updates between two reports; 0 for none, which leaves the model as it is.

    Raises:
        ValueError: ``interval`` is negative.
    """
    if interval < 0:
        raise ValueError(f"--diagnostics-interval {interval} is not allowed; allowed: 0 (off) or more")
    if interval > 0:
        names = {f"layer{index}": layer for index, layer in enumerate(layers)}
        model.diagnostics = Diagnostics(names, interval)
        model.register_forward_pre_hook(model.diagnostics.begin)
        model.register_forward_hook(model.diagnostics.end, always_call=True)


class Diagnostics(nn.Module):
    """Measures the layers in the first forward pass of every ``interval``-th update.

    Hooks are on the layers during that pass alone. They draw no random numbers and leave every tensor as it
    is, so that training is the same to the last bit. With several processes, fairseq logs what the first one
    measured on its own rows. Reported are, each followed by ``/`` and the layer's name:

    * ``branch``: size of what the layer's attention adds, over the size of its input (root mean squares);
      ``ffn_branch``: likewise of a Transformer's feed-forward network;
    * ``gate_mean``, ``gate_std`` and ``gate_negative`` (a share) of ``u``, or of a Transformer's GLU gate;
    * ``sparsity``: share of exact zeros in squared-ReLU attention, among the pairs of query and key that
      see each other within the rows of this pass.

    What a layer does not have is left out; padding does not count.

    Args:
        layers: By name.
        interval: Updates between two reports, at least 1.
    """

    def __init__(self, layers: dict[str, nn.Module], interval: int) -> None:
        super().__init__()
        self.interval, self.update, self.reported = interval, None, None
        self._layers = layers
        self._handles: list = []
        self._found: dict[str, torch.Tensor] = {}

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before each training step."""
        self.update = num_updates

    def begin(self, model: nn.Module, args: Any) -> None:
        """Installs the hooks if a report is due."""
        _forget_unmeasured()
        due = self.update is not None and self.update % self.interval == 0 and self.update != self.reported
        if not (due and model.training and torch.is_grad_enabled()):
            return
        self.reported = self.update
        for name, layer in self._layers.items():
            self._watch(name, layer)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Removes the hooks, also after an error, and reports."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        found, self._handles, self._found = self._found, [], {}
        numbers = torch.stack(list(found.values())).tolist() if found else []
        for key, number in zip(found, numbers, strict=True):
            metrics.log_scalar(key, number, priority=PRIORITY)

    def _watch(self, name: str, layer: nn.Module) -> None:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep_what_passes(part: str):
            """A hook that keeps the input and the output of a part."""
            return lambda module, args, output: seen.update({part: (args[0], output)})

        def measure_when_it_ends(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            """The hook of the layer itself: its parts have been through by then."""
            with torch.no_grad():
                for kind, number in measure_layer(layer, args[0], kwargs, seen):
                    self._found[f"{kind}/{name}"] = number.float()

        parts = [part for part in PARTS if hasattr(layer, part)]
        self._handles += [
            getattr(layer, part).register_forward_hook(keep_what_passes(part)) for part in parts
        ]
        self._handles.append(layer.register_forward_hook(measure_when_it_ends, with_kwargs=True))


def _forget_unmeasured() -> None:
    """Takes away own numbers that fairseq has reset: it would log None until the next report."""
    for meters in metrics.get_active_aggregators():
        kept = [
            entry for entry in meters.priorities if entry[0] != PRIORITY or meters[entry[2]].val is not None
        ]
        for _, _, key in set(meters.priorities) - set(kept):
            del meters[key]
        meters.priorities[:] = kept


def measure_layer(
    layer: nn.Module, x: torch.Tensor, given: dict, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is reported of one layer.

    Args:
        layer: A layer of a stack.
        x: Its input, ``(b, n, d)``.
        given: What it was called with beside: ``rows``, their geometry, and ``state``, if they go on.
        seen: Input and output of its ``PARTS``.

    Yields:
        The kind of each number, and the number.
    """
    rows, before = given["rows"], getattr(given.get("state"), "before", None)
    real = None if rows.padding_mask is None else ~rows.padding_mask
    if "out" in seen:
        yield "branch", size(seen["out"][1], real) / size(x, real)
    if "ffn_out" in seen:
        yield "ffn_branch", size(seen["ffn_out"][1], real) / size(seen["ffn_norm"][0], real)
    gate = gate_of(layer, seen)
    if gate is not None:
        gate = chosen(gate, real)
        yield from (("gate_mean", gate.mean()), ("gate_std", gate.std()))
        yield "gate_negative", (gate < 0).to(gate.dtype).mean()
    if isinstance(layer, GatedAttentionUnit) and "quad" in layer.branches:
        z = nn.functional.silu(seen["uvz"][1][..., 2 * layer.expanded_dim :])
        # Rows of several processes: reported is of the first one alone, which has their start.
        before = None if before is None else nn.functional.silu(before)
        yield "sparsity", sparsity(layer, layer.copies(z, rows, before)[:2], rows)


def gate_of(layer: nn.Module, seen: dict) -> Optional[torch.Tensor]:
    """The gate of a layer, (b, n, e), if it has one."""
    if isinstance(layer, GatedAttentionUnit):
        return nn.functional.silu(seen["uvz"][1][..., : layer.expanded_dim])
    if isinstance(layer, TransformerBlock) and layer.glu:
        return nn.functional.silu(seen["ffn_in"][1].chunk(2, dim=-1)[0])
    return None


def chosen(x: torch.Tensor, real: Optional[torch.Tensor]) -> torch.Tensor:
    """The vectors of real tokens, in float32 or wider."""
    x = x if real is None else x[real]
    return x.to(torch.promote_types(x.dtype, torch.float32))


def size(x: torch.Tensor, real: Optional[torch.Tensor]) -> torch.Tensor:
    """Root mean square over real tokens."""
    return chosen(x, real).square().mean().sqrt()


def sparsity(layer: GatedAttentionUnit, copies: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Share of exact zeros among the squared-ReLU scores of the quadratic branch that are not masked."""
    q, k = copies
    b, n, _ = q.shape
    whole = layer.attention == "quadratic"
    reach = n if whole else layer.chunk_size - 1
    positions = rows.positions.expand(b, n)
    real = torch.ones(b, n, dtype=torch.bool, device=q.device)
    if rows.padding_mask is not None:
        real = ~rows.padding_mask
    zeros = pairs = torch.zeros((), device=q.device)
    for begin in range(0, n, PIECE):
        i = slice(begin, begin + PIECE)
        j = slice(max(0, begin - reach), begin + PIECE + (0 if layer.causal else reach))
        at, to = positions[:, i], positions[:, j]
        visible = real[:, i, None] & real[:, None, j]
        if layer.causal:
            visible &= at.unsqueeze(2) >= to.unsqueeze(1)
        if not whole:
            visible &= (at // layer.chunk_size).unsqueeze(2) == (to // layer.chunk_size).unsqueeze(1)
        scores = layer.scores(q[:, i], k[:, j], (at, to), rows)
        zeros = zeros + (visible & (scores.relu().square() == 0)).sum()
        pairs = pairs + visible.sum()
    return zeros / pairs
