"""Proves a Transformer layer of any attention: the oracle's, however a row is padded, cut or continued."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_flash.modules import TransformerBlock
from support import as_oracle, oracle, pieces
from support.pieces import error

TOLERANCE = 64 * torch.finfo(torch.float64).eps  # relative; measured: 5 eps, gradients 8
D, R, C, N = 8, 4, 4, 13
HEADS = D // R
KINDS = ["quadratic", "mixed_chunk", "local", "global", "mixed_chunk fading", "global fading"]
#: Every pair of choices at least once, not their full product.
COMBINATIONS = [
    dict(linear_norm="chunk", norm="layernorm", glu=False),
    dict(linear_norm="mean", norm="scalenorm", glu=False),
    dict(linear_norm="chunk", norm="scalenorm", glu=True),
    dict(linear_norm="mean", norm="rmsnorm", glu=True),
    dict(linear_norm="chunk", norm="rmsnorm", glu=False),
    dict(linear_norm="mean", norm="layernorm", glu=True),
    dict(linear_norm="fading", norm="layernorm", glu=False),
    dict(linear_norm="fading", norm="scalenorm", glu=True),
]
every_kind = pytest.mark.parametrize("attention", KINDS)


def build(kind, **options):
    attention, *fading = kind.split()
    if fading:
        options = dict(linear_norm="fading") | options
    sizes = dict(attention_dim=R, chunk_size=C, ffn_embed_dim=10)
    layer = TransformerBlock(D, attention=attention, **{**sizes, **options}).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer


def ragged(n=N):
    """Rows padded on the left, on both sides, and not at all."""
    mask = torch.zeros(3, n, dtype=torch.bool)
    mask[0, :5] = mask[1, 6:] = mask[1, 0] = True
    return torch.randn(3, n, D), mask


@every_kind
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_is_the_oracle_of_each_row_whatever_lies_in_the_padding(attention, options, backend):
    layer = build(attention, backend=backend, **options)
    x, mask = ragged()
    expected = oracle.padded(as_oracle.transformer(layer), mask, x)
    for content in (0.0, 1e30, float("nan")):
        ours, _ = layer(x.masked_fill(mask.unsqueeze(-1), content), mask)
        assert error(ours, expected) <= TOLERANCE
        assert (ours[mask] == 0).all()


@every_kind
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_pieces_of_any_size_give_the_whole(attention, data):
    """Also with padding on either side, and rows that swap half-way."""
    layer = build(attention, linear_norm=data.draw(st.sampled_from(["chunk", "mean", "fading"])))
    drawn = pieces.draw(data, N, D)
    expected = oracle.padded(as_oracle.transformer(layer), drawn.padding_mask, drawn.x)
    ours, position = pieces.run(layer, drawn)
    assert error(ours, expected) <= TOLERANCE
    assert position.tolist() == (~drawn.padding_mask).sum(1).tolist()


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_pieces_and_steps_are_those_of_the_whole(attention, training):
    layer = build(attention).train(training)
    (x, mask), inputs = ragged(), list(layer.parameters())
    whole, _ = layer(x, mask)
    continued = pieces.with_gradients(layer, x, mask, [0, 3, 4, 9, 10, N])
    assert error(continued, whole) <= TOLERANCE
    steps, rest = pieces.with_gradients(layer, x, None, range(N + 1)), layer(x)[0]
    assert error(steps, rest) <= TOLERANCE
    weights = torch.randn(N, D)
    for ours, expected in ((continued, whole), (steps, rest)):
        found, wanted = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, expected))
        assert all(error(a, b) <= 8 * TOLERANCE for a, b in zip(found, wanted, strict=True))


@every_kind
@pytest.mark.parametrize("autograd", [True, False], ids=["made with autograd", "made without"])
def test_with_autograd_a_state_may_be_used_twice(attention, autograd):
    layer, x = build(attention), torch.randn(2, 6, D)
    with torch.set_grad_enabled(autograd):
        _, state = layer(x[:, :4], None, layer.empty_state(x))
    first, _ = layer(x[:, 4:5], None, state)
    second, _ = layer(x[:, 5:6], None, state)
    assert not torch.equal(first, second)
    assert torch.equal(layer(x[:, 4:5], None, state)[0], first)
    (first + second).sum().backward()


@every_kind
@pytest.mark.parametrize("n", [1, 3, 4, 7, 12])
def test_the_past_is_bit_equal_whatever_the_future(attention, n):
    layer = build(attention, glu=True)
    pieces.assert_past_ignores_future(layer, torch.randn(2, n, D))


@every_kind
def test_a_prefix_is_the_same_however_the_row_goes_on(attention):
    layer = build(attention)
    pieces.assert_prefixes_agree(layer, torch.randn(2, N, D), TOLERANCE)


@every_kind
def test_a_row_of_padding_gives_zeros_and_finite_gradients(attention):
    """Also where a row that had no token yet goes on with padding."""
    layer = build(attention, glu=True)
    x = torch.full((2, 9, D), torch.nan)
    x[0] = torch.randn(9, D)
    x.requires_grad_()
    mask = torch.tensor([[False] * 9, [True] * 9])
    out, _ = layer(x, mask)
    first, state = layer(x[:, :6], mask[:, :6], layer.empty_state(x))
    second, _ = layer(x[:, 6:], mask[:, 6:], state)
    assert error(torch.cat((first, second), dim=1), out) <= TOLERANCE
    for each in (out, first, second):
        assert (each[1] == 0).all()
    (out.sum() + second.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert torch.isfinite(x.grad).all()
    assert (x.grad[1] == 0).all()


@every_kind
@pytest.mark.parametrize("glu", [True, False])
def test_gradients_are_the_oracles(attention, glu):
    layer = build(attention, glu=glu)
    x = torch.randn(1, 9, D, requires_grad=True)
    weights, inputs = torch.randn(9, D), [x, *layer.parameters()]
    ours = torch.autograd.grad((layer(x)[0][0] * weights).sum(), inputs)
    expected = torch.autograd.grad((as_oracle.transformer(layer)(x[0]) * weights).sum(), inputs)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(names, ours, expected, strict=True):
        assert error(a, b) <= 8 * TOLERANCE, name


@every_kind
def test_gradients_pass_gradcheck(attention):
    layer = build(attention, glu=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], torch.randn(1, 6, D, requires_grad=True))


def test_one_chunk_that_holds_the_row_is_softmax_attention_over_the_whole_past():
    quadratic, x = build("quadratic"), torch.randn(2, C, D)
    for attention in ("local", "mixed_chunk"):
        layer = build(attention)
        layer.load_state_dict({**layer.state_dict(), **quadratic.state_dict()})
        assert error(layer(x)[0], quadratic(x)[0]) <= TOLERANCE


@pytest.mark.parametrize("attention", ["mixed_chunk", "local", "global"])
def test_the_state_has_the_promised_size_at_any_position(attention):
    layer = build(attention)
    promised = {"mixed_chunk": R * R + C * 3 * R, "local": C * 2 * R, "global": R * R + C * 2 * R}
    state = layer.empty_state(torch.zeros(1, 1))
    with torch.no_grad():
        for piece in (1, 1, 30, 7, 1):
            _, state = layer(torch.randn(1, piece, D), None, state)
            assert sum(x.numel() for x in state if x is not None) == HEADS * promised[attention] + 1


def test_a_cache_grows_by_keys_and_values_and_at_most_an_eighth_of_spare_room():
    layer = build("quadratic")
    state, x = layer.empty_state(torch.zeros(1, 1)), torch.randn(1, 1, D)
    places = set()
    with torch.no_grad():
        for position in range(1, 700):
            _, state = layer(x, None, state)
            assert position == state.columns <= state.k.shape[1] <= position * 9 / 8 + 64
            assert state.k.shape == state.v.shape == (1, state.k.shape[1], D)
            places.add(state.k.data_ptr())
    assert len(places) <= 12, "written in place but for a few times"


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_in_parallel_and_step_by_step(attention, dtype):
    layer = build(attention, glu=True, linear_norm="chunk")
    x = torch.randn(2, N, D).to(dtype)
    layer.to(dtype).double()  # the weights that half precision has
    with torch.no_grad():
        exact, _ = layer(x.double())
        layer.to(dtype)
        parallel, _ = layer(x)
        state, steps = layer.empty_state(x), []
        for token in x.split(1, dim=1):
            out, state = layer(token, None, state)
            steps.append(out)
    for ours in (parallel, torch.cat(steps, dim=1)):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()  # measured: 0.9
    if attention.split()[0] in ("mixed_chunk", "global"):
        assert state.kv_sum.dtype == torch.float32


def test_dropout_of_the_scores_is_for_training_alone():
    x = torch.randn(1, 9, D)
    for attention in ("quadratic", "mixed_chunk", "local"):
        layer = build(attention, attention_dropout=0.5)
        assert torch.equal(layer(x)[0], layer(x)[0])
        layer.train()
        assert not torch.equal(layer(x)[0], layer(x)[0])


def test_the_feed_forward_network_has_as_many_parameters_with_a_gate_as_without():
    widths = {
        d: [TransformerBlock(d, attention_dim=4, glu=glu).ffn_out.in_features for glu in (False, True)]
        for d in (12, 512, 768, 1024)
    }
    assert widths == {12: [48, 32], 512: [2048, 1368], 768: [3072, 2048], 1024: [4096, 2736]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk_size=0), "chunk_size=0 is not allowed; allowed: 1 or more"),
        (dict(attention_dim=3), "attention_dim=3, the size of a head, .*even divisors of embed_dim=8"),
        (dict(attention_dim=6), "attention_dim=6, the size of a head, .*even divisors of embed_dim=8"),
        (dict(attention_dim=-2), "attention_dim=-2 is not allowed; allowed: 1 or more"),
        (dict(embed_dim=0), "embed_dim=0 is not allowed; allowed: 1 or more"),
        (dict(ffn_embed_dim=0), "ffn_embed_dim=0 is not allowed; allowed: 1 or more"),
        (dict(attention="softmax"), "attention='softmax' is unknown; allowed: mixed_chunk, quadratic"),
        (dict(linear_norm="sum"), "linear_norm='sum' is unknown; allowed: chunk, mean, fading"),
        (dict(norm="batchnorm"), "norm='batchnorm' is unknown; allowed: layernorm"),
        (dict(init="zero"), "init='zero' is unknown; allowed: fan_in, paper"),
        (dict(dropout=1.0), "dropout=1.0 is not allowed; allowed: 0 to below 1"),
        (dict(attention_dropout=-0.1), "attention_dropout=-0.1 is not allowed; allowed: 0 to below 1"),
        (dict(backend="cuda"), "backend='cuda' is unknown; allowed: auto, .*reference"),
    ],
)
def test_a_bad_argument_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerBlock(**(dict(embed_dim=D, attention_dim=R) | options))


def test_padding_between_real_tokens_is_refused():
    mask = torch.tensor([[False, True, False]])
    for attention in KINDS:
        with pytest.raises(ValueError, match="padding between real tokens; allowed: leading and trailing"):
            build(attention)(torch.randn(1, 3, D), mask)
