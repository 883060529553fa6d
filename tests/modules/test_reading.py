"""Proves that a prompt is read as fast implementations of whole rows read it, and leaves the same state."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairseq_flash.generation.reader import Reader
from fairseq_flash.modules import GatedAttentionUnit, Stack, attention

KINDS = [
    ("mixed_chunk", {}),
    ("mixed_chunk", dict(shift_keys=True, linear_norm="fading")),
    ("local", dict(shift_keys=True)),
    ("global", dict(linear_norm="fading")),
]


@pytest.fixture(params=KINDS, ids=["flash", "flash2", "local", "global"])
def stack(request):
    torch.manual_seed(1)
    kind, options = request.param
    units = [
        GatedAttentionUnit(12, attention=kind, attention_dim=8, chunk_size=4, **options) for _ in range(2)
    ]
    made = Stack(nn.Embedding(20, 12), units, embed_dim=12, attention_dim=8).double().eval()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.3)
    return made


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 3, 4, 8, 12, 29])
@pytest.mark.parametrize("n", [1, 3, 4, 8, 21, 29])
def test_features_and_state_are_those_of_one_pass(stack, n, piece):
    tokens, found = torch.randint(0, 20, (2, n)), []
    state = stack.read(tokens, piece=piece, use=found.append)
    features, wanted = stack(tokens, None, stack.empty_state(tokens))
    torch.testing.assert_close(torch.cat(found, dim=1), features, rtol=0, atol=1e-12)
    torch.testing.assert_close(features, stack(tokens)[0], rtol=0, atol=1e-12)
    for layer, expected in zip(state.layers, wanted.layers, strict=True):
        for name, x in expected._asdict().items():
            torch.testing.assert_close(getattr(layer, name), x, rtol=0, atol=1e-12, msg=name)
    later = torch.randint(0, 20, (2, 1))
    torch.testing.assert_close(
        stack(later, None, state)[0], stack(later, None, wanted)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("piece", "fast"), [(8, [True] * 3), (6, [True, False, True, False])])
def test_pieces_of_whole_chunks_go_through_the_fast_op(stack, monkeypatch, piece, fast):
    found, original = [], attention.gated_mixed_chunk_piece
    monkeypatch.setattr(
        attention, "gated_mixed_chunk_piece", lambda *args, **kw: found.append(1) or original(*args, **kw)
    )
    stack.read(torch.randint(0, 20, (1, 22)), piece=piece)
    assert len(found) == 2 * sum(fast)
    found.clear()
    tokens = torch.randint(0, 20, (1, 8))
    stack.read(tokens, stack.empty_state(tokens))
    assert not found  # where a state of the caller's stands, only the device knows


def test_the_first_read_of_a_reader_is_fast_and_only_it(stack, monkeypatch):
    found, original = [], attention.gated_mixed_chunk_piece
    monkeypatch.setattr(
        attention, "gated_mixed_chunk_piece", lambda *args, **kw: found.append(1) or original(*args, **kw)
    )
    decoder = SimpleNamespace(stack=stack, output_layer=lambda features: features)
    model = SimpleNamespace(
        decoder=decoder,
        parameters=stack.parameters,
        get_normalized_probs=lambda output, log_probs, sample: output[0],
    )
    reader, tokens = Reader(model, 2), torch.randint(0, 20, (1, 14)).tolist()[0]
    reader.read(tokens[:9])
    assert len(found) == 2
    reader.read(tokens[9:])
    assert len(found) == 2
    row = torch.tensor([[2, *tokens]])
    torch.testing.assert_close(reader.predict(), stack(row)[0][:, -1], rtol=0, atol=1e-12)
