"""Proves one layer: the paper's numbers, however a row is padded, cut or continued."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_flash.modules import GatedAttentionUnit
from support import as_oracle, oracle, pieces
from support.pieces import error

TOLERANCE = 256 * torch.finfo(torch.float64).eps  # relative; measured: 15 eps
D, C, N_REF = 8, 4, 13
SHIFTED = ["mixed_chunk shifted", "local shifted", "global shifted"]
#: The attention, and whether keys are shifted and, in causal layers, the mean fades unless told otherwise.
KINDS = ["mixed_chunk", "quadratic", "local", "global", *SHIFTED]
BACKENDS = ["auto", "reference"]
CHOICES = {
    "linear_norm": ["chunk", "mean", "fading"],
    "norm": ["layernorm", "scalenorm", "rmsnorm"],
    "relative_bias": ["toeplitz", "rotary"],
}
#: Every pair of choices at least once, not their full product.
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True))
    for values in [
        ("chunk", "layernorm", "toeplitz"),
        ("mean", "layernorm", "rotary"),
        ("mean", "scalenorm", "toeplitz"),
        ("chunk", "scalenorm", "rotary"),
        ("chunk", "rmsnorm", "toeplitz"),
        ("mean", "rmsnorm", "rotary"),
        ("fading", "layernorm", "toeplitz"),
        ("fading", "scalenorm", "rotary"),
    ]
]
#: Nothing fades without a direction.
DIRECTED = [
    (causal, options)
    for causal, options in itertools.product([True, False], COMBINATIONS)
    if causal or options["linear_norm"] != "fading"
]
every_kind = pytest.mark.parametrize("attention", KINDS)
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def build(kind, causal=True, **options):
    attention, *shifted = kind.split()
    if shifted:
        options = dict(shift_keys=True, linear_norm="fading" if causal else "mean") | options
    sizes = dict(attention_dim=6, chunk_size=C, n_ref=N_REF)
    layer = GatedAttentionUnit(D, attention=attention, causal=causal, **sizes, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer


@every_kind
@pytest.mark.parametrize(
    ("causal", "options"),
    DIRECTED,
    ids=["-".join((*options.values(), *["causal"] * causal)) for causal, options in DIRECTED],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_oracle_of_each_row_whatever_lies_in_the_padding(attention, causal, options, backend):
    layer = build(attention, causal, backend=backend, **options)
    x = torch.randn(3, N_REF, D)
    mask = torch.zeros(3, N_REF, dtype=torch.bool)
    mask[0, :5] = mask[1, 6:] = mask[1, 0] = True
    expected = oracle.padded(as_oracle.unit(layer), mask, x)
    for content in (0.0, 1e30, float("nan")):
        ours, _ = layer(x.masked_fill(mask.unsqueeze(-1), content), mask)
        assert error(ours, expected) <= TOLERANCE


@every_kind
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_pieces_of_any_size_give_the_whole(attention, data):
    """Also with padding on either side, and rows that swap half-way."""
    layer = build(attention, linear_norm=data.draw(st.sampled_from(CHOICES["linear_norm"])))
    drawn = pieces.draw(data, N_REF, D)
    expected = oracle.padded(as_oracle.unit(layer), drawn.padding_mask, drawn.x)
    ours, position = pieces.run(layer, drawn)
    assert error(ours, expected) <= TOLERANCE
    assert position.tolist() == (~drawn.padding_mask).sum(1).tolist()


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_steps_are_those_of_the_whole(attention, training):
    layer, x, weights = build(attention).train(training), torch.randn(2, N_REF, D), torch.randn(N_REF, D)
    whole, steps = layer(x)[0], pieces.with_gradients(layer, x, None, range(N_REF + 1))
    assert error(steps, whole) <= TOLERANCE
    parameters = list(layer.parameters())
    found, expected = (torch.autograd.grad((out * weights).sum(), parameters) for out in (steps, whole))
    assert all(error(a, b) <= 8 * TOLERANCE for a, b in zip(found, expected, strict=True))


@every_kind
@pytest.mark.parametrize("n", [1, 3, 4, 7, 12])
def test_the_past_is_bit_equal_whatever_the_future(attention, n):
    layer = build(attention)
    pieces.assert_past_ignores_future(layer, torch.randn(2, n, D))


@every_kind
def test_a_prefix_is_the_same_however_the_row_goes_on(attention):
    layer = build(attention)
    pieces.assert_prefixes_agree(layer, torch.randn(2, N_REF, D), TOLERANCE)


@every_kind
@both_directions
def test_a_row_of_padding_gives_zeros_and_finite_gradients(attention, causal):
    layer = build(attention, causal)
    x = torch.full((2, 5, D), torch.nan)
    x[0] = torch.randn(5, D)
    x.requires_grad_()
    mask = torch.tensor([[False] * 5, [True] * 5])
    out, _ = layer(x, mask)
    out.sum().backward()
    assert (out[1] == 0).all()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    assert (x.grad[1] == 0).all()


@every_kind
@both_directions
def test_gradients_are_the_oracles(attention, causal):
    layer = build(attention, causal)
    x = torch.randn(1, 9, D, requires_grad=True)
    weights = torch.randn(9, D)
    parameters = dict(layer.named_parameters())
    ours = torch.autograd.grad((layer(x)[0][0] * weights).sum(), [x, *parameters.values()])
    expected = torch.autograd.grad((as_oracle.unit(layer)(x[0]) * weights).sum(), [x, *parameters.values()])
    for name, a, b in zip(["x", *parameters], ours, expected, strict=True):
        assert error(a, b) <= 8 * TOLERANCE, name


def test_one_chunk_that_holds_the_row_is_the_quadratic_layer():
    mixed, local = build("mixed_chunk", relative_bias="rotary"), build("local", relative_bias="rotary")
    quadratic = GatedAttentionUnit(
        D, attention="quadratic", attention_dim=6, n_ref=C, relative_bias="rotary"
    ).eval()
    state = {name: value for name, value in local.state_dict().items()}
    quadratic.load_state_dict(state | {"n_ref": torch.tensor(C)})
    local.load_state_dict(state)
    x = torch.randn(2, C, D)
    assert error(local(x)[0], quadratic(x)[0]) <= TOLERANCE
    mixed.load_state_dict(state | {n: torch.cat((v, v)) for n, v in state.items() if "offset_scale" in n})
    assert error(mixed(x)[0], quadratic(x)[0]) <= TOLERANCE


@pytest.mark.parametrize("attention", ["mixed_chunk", "local", "global", *SHIFTED])
def test_the_state_has_the_promised_size_at_any_position(attention):
    layer = build(attention)
    s, e, c = 6, 2 * D, C
    promised = {"mixed_chunk": s * e + c * (2 * s + e), "local": c * (s + e), "global": s * e + c * (s + e)}
    state = layer.empty_state(torch.zeros(1, 1))
    with torch.no_grad():
        for piece in (1, 1, 30, 7, 1):
            _, state = layer(torch.randn(1, piece, D), None, state)
            base = s if "shifted" in attention else 0  # of the last token
            found = sum(x.numel() for x in state if x is not None)
            assert found == promised[attention.split()[0]] + base + 1  # the position


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk_size=0), "chunk_size=0 is not allowed; allowed: 1 or more"),
        (dict(attention_dim=7), "attention_dim=7 is odd"),
        (dict(attention_dim=-2), "attention_dim=-2 is not allowed"),
        (dict(expansion_factor=0), "expansion_factor=0 is not allowed"),
        (dict(attention="softmax"), "attention='softmax' is unknown; allowed: mixed_chunk, quadratic"),
        (dict(linear_norm="sum"), "linear_norm='sum' is unknown; allowed: chunk, mean, fading"),
        (dict(linear_norm="fading", causal=False), "linear_norm='fading' with causal=False is not allowed"),
        (
            dict(shift_keys=True, attention="quadratic", n_ref=4),
            "shift_keys=True with attention='quadratic' is not allowed; allowed: mixed_chunk, local, global",
        ),
        (dict(shift_keys=True, attention_dim=2), "attention_dim=2 with shift_keys=True is not allowed"),
        (dict(shift_keys=1), "shift_keys=1 is not allowed; allowed: True, False"),
        (dict(norm="batchnorm"), "norm='batchnorm' is unknown; allowed: layernorm"),
        (dict(relative_bias="alibi"), "relative_bias='alibi' is unknown; allowed: toeplitz, rotary"),
        (dict(dropout=1.0), "dropout=1.0 is not allowed; allowed: 0 to below 1"),
        (dict(attention="quadratic"), "n_ref=None is not allowed"),
        (
            dict(attention="quadratic", n_ref=4, backend="recomputed"),
            "backend='recomputed' is unknown; allowed: auto, reference",
        ),
        (dict(backend="cuda"), "backend='cuda' is unknown; allowed: auto, .*reference"),
    ],
)
def test_a_bad_argument_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GatedAttentionUnit(**(dict(embed_dim=D) | options))


def test_padding_between_real_tokens_is_refused():
    mask = torch.tensor([[False, True, False]])
    with pytest.raises(ValueError, match="padding between real tokens; allowed: leading and trailing"):
        build("mixed_chunk")(torch.randn(1, 3, D), mask)


def test_a_row_beyond_the_table_is_refused_but_padding_beyond_it_is_not():
    layer = build("quadratic", relative_bias="toeplitz")
    message = f"a row of {N_REF + 1} tokens is longer than the table of relative_bias='toeplitz'"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, N_REF + 1, D))
    with torch.no_grad():
        _, state = layer(torch.randn(1, N_REF, D), None, layer.empty_state(torch.zeros(1, 1)))
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(1, 1, D), None, state)
    padded = torch.arange(2 * N_REF) < N_REF
    out, _ = layer(torch.randn(1, 2 * N_REF, D), padded.unsqueeze(0))
    assert torch.isfinite(out).all()


def quadratic(n_ref, **options):
    sizes = dict(attention="quadratic", attention_dim=6, relative_bias="toeplitz")
    return GatedAttentionUnit(D, n_ref=n_ref, **sizes, **options)


def test_weights_trained_at_another_reference_length_are_refused():
    layer, other = build("quadratic"), GatedAttentionUnit(D, attention="quadratic", attention_dim=6, n_ref=99)
    with pytest.raises(ValueError, match="n_ref=99 differs from the checkpoint's; allowed: 13"):
        other.load_state_dict(layer.state_dict())


def test_a_bidirectional_layer_has_no_state():
    with pytest.raises(ValueError, match="bidirectional layer has no state"):
        build("mixed_chunk", causal=False).empty_state(torch.zeros(1, 1))


def test_weights_bring_their_reference_length_and_table_where_the_user_gave_none():
    trained, fresh, x = quadratic(N_REF), quadratic(99, adopt_n_ref=True), torch.randn(2, N_REF, D)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.n_ref == fresh.bias.limit == N_REF
    assert torch.equal(fresh(x)[0], trained(x)[0])


def test_a_reference_length_that_older_weights_hold_as_an_integer_is_read():
    layer = quadratic(99, adopt_n_ref=True)
    layer.load_state_dict(quadratic(N_REF).state_dict() | {"n_ref": torch.tensor(N_REF)})
    assert layer.n_ref == N_REF
    with pytest.raises(ValueError, match="n_ref=99 differs from the checkpoint's; allowed: 13"):
        quadratic(99).load_state_dict({"n_ref": torch.tensor(N_REF)}, strict=False)


def test_weights_without_a_reference_length_are_incomplete():
    weights = quadratic(N_REF).state_dict()
    del weights["n_ref"]
    with pytest.raises(RuntimeError, match="n_ref"):
        quadratic(N_REF).load_state_dict(weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_leaves_the_reference_length_alone(dtype):
    layer = quadratic(2049).to(dtype)
    assert layer.n_ref == int(layer.state_dict()["n_ref"]) == 2049


@pytest.mark.parametrize("in_float32", [True, False])
def test_a_moving_average_of_all_weights_keeps_the_reference_length(in_float32):
    """As fairseq averages under --store-ema, in place and with factors that float32 cannot hold."""
    layer, decay = quadratic(8191), 0.9999
    average = {name: x.float() if in_float32 else x.clone() for name, x in layer.state_dict().items()}
    for _ in range(3000):
        for name, x in layer.state_dict().items():
            if name == "n_ref":
                average[name].mul_(decay).add_(x.to(average[name].dtype), alpha=1 - decay)
    other = quadratic(8191)
    other.load_state_dict(average)
    assert other.n_ref == 8191


def test_a_size_that_is_no_integer_is_refused_by_name():
    for name in ("embed_dim", "attention_dim", "chunk_size", "expansion_factor"):
        with pytest.raises(ValueError, match=f"{name}=8.0 is not allowed; allowed: 1 or more, an integer"):
            GatedAttentionUnit(**{"embed_dim": D, name: 8.0})


@every_kind
@both_directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_numbers_and_gradients_are_those_of_float32_nearly(attention, causal, dtype):
    attention, *shifted = attention.split()
    sizes = dict(attention_dim=16, chunk_size=8, n_ref=32, shift_keys=bool(shifted))
    norm = "fading" if shifted and causal else "mean"
    layer = GatedAttentionUnit(32, attention=attention, causal=causal, linear_norm=norm, **sizes)
    mask = torch.arange(20) >= torch.tensor([[20], [13]])
    x = torch.randn(2, 20, 32)

    def computed(enabled):
        layer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out, _ = layer(x, mask)
        out.float().square().mean().backward()
        return [out.float(), *(weight.grad for weight in layer.parameters())]

    for found, expected in zip(computed(True), computed(False), strict=True):
        assert (found - expected).norm() <= 0.05 * expected.norm()  # measured: 0.02


@every_kind
@torch.no_grad()
def test_under_autocast_a_state_keeps_its_dtypes_and_goes_on(attention):
    layer, x = build(attention).float(), torch.randn(2, N_REF, D).float()
    mask = torch.arange(5) >= torch.tensor([[5], [3]])
    state, dtypes = layer.empty_state(x), []
    with torch.autocast("cpu", torch.bfloat16):
        for piece, padding in ((x[:, :5], mask), (x[:, 5:6], None), (x[:, 6:], None), (x[:, :1], None)):
            out, state = layer(piece, padding, state)
            assert torch.isfinite(out).all()
            dtypes.append([tensor.dtype for tensor in state if isinstance(tensor, torch.Tensor)])
    assert all(found == dtypes[0] for found in dtypes)


def test_a_state_with_the_token_before_is_for_shifted_keys_alone():
    shifted, plain, x = build("mixed_chunk shifted"), build("mixed_chunk"), torch.randn(1, 2, D)
    with pytest.raises(ValueError, match=r"state has kv_sum, .*position, before; allowed: .*, position$"):
        plain(x, None, shifted.empty_state(x))
    with pytest.raises(ValueError, match=r"state has kv_sum, .*position; allowed: .*, position, before$"):
        shifted(x, None, plain.empty_state(x))


def test_shifted_keys_bring_no_weights_and_change_what_is_computed():
    shifted, plain, x = build("mixed_chunk", shift_keys=True), build("mixed_chunk"), torch.randn(2, 9, D)
    shifted.load_state_dict(plain.state_dict())
    assert shifted.state_dict().keys() == plain.state_dict().keys()
    assert error(shifted(x)[0], plain(x)[0]) > 1e-3
