"""Proves that a module given anything either computes what it promises or refuses the argument by name."""

import contextlib
import itertools
import math

import numpy
import pytest
import torch
from torch import nn

from fairseq_flash.modules import (
    ATTENTIONS,
    BACKENDS,
    INITS,
    LINEAR_NORMS,
    NORMS,
    DecoderLayer,
    DecoderLayerState,
    DecodingState,
    GatedAttentionUnit,
    GatedCrossAttention,
    Stack,
    TransformerBlock,
)
from support import as_oracle, oracle
from support.fuzz import fuzzed, try_out

TOLERANCE = 64 * torch.finfo(torch.float64).eps  # relative; measured: 3 eps
D, S, C, WORDS, LONGEST = 8, 4, 4, 11, 14
MODULES = ("unit", "transformer", "decoder", "stack of units", "stack of transformers", "stack of decoders")


@contextlib.contextmanager
def refused(*names):
    """A ValueError whose text has one of the names as a word, and says what is allowed; nothing else."""
    with pytest.raises(ValueError, match=rf"\b({'|'.join(names)})\b.*allowed") as caught:
        yield
    assert type(caught.value) is ValueError


# Constructors.

NO_SIZES = [
    0,
    -1,
    8.0,
    2.5,
    "8",
    True,
    None,
    [8],
    float("nan"),
    float("inf"),
    8j,
    numpy.float64(8),
    torch.ones(2),
]
NO_RATES = [-0.1, 1, 1.5, "0.1", True, None, [0.1], float("nan"), float("inf"), 0.1j]
NO_CHOICES = ["", "softmax ", 0, 1, True, b"auto", [], ["mean"], {}, 1.5]
NO_FLAGS = ["", "False", 0, 1, None, [], 0.0, numpy.True_]
FLAGS = [True, False]


def sizes(*allowed):
    return [*allowed, numpy.int64(allowed[0])], NO_SIZES


def choices(*allowed, none=False):
    return [*allowed, *([None] if none else [])], [*NO_CHOICES, *([] if none else [None])]


RATES = ([0, 0.0, 0.3, numpy.float32(0.5)], NO_RATES)
COMMON = {
    "embed_dim": sizes(8, 16),
    "norm": choices(*NORMS),
    "init": choices(*INITS),
    "dropout": RATES,
}
#: By class: for each argument the values that are allowed, and those that are not.
ARGUMENTS = {
    GatedAttentionUnit: {
        **COMMON,
        "attention": choices(*ATTENTIONS),
        "expansion_factor": sizes(1, 2, 3),
        "attention_dim": ([2, 4, 6], [*NO_SIZES, 3, 7]),
        "chunk_size": sizes(1, 4, 5, 40),
        "causal": (FLAGS, NO_FLAGS),
        "linear_norm": choices(*LINEAR_NORMS),
        "relative_bias": choices("toeplitz", "rotary", none=True),
        "n_ref": sizes(20, 30),
        "backend": choices(*BACKENDS[:1], "reference"),
        "adopt_n_ref": (FLAGS, NO_FLAGS),
        "shift_keys": (FLAGS, NO_FLAGS),
    },
    TransformerBlock: {
        **COMMON,
        "attention": choices(*ATTENTIONS),
        "attention_dim": ([2, 4, 8], [*NO_SIZES, 3, 6, 32]),
        "ffn_embed_dim": ([None, 1, 8], [x for x in NO_SIZES if x is not None]),
        "glu": (FLAGS, NO_FLAGS),
        "chunk_size": sizes(1, 4, 5, 40),
        "linear_norm": choices(*LINEAR_NORMS),
        "attention_dropout": RATES,
        "backend": choices("auto", "reference"),
    },
    GatedCrossAttention: {
        **COMMON,
        "expansion_factor": sizes(1, 2, 3),
        "attention_dim": sizes(1, 2, 5),
        "backend": choices(*BACKENDS),
    },
}


def excluded(attention, attention_dim, causal, linear_norm, shift_keys, **_):
    """Arguments of a unit that are allowed, but not beside each other."""
    fading = attention != "quadratic" and not causal and linear_norm == "fading"
    shifted = attention == "quadratic" and shift_keys is True
    single = shift_keys is True and type(attention_dim) is int and attention_dim == 2
    found = (("shift_keys", shifted), ("linear_norm", fading), ("attention_dim", single))
    return {name for name, wrong in found if wrong}


