"""Proves that a decoder's layer is its two units, decodes as it trains, keeps its source in reordering."""

import pytest
import torch
from torch import nn

from fairseq_flash.modules import DecoderLayer, GatedAttentionUnit, GatedCrossAttention, Stack
from support import as_oracle, oracle
from support.pieces import error

TOLERANCE = 256 * torch.finfo(torch.float64).eps  # relative; measured: 3 eps
D, M, N = 8, 7, 13
KINDS = ["mixed_chunk", "quadratic", "local", "global", "mixed_chunk shifted", "local shifted"]


def build(kind="mixed_chunk"):
    attention, *shifted = kind.split()
    options = dict(shift_keys=True, linear_norm="fading") if shifted else {}
    own = GatedAttentionUnit(D, attention=attention, attention_dim=6, chunk_size=4, n_ref=N, **options)
    layer = DecoderLayer(own, GatedCrossAttention(D, attention_dim=6)).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def draw(b=3):
    mask = torch.zeros(b, M, dtype=torch.bool)
    mask[0, :2] = mask[1, 5:] = True
    return torch.randn(b, N, D), torch.randn(b, M, D), mask


@pytest.mark.parametrize("attention", KINDS)
def test_it_is_the_oracle_of_each_row_with_its_source(attention):
    layer, (x, source, source_mask) = build(attention), draw()
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, 9:] = mask[2, :5] = True
    own, cross = as_oracle.unit(layer.self_attention), as_oracle.cross_unit(layer.cross_attention)
    sources = (oracle.valid_rows(*row) for row in zip(source, source_mask, strict=True))
    expected = oracle.padded(lambda row: cross(own(row), next(sources)), mask, x)
    x = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    ours, state = layer(x, mask, source=source, source_padding_mask=source_mask)
    assert state is None
    assert error(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("order", [[1, 0, 0, 2], [2], [2, 1, 0]], ids=str)
@torch.no_grad()
def test_reordered_and_dropped_rows_go_on_with_their_own_source(attention, order):
    layer, (x, source, mask) = build(attention), draw()
    stack = Stack(nn.Identity(), [layer], embed_dim=D, attention_dim=6)
    state = stack.empty_state(x, source=source, source_padding_mask=mask)
    for token in range(6):
        _, own = layer(x[:, token : token + 1], None, state.layers[0])
        state = type(state)((own,))
    (own,) = state.reorder(torch.tensor(order)).layers
    rows = torch.cat((x[order, :6], torch.randn(len(order), N - 6, D)), dim=1)
    expected, _ = layer(rows, source=source[order], source_padding_mask=mask[order])
    for start, end in ((6, 7), (7, 11), (11, 13)):
        out, own = layer(rows[:, start:end], None, own)
        assert error(out, expected[:, start:end]) <= TOLERANCE


def test_source_and_state_exclude_each_other():
    layer, (x, source, _) = build(), draw()
    for given in ({}, dict(source=source, state=layer.empty_state(x, source))):
        with pytest.raises(ValueError, match="source and state: allowed is one of them"):
            layer(x, **given)
