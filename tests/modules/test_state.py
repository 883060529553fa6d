"""Proves that a state is saved and read in pieces without loss, and refused where it does not belong."""

import pytest
import torch
from torch import nn

from fairseq_flash.modules import (
    DecoderLayer,
    DecodingState,
    GatedAttentionUnit,
    GatedCrossAttention,
    Stack,
    TransformerBlock,
)

TOLERANCE = 1024 * torch.finfo(torch.float64).eps  # absolute; measured: 5 eps
D, N, WORDS = 8, 21, 11
UNITS = ["mixed_chunk", "quadratic", "local", "global"]
SHIFTED = [f"shifted {attention}" for attention in UNITS if attention != "quadratic"]
KINDS = [*UNITS, *(f"transformer {attention}" for attention in UNITS), *SHIFTED, "decoder", "shifted decoder"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, layers=2):
    *block, attention = kind.split()
    shift = dict(shift_keys=True, linear_norm="fading") if "shifted" in block else {}
    if attention == "decoder":
        unit = [GatedAttentionUnit(D, attention_dim=4, chunk_size=4, **shift) for _ in range(layers)]
        blocks = [DecoderLayer(own, GatedCrossAttention(D, attention_dim=4)) for own in unit]
    elif "transformer" in block:
        sizes = dict(attention=attention, attention_dim=4, chunk_size=4, linear_norm="fading")
        blocks = [TransformerBlock(D, **sizes) for _ in range(layers)]
    else:
        sizes = dict(attention=attention, attention_dim=4, chunk_size=4, n_ref=N)
        blocks = [GatedAttentionUnit(D, **sizes, **shift) for _ in range(layers)]
    return Stack(nn.Embedding(WORDS, D), blocks, embed_dim=D, attention_dim=4).eval()


def fields(layer):
    """Name and tensor of what a layer has."""
    return [(name, x) for name, x in layer._asdict().items() if x is not None]


def start(stack, tokens):
    decoder = isinstance(stack.blocks[0], DecoderLayer)
    return stack.empty_state(tokens, **(dict(source=torch.randn(len(tokens), 5, D)) if decoder else {}))


@every_kind
@pytest.mark.parametrize("piece", [1, 5, 40])
def test_reading_in_pieces_of_any_size_is_reading_at_once(kind, piece):
    stack, tokens = build(kind), torch.randint(WORDS, (2, N))
    begin, seen = start(stack, tokens), []
    state = stack.read(tokens[:, :-1], begin.reorder(torch.arange(2)), piece=piece, use=seen.append)
    whole, _ = stack(tokens, None, begin)
    assert (torch.cat(seen, dim=1) - whole[:, :-1]).abs().max() <= TOLERANCE
    assert (stack(tokens[:, -1:], None, state)[0] - whole[:, -1:]).abs().max() <= TOLERANCE
    assert not any(features.requires_grad for features in seen)


def test_reading_nothing_is_an_empty_state_and_a_piece_has_a_size():
    stack = build("mixed_chunk")
    assert stack.read(torch.zeros(3, 0, dtype=torch.long)).position.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="piece=0 is not allowed; allowed: 1 or more"):
        stack.read(torch.zeros(3, 1, dtype=torch.long), piece=0)