@fuzzed(30, 700)
def test_constructors_of_layers(tries, robustness):
    def case(draw):
        kind = draw(ARGUMENTS)
        arguments = ARGUMENTS[kind]
        given_ones = {name: draw(allowed, name) for name, (allowed, _) in arguments.items()}
        spoilt = {draw(arguments, "spoilt") for _ in range(draw([0, 1, 1, 2]))}
        given_ones.update({name: draw(arguments[name][1], name) for name in spoilt})
        if given_ones.get("n_ref", 1) is None and given_ones["attention"] != "quadratic":
            spoilt -= {"n_ref"}
        wrong = spoilt | (excluded(**given_ones) if kind is GatedAttentionUnit else set())
        if wrong:
            with refused(*wrong):
                kind(**given_ones)
            return
        layer = kind(**given_ones).eval()
        x = torch.randn(2, 5, int(given_ones["embed_dim"]))
        out = layer(x, layer.read(x)) if kind is GatedCrossAttention else layer(x)[0]
        assert out.shape == x.shape
        assert torch.isfinite(out).all()

    try_out(tries, robustness, "constructors of layers", case)


def unit(draw, causal=True):
    attention = draw(ATTENTIONS, "attention")
    layer = GatedAttentionUnit(
        D,
        attention=attention,
        attention_dim=S,
        chunk_size=draw([1, 3, 4, 5, 20], "chunk_size"),
        causal=causal,
        shift_keys=attention != "quadratic" and draw([True, False], "shift_keys"),
        linear_norm=draw([norm for norm in LINEAR_NORMS if causal or norm != "fading"]),
        norm=draw(NORMS),
        relative_bias=draw(["toeplitz", "rotary"]),
        n_ref=LONGEST,
        backend=draw(["auto", "reference"]),
    )
    return layer


def transformer(draw):
    return TransformerBlock(
        D,
        attention=draw(ATTENTIONS, "attention"),
        attention_dim=S,
        chunk_size=draw([1, 3, 4, 5, 20], "chunk_size"),
        linear_norm=draw(LINEAR_NORMS),
        norm=draw(NORMS),
        glu=draw([True, False]),
    )


def cross(draw):
    return GatedCrossAttention(D, attention_dim=draw([3, 4]), norm=draw(NORMS))


def decoder(draw):
    return DecoderLayer(unit(draw), cross(draw))


def build(draw, name, causal=True):
    """A module with weights of which all parts matter."""
    if name.startswith("stack"):
        make = {"units": unit, "transformers": transformer, "decoders": decoder}[name.split()[-1]]
        blocks = [make(draw) for _ in range(draw([1, 2]))]
        module = Stack(
            nn.Embedding(WORDS, D), blocks, embed_dim=D, attention_dim=S, scaled_sin=draw([True, False])
        )
    else:
        module = (
            unit(draw, causal)
            if name == "unit"
            else {"transformer": transformer, "decoder": decoder}[name](draw)
        )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


def rows_for(module, b, n):
    return torch.randint(WORDS, (b, n)) if isinstance(module, Stack) else torch.randn(b, n, D)


def source_for(draw, name, b):
    """What a module reads beside its rows."""
    if "decoder" not in name:
        return {}
    m = draw([0, 1, 3, 7], "source length")
    mask = torch.rand(b, m) < draw([0, 0.3, 1])
    return {"source": torch.randn(b, m, D), "source_padding_mask": draw([None, mask])}


def padding(draw, b, n):
    """A mask with leading and trailing padding, any amount."""
    mask = torch.zeros(b, n, dtype=torch.bool)
    for row in mask:
        lead, trail = (draw(range(n + 1)) for _ in range(2))
        row[:lead] = True
        row[max(lead, n - trail) :] = True
    return mask


def noise(module, x, mask):
    """The same rows with anything in the padding."""
    if isinstance(module, Stack):
        return torch.where(mask, torch.randint_like(x, WORDS), x)
    return x.masked_fill(mask.unsqueeze(-1), torch.nan)


