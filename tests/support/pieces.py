"""Padded rows, cut into pieces and swapped on the way: what a layer with a state must survive."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch
from hypothesis import strategies as st

from fairseq_flash.modules import DecodingState


class Pieces(NamedTuple):
    """Two rows (2, n, d), the second with padding on either side, where they are cut, and where they swap."""

    x: torch.Tensor
    padding_mask: torch.Tensor
    cuts: list[int]
    swaps: set[int]


def draw(data: st.DataObject, longest: int, width: int) -> Pieces:
    """Hypothesis chooses everything but the numbers."""
    n = data.draw(st.integers(1, longest))
    lead, trail = (data.draw(st.integers(0, n)) for _ in range(2))
    cuts = [*sorted(data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=5)) - {n}), n]
    mask = torch.zeros(2, n, dtype=torch.bool)
    mask[1, :lead] = True
    mask[1, max(lead, n - trail) :] = True
    return Pieces(torch.randn(2, n, width), mask, cuts, data.draw(st.sets(st.sampled_from(cuts))))


@torch.no_grad()
def run(layer: Any, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output on the pieces, with NaN in the padding, and each row's position behind them."""
    x, mask, cuts, swaps = pieces
    x = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    state, outs, order = layer.empty_state(x), [], torch.tensor([0, 1])
    for start, end in itertools.pairwise([0, *cuts]):
        out, state = layer(x[order, start:end], mask[order, start:end], state)
        outs.append(out[order])
        if end in swaps:
            order = order.flip(0)
            (state,) = DecodingState((state,)).reorder(torch.tensor([1, 0])).layers
    return torch.cat(outs, dim=1), state.position[order]


def with_gradients(
    layer: Any, x: torch.Tensor, padding_mask: Optional[torch.Tensor], cuts: Iterable[int]
) -> torch.Tensor:
    """The layer's output on rows ``x`` (b, n, d) between ``cuts``, 0 and n among them, with its graph."""
    state, outs = layer.empty_state(x), []
    for start, end in itertools.pairwise(cuts):
        mask = None if padding_mask is None else padding_mask[:, start:end]
        out, state = layer(x[:, start:end], mask, state)
        outs.append(out)
    return torch.cat(outs, dim=1)


def error(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference, relative to the largest value."""
    return (ours - expected).abs().max() / expected.abs().max()


def assert_past_ignores_future(layer: Any, x: torch.Tensor) -> None:
    """Bit for bit, wherever ``x`` (b, n, d) is cut."""
    whole, _ = layer(x)
    for cut in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, cut:] = 1e3 * torch.randn_like(x[:, cut:])
        assert torch.equal(layer(changed)[0][:, :cut], whole[:, :cut])


def assert_prefixes_agree(layer: Any, x: torch.Tensor, tolerance: float) -> None:
    """Every prefix of ``x`` (b, n, d) on its own gives what it gives in the whole row."""
    whole, _ = layer(x)
    for m in range(1, x.shape[1]):
        assert error(layer(x[:, :m])[0], whole[:, :m]) <= tolerance