@every_kind
@torch.no_grad()
def test_a_saved_state_goes_on_to_the_last_bit(kind, tmp_path):
    stack, tokens = build(kind), torch.randint(WORDS, (2, N))
    state = stack.read(tokens[:, :-1], start(stack, tokens))
    state.save(tmp_path / "state.pt", model="abc", pending=7)
    loaded, beside = DecodingState.load(tmp_path / "state.pt", start(stack, tokens))
    assert beside == {"model": "abc", "pending": 7}
    last = tokens[:, -1:]
    assert torch.equal(stack(last, None, loaded)[0], stack(last, None, state)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_file_that_is_no_state_is_refused(tmp_path):
    stack, tokens = build("mixed_chunk"), torch.randint(WORDS, (2, N))
    empty, path = stack.empty_state(tokens), tmp_path / "state.pt"
    with pytest.raises(ValueError, match="does not exist"):
        DecodingState.load(path, empty)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as a decoding state"):
        DecodingState.load(path, empty)
    torch.save({"format": "another", "layers": []}, path)
    with pytest.raises(ValueError, match="holds something else; allowed: 'fairseq_flash decoding state 2'"):
        DecodingState.load(path, empty)
    build("mixed_chunk", layers=3).empty_state(tokens).save(path)
    with pytest.raises(ValueError, match="holds 3 layers; allowed: 2"):
        DecodingState.load(path, empty)
    build("local").empty_state(tokens).save(path)
    with pytest.raises(ValueError, match=r"layer 0 has .*; allowed: "):
        DecodingState.load(path, empty)
    wider = GatedAttentionUnit(2 * D, attention_dim=4, chunk_size=4)
    Stack(nn.Embedding(WORDS, 2 * D), [wider] * 2, embed_dim=2 * D, attention_dim=4).empty_state(tokens).save(
        path
    )
    with pytest.raises(ValueError, match="does not fit this stack: state, layer 0: kv_sum has shape"):
        DecodingState.load(path, empty)


def test_a_file_of_the_format_before_is_read(tmp_path):
    stack, tokens = build("mixed_chunk"), torch.randint(WORDS, (1, N))
    state, path = stack.read(tokens), tmp_path / "state.pt"
    layers, beside = [dict(fields(layer)) for layer in state.layers], {"model": "abc", "pending": 3}
    torch.save({"format": "fairseq_flash decoding state 1", "layers": layers, **beside}, path)
    loaded, found = DecodingState.load(path, stack.empty_state(tokens))
    assert found == beside
    pairs = zip(*(fields(reading.layers[1]) for reading in (loaded, state)), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@torch.no_grad()
def test_a_file_of_before_shifted_keys_is_for_layers_without(tmp_path):
    """What version 0.1 wrote has no field for the token before."""
    plain, shifted = build("mixed_chunk"), build("shifted mixed_chunk")
    tokens, path = torch.randint(WORDS, (2, N)), tmp_path / "state.pt"
    plain.read(tokens).save(path)
    assert "before" not in torch.load(path)["layers"][0]
    DecodingState.load(path, plain.empty_state(tokens))
    with pytest.raises(ValueError, match=r"layer 0 has kv_sum, .*position; allowed: .*position, before$"):
        DecodingState.load(path, shifted.empty_state(tokens))
    shifted.read(tokens).save(path)
    with pytest.raises(ValueError, match=r"layer 0 has kv_sum, .*position, before; allowed: .*position$"):
        DecodingState.load(path, plain.empty_state(tokens))


def spoilt(change):
    """A state whose second layer is changed."""
    stack, tokens = build("mixed_chunk"), torch.randint(WORDS, (2, 3))
    first, second = stack.empty_state(tokens).layers
    return stack, tokens, DecodingState((first, change(second)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x._replace(v=x.v[:, 1:]), r"layer 1: v has shape \(2, 3, 16\); allowed: \(2, 4, 16\)"),
        (lambda x: x._replace(v=x.v[:1]), r"layer 1: v has shape \(1, 4, 16\); allowed: \(2, 4, 16\)"),
        (lambda x: x._replace(v=x.v.half()), "layer 1: v has dtype torch.float16; allowed: torch.float64"),
        (lambda x: x._replace(v=x.v.to("meta")), "layer 1: v has device meta; allowed: cpu"),
        (
            lambda x: x._replace(k_lin=None),
            "layer 1 has kv_sum, k_quad, v, position; allowed: kv_sum",
        ),
        (lambda x: x._replace(position=x.position - 1), "state has a negative position; allowed: 0 or more"),
        (lambda x: build("quadratic").empty_state(x.v).layers[0], "is a KeyValueCache; allowed: ChunkState"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(change, message):
    stack, tokens, state = spoilt(change)
    with pytest.raises(ValueError, match=message):
        stack(tokens, None, state)


def test_the_state_of_another_number_of_layers_or_rows_is_refused():
    stack, tokens = build("mixed_chunk"), torch.randint(WORDS, (2, 3))
    with pytest.raises(ValueError, match="state has 3 layers; allowed: 2"):
        stack(tokens, None, build("mixed_chunk", layers=3).empty_state(tokens))
    with pytest.raises(ValueError, match=r"has shape \(2, .*; allowed: \(1, "):
        stack(tokens[:1], None, stack.empty_state(tokens))


def spoilt_file(path, kind, change, layer=1):
    """A file of a state after some tokens, in which one layer is changed."""
    stack, tokens = build(kind), torch.randint(WORDS, (2, N))
    stack.read(tokens, start(stack, tokens)).save(path)
    content = torch.load(path, weights_only=True)
    changed = change(content["layers"][layer])
    content["layers"][layer] = content["layers"][layer] if changed is None else changed
    torch.save(content, path)
    return start(stack, tokens)


def put(**fields):
    return lambda layer: layer.update(fields)


def at(name, value):
    """Sets the first number of a tensor."""
    return lambda layer: layer[name].view(-1)[:1].fill_(value) and None


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("shifted mixed_chunk", at("before", torch.nan), "layer 1: before holds NaN or infinity"),
        ("shifted mixed_chunk", put(before=3), "layer 1: before is a int; allowed: Tensor"),
        ("mixed_chunk", at("v", torch.nan), "layer 1: v holds NaN or infinity; allowed: finite numbers"),
        ("mixed_chunk", at("kv_sum", torch.inf), "layer 1: kv_sum holds NaN or infinity"),
        ("quadratic", at("k", torch.nan), "layer 1: k holds NaN or infinity"),
        ("decoder", at("source.v", torch.nan), "layer 1: source.v holds NaN or infinity"),
        ("mixed_chunk", at("position", -1), r"negative position; allowed: 0 or more"),
        ("mixed_chunk", at("position", 10**12), r"position \[10{12}, 21\]; allowed: 0 to 8589934591"),
        ("mixed_chunk", at("position", 2**62), r"allowed: 0 to 8589934591"),
        (
            "mixed_chunk",
            at("position", 20),
            r"layer 1: position \[20, 21\]; allowed: \[21, 21\], as in layer 0",
        ),
        ("quadratic", put(columns=10**12), f"layer 1: columns {10**12}; allowed: 0 to "),
        ("quadratic", put(columns=-1), "layer 1: columns -1; allowed: 0 to "),
        ("quadratic", put(columns=N - 1), "layer 1: key_positions are not those of"),
        ("quadratic", at("key_positions", -7), "layer 1: key_positions are not those of"),
        ("quadratic", put(columns=True), "layer 1: columns is a bool; allowed: int"),
        ("quadratic", put(columns=torch.ones(())), "layer 1: columns is a Tensor; allowed: int"),
        ("quadratic", lambda x: x.update(k=x["k"][:, :1]), "layer 1: columns 21; allowed: 0 to 1"),
        ("mixed_chunk", put(v=3), "layer 1: v is a int; allowed: Tensor"),
        ("mixed_chunk", put(position="3"), "layer 1: position is a str; allowed: Tensor"),
        ("mixed_chunk", lambda x: x.update(v=x["v"].to_sparse()), "v is not stored number by number"),
        (
            "quadratic",
            put(k=torch.zeros((), dtype=torch.float64).expand(2, 10**12, 4)),
            "k is not stored number by number",
        ),
        ("mixed_chunk", lambda x: [1, 2], "layer 1 has a list; allowed: kv_sum, "),
        ("mixed_chunk", lambda x: {1: 2}, "layer 1 has 1; allowed: kv_sum, "),
        ("decoder", at("source.valid", 6), "layer 1: source.valid .* allowed: 0 to 5"),
    ],
)
def test_a_file_with_numbers_that_no_stack_leaves_behind_is_refused(tmp_path, kind, change, message):
    empty = spoilt_file(tmp_path / "state.pt", kind, change)
    with pytest.raises(ValueError, match=message) as refused:
        DecodingState.load(tmp_path / "state.pt", empty)
    assert "\n" not in str(refused.value)


def test_the_first_layer_and_the_number_of_rows_are_looked_at_too(tmp_path):
    empty = spoilt_file(tmp_path / "state.pt", "mixed_chunk", put(position=3), layer=0)
    with pytest.raises(ValueError, match="layer 0: position is a int; allowed: Tensor"):
        DecodingState.load(tmp_path / "state.pt", empty)
    stack = build("mixed_chunk")
    stack.empty_state(torch.zeros(2, 0)).save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"has shape \(2, .*; allowed: \(1, "):
        DecodingState.load(tmp_path / "state.pt", stack.empty_state(torch.zeros(1, 0)))


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"format": "fairseq_flash decoding state 1"},
        {"format": "fairseq_flash decoding state 2", "layers": []},
        {"format": "fairseq_flash decoding state 2", "layers": {}, "beside": {}},
        {"format": "fairseq_flash decoding state 2", "layers": [], "beside": 1},
    ],
)
def test_a_file_of_another_make_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds something else; allowed: 'fairseq_flash decoding state 2'"):
        DecodingState.load(tmp_path / "state.pt", build("local").empty_state(torch.zeros(1, 0)))


def test_code_in_a_file_is_refused_without_advice_to_run_it(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save(Harm(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="cannot be read as a decoding state: it holds code") as refused:
        DecodingState.load(tmp_path / "state.pt", build("local").empty_state(torch.zeros(1, 0)))
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "harm").exists()


@torch.no_grad()
def test_tensors_of_a_file_that_share_memory_are_taken_apart(tmp_path):
    stack, tokens = build("mixed_chunk"), torch.randint(WORDS, (2, N))
    state = stack.read(tokens)
    layers = [dict(fields(layer)) for layer in state.layers]
    layers[0]["k_quad"] = layers[0]["k_lin"]
    content = {"format": "fairseq_flash decoding state 2", "layers": layers, "beside": {}}
    torch.save(content, tmp_path / "state.pt")
    loaded, _ = DecodingState.load(tmp_path / "state.pt", stack.empty_state(tokens))
    assert loaded.layers[0].k_quad.data_ptr() != loaded.layers[0].k_lin.data_ptr()