def error(ours, expected):
    if not expected.numel():
        return 0.0
    return ((ours - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def prefix(draw, module, x, mask, source):
    """What a token gets does not depend on what comes behind it."""
    whole, _ = module(x, None, **source)
    m = draw(range(x.shape[1] + 1), "prefix")
    assert error(module(x[:, :m], None, **source)[0], whole[:, :m]) <= TOLERANCE


def inert(draw, module, x, mask, source):
    """A row is the same beside any other, in any padding; at padding there are zeros."""
    out, _ = module(noise(module, x, mask), mask, **source)
    assert (out[mask] == 0).all()
    for row, hidden in enumerate(mask):
        alone = {name: y if y is None else y[row : row + 1] for name, y in source.items()}
        expected, _ = module(x[row : row + 1, ~hidden], None, **alone)
        assert error(out[row, ~hidden], expected[0]) <= TOLERANCE


def decoded(draw, module, x, mask, source):
    """In pieces of any length, none among them, the rows are as at once."""
    whole, _ = module(x, mask, **source)
    like = x if x.dim() == 3 else x[:, :0]
    state, outs = module.empty_state(like, **source), []
    cuts = sorted(draw(range(x.shape[1] + 1)) for _ in range(draw(range(5))))
    with torch.set_grad_enabled(draw([True, False], "gradients")):
        for start, end in itertools.pairwise([0, *cuts, x.shape[1]]):
            piece = noise(module, x[:, start:end], mask[:, start:end])
            out, state = module(piece, mask[:, start:end], state)
            outs.append(out)
    assert error(torch.cat(outs, dim=1), whole) <= TOLERANCE
    position = state.position
    assert position.tolist() == (~mask).sum(1).tolist()


def paper(draw, module, x, mask, source):
    """The numbers are those of the formulas."""
    function = (
        as_oracle.unit(module) if isinstance(module, GatedAttentionUnit) else as_oracle.transformer(module)
    )
    expected = oracle.padded(function, mask, x) if x.numel() else x
    assert error(module(noise(module, x, mask), mask)[0], expected) <= TOLERANCE


@fuzzed(40, 900)
def test_valid_uses(tries, robustness):
    def case(draw):
        name = draw(MODULES)
        promises = [prefix, inert, decoded, *([paper] if name in ("unit", "transformer") else [])]
        promise = draw(promises, "promise")
        causal = name != "unit" or promise in (prefix, decoded) or draw([True, False], "causal")
        module = build(draw, name, causal)
        b, n = draw([0, 1, 2, 3], "rows"), draw([0, 1, 2, 4, 5, 9, LONGEST], "length")
        x = rows_for(module, b, n)
        promise(draw, module, x, padding(draw, b, n), source_for(draw, name, b))

    try_out(tries, robustness, "valid uses of modules", case)


# Calls with something wrong.


def bad_rows(module, x):
    """No rows of this module."""
    if isinstance(module, Stack):
        numbers = [x - WORDS, x + WORDS, x + 2**40, x.float(), x.bool(), x.to(torch.complex64)]
        shapes = [x[0], x[0, 0], x.unsqueeze(-1)]
    else:
        numbers = [x.long(), x.bool(), x.float(), x.half(), x.to(torch.complex128)]
        shapes = [x[0], x[0, 0], x.unsqueeze(0), x[..., 1:], torch.cat((x, x), dim=-1)]
    return [None, "x", 0, x.tolist(), x.numpy(), x.to("meta"), *numbers, *shapes]


def bad_masks(b, n):
    """No masks of rows (b, n), whatever they may hold."""
    mask = torch.zeros(b, n, dtype=torch.bool)
    dtypes = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64)
    shapes = [mask[:, 1:], mask[1:], mask[0], mask.unsqueeze(-1), mask.unsqueeze(0), mask.repeat(1, 2)]
    others = ["mask", True, 0, mask.tolist(), mask.numpy(), mask.to("meta")]
    return [*others, *shapes, *(mask.to(dtype) for dtype in dtypes)]


def hole(b, n):
    """A mask with padding between real tokens."""
    mask = torch.zeros(b, n, dtype=torch.bool)
    mask[-1, n // 2] = True
    return mask


def bad_sources(source):
    shapes = [source[1:], source[0], source.unsqueeze(0), source[..., 1:]]
    return ["source", [1], *shapes, source.long(), source.float(), source.to("meta")]


def paths(state, prefix=()):
    """Where the tensors and numbers of a state are."""
    for name, value in state._asdict().items():
        if isinstance(value, tuple):
            yield from paths(value, (*prefix, name))
        elif value is not None:
            yield (*prefix, name)


def spoilt(draw, state):
    """A layer's state with one field that is not its own."""
    path = draw(list(paths(state)), "field")
    *outer, last = path
    holders = [state]
    for name in outer:
        holders.append(getattr(holders[-1], name))
    x = getattr(holders[-1], last)
    if isinstance(x, int):
        bad = [-1, x + 1000, 10**12, 1.5, "1", None, True, torch.tensor(1)]
    else:
        shapes = [x[1:], torch.cat((x, x)), x.unsqueeze(-1), x.unsqueeze(0)]
        dtypes = [x.to(dtype) for dtype in (torch.float16, torch.int32, torch.bool)]
        bad = [None, "x", x.tolist(), x.detach().numpy(), x.to("meta"), *shapes, *dtypes]
        bad += [x.repeat(*[1] * (x.dim() - 1), 2)] if x.dim() > 1 and x.numel() else []
        bad += [x - 2**20, x + 2**33] if last in ("position", "valid") else []
    value = draw(bad, "value")
    for holder, name in zip(reversed(holders), reversed(path), strict=True):
        value = holder._replace(**{name: value})
    return value


def layout(state):
    """What tells apart the empty states of layers."""
    if isinstance(state, tuple):
        return type(state), *map(layout, state)
    return state.shape if isinstance(state, torch.Tensor) else state


def foreign(like):
    """Empty states of layers of all kinds and some sizes."""
    chosen = dict(attention_dim=S, chunk_size=C)
    sizes = [
        chosen | dict(attention_dim=2 * S),
        chosen | dict(chunk_size=7),
        chosen | dict(expansion_factor=3),
    ]
    layers = [GatedAttentionUnit(D, attention=attention, n_ref=9, **chosen) for attention in ATTENTIONS]
    layers += [TransformerBlock(D, attention=attention, **chosen) for attention in ATTENTIONS]
    layers += [GatedAttentionUnit(D, **size) for size in (*sizes, chosen | dict(shift_keys=True))]
    reader = DecoderLayer(layers[0], GatedCrossAttention(D, attention_dim=2))
    return [
        *(layer.empty_state(like) for layer in layers),
        reader.empty_state(like, torch.randn(len(like), 3, D)),
    ]


def bad_layer_state(draw, state, empty):
    """What no such layer returns for these rows."""
    if draw([True, False], "one field"):
        return spoilt(draw, state)
    others = [
        other for other in foreign(torch.zeros(len(state.position), 0)) if layout(other) != layout(empty)
    ]
    return draw([*others, "state", 0, (), {}, tuple(state), DecodingState((state,))])


def bad_state(draw, module, state, empty):
    """What the module does not return for these rows."""
    if not isinstance(module, Stack):
        return bad_layer_state(draw, state, empty)
    layers = state.layers
    if draw([True, False], "one layer"):
        at = draw(range(len(layers)), "layer")
        bad = bad_layer_state(draw, layers[at], empty.layers[at])
        return DecodingState((*layers[:at], bad, *layers[at + 1 :]))
    later = layers[0]._replace(**move(layers[0]))
    bad = [layers, list(layers), layers[0], "state", 0, DecodingState(None), DecodingState(())]
    bad += [DecodingState((*layers, layers[0])), DecodingState(layers[:-1])]
    if len(layers) > 1:
        bad.append(DecodingState((later, *layers[1:])))
        if layout(empty.layers[0]) != layout(empty.layers[1]):
            bad.append(DecodingState(layers[::-1]))
    return draw(bad)


def move(layer):
    """The fields of a layer's state one token on."""
    if isinstance(layer, DecoderLayerState):
        return dict(own=layer.own._replace(**move(layer.own)))
    return dict(position=layer.position + 1)


@fuzzed(40, 1200)
def test_invalid_calls(tries, robustness):
    def case(draw):
        name = draw(MODULES)
        module = build(draw, name)
        b, n = draw([2, 3], "rows"), draw([4, 5, 9], "length")
        x, source = rows_for(module, b, n), source_for(draw, name, b)
        like = x if x.dim() == 3 else x[:, :0]
        empty = state = module.empty_state(like, **source)
        if draw([True, False], "begun"):
            _, state = module(x, None, module.empty_state(like, **source))
        attack = draw(["rows", "mask", "state", "source"], "attack")
        begin = draw([None, state], "state")
        beside = source if begin is None else {}
        with torch.set_grad_enabled(draw([True, False], "gradients")):
            if attack == "rows":
                bad = draw(bad_rows(module, x), "bad")
                with refused("tokens" if isinstance(module, Stack) else "x"):
                    module(bad, None, begin, **beside)
            elif attack == "mask":
                bad = draw([*bad_masks(b, n), hole(b, n)], "bad")
                with refused("padding_mask"):
                    module(x, bad, begin, **beside)
            elif attack == "state":
                bad = bad_state(draw, module, state, empty)
                with refused("state", r"source\.valid"):
                    module(x, None, bad)
            else:
                refused_source(draw, module, x, state, source)

    try_out(tries, robustness, "invalid calls of modules", case)


def refused_source(draw, module, x, state, source):
    """A source that cannot be read, beside a state, beside rows of a layer that reads none, or missing."""
    good = torch.randn(len(x), 3, D)
    if not source:
        with refused("source"):
            module(x, None, draw([None, state]), source=good)
    elif draw([True, False], "of the wrong kind"):
        begin = draw([module.forward, lambda x, **source: module.empty_state(x, **source)])
        rows = x if x.dim() == 3 or begin == module.forward else x[:, :0]
        which = draw(["source", "source_padding_mask"])
        bad = draw(bad_sources(good) if which == "source" else bad_masks(len(x), 3), which)
        with refused(which):
            begin(rows, **{"source": good, which: bad})
    else:
        with refused("source"):
            draw([lambda: module(x), lambda: module(x, None, state, source=good)])()


@fuzzed(10, 200)
def test_parts_that_do_not_fit(tries, robustness):
    """Constructors of modules that are given modules."""

    def case(draw):
        own, reader = unit(draw), cross(draw)
        narrow = GatedAttentionUnit(2, attention_dim=S)
        layer, name = draw(
            [
                (
                    lambda: DecoderLayer(draw([reader, "unit", None, transformer(draw)]), reader),
                    "self_attention",
                ),
                (lambda: DecoderLayer(unit(draw, causal=False), reader), "self_attention"),
                (lambda: DecoderLayer(own, draw([own, None, 1, GatedCrossAttention(2)])), "cross_attention"),
                (lambda: stacked(draw([[], None, 1, [own, None], ["unit"], [own, narrow]])), "blocks"),
                (lambda: stacked([own], embed_dim=draw([7, 16, *NO_SIZES])), "embed_dim"),
                (lambda: stacked([own], attention_dim=draw([2, 6, *NO_SIZES])), "attention_dim"),
                (lambda: stacked([own], norm=draw([*NO_CHOICES, None])), "norm"),
                (lambda: stacked([own], scaled_sin=draw(NO_FLAGS)), "scaled_sin"),
                (lambda: stacked([own], dropout=draw(NO_RATES)), "dropout"),
                (
                    lambda: stacked([own], embed_scale=draw(["1", None, [1.0], math.nan, math.inf])),
                    "embed_scale",
                ),
                (lambda: stacked([own], embed_tokens=draw([None, "x", torch.ones(3)])), "embed_tokens"),
                (
                    lambda: stacked([own], embed_tokens=nn.Embedding(3, 7))(torch.ones(1, 2).long()),
                    "embed_tokens",
                ),
            ],
        )
        with refused(name):
            layer()

    try_out(tries, robustness, "parts of modules", case)


def stacked(blocks, **options):
    usual = dict(embed_tokens=nn.Embedding(3, D), embed_dim=D, attention_dim=S)
    return Stack(blocks=blocks, **(usual | options))


@fuzzed(10, 200)
def test_what_is_no_number_in_a_state_stays_in_its_row(tries, robustness):
    """It cannot be looked for at each step; it must not go elsewhere, and is refused where a file is read."""

    def case(draw):
        name = draw(MODULES)
        module = build(draw, name)
        x, source = rows_for(module, 2, 6), source_for(draw, name, 2)
        like = x if x.dim() == 3 else x[:, :0]
        with torch.no_grad():
            _, state = module(x, None, module.empty_state(like, **source))
            expected, _ = module(x, None, state.reorder(torch.tensor([0, 1])))
            layers = state.layers if isinstance(module, Stack) else (state,)
            at = draw(range(len(layers)))
            broken = layers[at].map(
                lambda x: x.index_fill(0, torch.tensor([1]), torch.nan) if x.is_floating_point() else x
            )
            layers = (*layers[:at], broken, *layers[at + 1 :])
            begin = DecodingState(layers) if isinstance(module, Stack) else layers[0]
            out, _ = module(x, None, begin)
        assert error(out[0], expected[0]) <= TOLERANCE

    try_out(tries, robustness, "states that are no numbers", case)
