"""Proves that rows over 1 to 4 processes give what one process gives: outputs, all gradients, few bytes."""

import functools
import itertools

import pytest
import torch

from fairseq_flash.modules import GatedAttentionUnit, Stack, TransformerBlock, part_of_rows
from support.ranks import run_ranks

TOLERANCE = 1e-12  # relative to the largest number; measured: 1.3e-14
RANKS = [1, 2, 3, 4]
D, C = 8, 4
#: Columns, and of each row its leading and its trailing padding: no real token on a rank, or in a row.
GEOMETRIES = {
    "a token": (1, [(0, 0)]),
    "below a chunk": (3, [(0, 0), (1, 0)]),
    "ragged": (13, [(0, 0), (0, 9), (3, 1), (0, 13)]),
    "even": (32, [(0, 0)]),
    "long": (35, [(0, 0), (7, 0), (17, 17)]),
    "parts of several chunks": (70, [(0, 0), (0, 41), (3, 20)]),
}


def unit(attention="mixed_chunk", **options):
    return GatedAttentionUnit(D, attention=attention, attention_dim=6, chunk_size=C, **options)


def transformer(attention="mixed_chunk", **options):
    return TransformerBlock(D, attention=attention, attention_dim=4, chunk_size=C, **options)


def stack(*blocks):
    embedding = torch.nn.Embedding(11, D)
    return Stack(embedding, [block() for block in blocks], embed_dim=D, attention_dim=6, scaled_sin=True)


LAYERS = {
    **{
        f"{attention}-{'causal' if causal else 'bidirectional'}-{norm}-{backend}": functools.partial(
            unit, attention, causal=causal, linear_norm=norm, backend=backend
        )
        for attention, causal, norm, backend in itertools.product(
            ("mixed_chunk", "global"), (True, False), ("chunk", "mean"), ("recomputed", "reference")
        )
    },
    "local-causal": functools.partial(unit, "local"),
    "local-bidirectional": functools.partial(unit, "local", causal=False),
    **{
        f"{attention}-causal-fading{'-shifted' * shifted}": functools.partial(
            unit, attention, linear_norm="fading", shift_keys=shifted
        )
        for attention, shifted in itertools.product(("mixed_chunk", "global"), (True, False))
    },
    "mixed_chunk-bidirectional-shifted": functools.partial(unit, causal=False, shift_keys=True),
    "local-causal-shifted": functools.partial(unit, "local", shift_keys=True),
    "transformer-fading": functools.partial(transformer, linear_norm="fading"),
    "stack-fading-shifted": functools.partial(
        stack, *[functools.partial(unit, linear_norm="fading", shift_keys=True)] * 2
    ),
    "transformer-mixed_chunk": transformer,
    "transformer-global": functools.partial(transformer, "global", linear_norm="chunk"),
    "transformer-local": functools.partial(transformer, "local"),
    "stack-causal": functools.partial(
        stack, unit, functools.partial(unit, "local"), functools.partial(unit, relative_bias="toeplitz")
    ),
    "stack-bidirectional": functools.partial(stack, *[functools.partial(unit, causal=False)] * 2),
}
CASES = list(itertools.product(LAYERS, GEOMETRIES))


def build(name, geometry):
    """A layer of random weights, its rows, their mask, and what each output is multiplied with."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    n, padding = GEOMETRIES[geometry]
    mask = torch.zeros(len(padding), n, dtype=torch.bool)
    for row, (lead, trail) in enumerate(padding):
        mask[row, :lead] = mask[row, n - trail :] = True
    if isinstance(layer, Stack):
        x = torch.randint(11, mask.shape)
    else:
        x = torch.randn(*mask.shape, D, requires_grad=True)
    return layer, x, mask, torch.randn(*mask.shape, D)


def gradients(layer, x, loss):
    leaves = [*layer.parameters(), *([x] if x.requires_grad else [])]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def whole(name, geometry):
    """Outputs of the real tokens of each row, and gradients."""
    layer, x, mask, weights = build(name, geometry)
    out, _ = layer(x, mask)
    rows = [row[~padding] for row, padding in zip(out, mask, strict=True)]
    loss = sum((row * w[: len(row)]).sum() for row, w in zip(rows, weights, strict=True))
    return [row.detach() for row in rows], gradients(layer, x, loss)


def part(group, name, geometry):
    """The same of this process's part, whose padding trails."""
    layer, x, mask, weights = build(name, geometry)
    cut, cut_mask = part_of_rows(x, mask, C, group)
    out, _ = layer(cut, cut_mask, group=group)
    assert (out[cut_mask] == 0).all()
    w, _ = part_of_rows(weights, None, C, group)
    return out.detach(), gradients(layer, x, (out * w).sum())


def all_parts(group):
    return {case: part(group, *case) for case in CASES}


@pytest.fixture(scope="module", params=RANKS)
def parts(request):
    """What each process found in each case."""
    return run_ranks(all_parts, request.param)


def error(ours, expected):
    return (ours - expected).abs().max() / expected.abs().max().clamp(min=1e-300)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_outputs_and_all_gradients_are_those_of_one_process(parts, case):
    rows, expected = whole(*case)
    outs = torch.cat([found[case][0] for found in parts], dim=1)
    for row, out in zip(rows, outs, strict=True):
        assert (row - out[: len(row)]).abs().max() <= TOLERANCE * row.abs().max() if len(row) else True
        assert (out[len(row) :] == 0).all()
    for index, gradient in enumerate(expected):
        summed = sum(found[case][1][index] for found in parts)
        assert error(summed, gradient) <= TOLERANCE, index


def refusals(group):
    """What is refused, each with its message; no process may wait for another."""
    rank, n = group.rank(), 2 * C
    x, found = torch.zeros(1, n, D), {}
    padded = torch.zeros(1, n, dtype=torch.bool)
    tokens = torch.zeros(1, n, dtype=torch.long)
    quadratic = unit("quadratic", n_ref=16)
    calls = {
        "quadratic": lambda: quadratic(x, group=group),
        "softmax": lambda: transformer("quadratic")(x, group=group),
        "stack": lambda: stack(unit, lambda: quadratic)(tokens, group=group),
        "state": lambda: unit()(x, None, unit().empty_state(x), group=group),
        "no group": lambda: unit()(x, group=2),
        "cut": lambda: unit()(x[:, :5], group=group),
        "empty": lambda: unit()(x[:, :0], group=group),
        # These three are found together, by what the processes tell each other.
        "uneven": lambda: unit()(x[:, : n // 2] if rank else x, group=group),
        "middle": lambda: unit()(x, padded.index_fill(1, torch.tensor([n - 1]), rank == 0), group=group),
        "before": lambda: unit()(x, padded.index_fill(1, torch.tensor([0]), rank == 0), group=group),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def refused():
    """The messages in the first and in the second of two processes."""
    return run_ranks(refusals, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quadratic", "attention='quadratic' cannot share a row in a group; allowed: mixed_chunk, local"),
        ("softmax", "attention='quadratic' cannot share a row in a group; allowed: mixed_chunk, local"),
        ("stack", "attention='quadratic' cannot share a row in a group; allowed: mixed_chunk, local"),
        ("state", "group and state are both given; allowed is one of them"),
        ("no group", "group is a int; allowed: ProcessGroup"),
        ("cut", "of 2 of the rows has 5 columns; allowed: multiples of chunk_size=4"),
        ("empty", "of 2 of the rows has 0 columns; allowed: multiples of chunk_size=4"),
        ("uneven", "the parts in the group, of 4 to 8 columns, do not make whole rows; allowed: parts"),
        ("middle", "the parts in the group, of 8 to 8 columns, do not make whole rows; allowed: parts"),
        ("before", "the parts in the group, of 8 to 8 columns, do not make whole rows; allowed: parts"),
    ],
)
def test_what_cannot_be_shared_is_refused(refused, name, message):
    for messages in refused:
        assert message in messages[name]


def traffic(group, attention, n, **options):
    """Bytes of each message that a pass forward and backward over two rows of ``n`` tokens sends."""
    sent, send = [], torch.distributed.all_gather

    def counted(found, x, **options):
        sent.append(x.nbytes)
        return send(found, x, **options)

    torch.distributed.all_gather = counted
    x, mask = part_of_rows(torch.randn(2, n, D, requires_grad=True), None, C, group)
    unit(attention, **options)(x, mask, group=group)[0].sum().backward()
    torch.distributed.all_gather = send
    return sent


def traffics(group):
    found = {(kind, n): traffic(group, kind, n) for kind in ("mixed_chunk", "local") for n in (5, 40, 400)}
    shifted = dict(shift_keys=True, linear_norm="fading")
    return found | {("shifted", n): traffic(group, "mixed_chunk", n, **shifted) for n in (5, 40, 400)}


def test_what_is_sent_does_not_grow_with_the_row():
    kv_sum = 2 * 6 * 2 * D * 8  # rows, s, e, float64
    for sent in run_ranks(traffics, 2):
        for n in (5, 40, 400):
            # Where the parts lie; the sums with their counts; their gradients.
            assert sent["mixed_chunk", n] == [2 * 3 * 8, kv_sum + 2 * 8, kv_sum]
            assert sent["local", n] == [2 * 3 * 8]
            # And the base of one token a row, and its gradient.
            base = 2 * 6 * 8
            assert sent["shifted", n] == [2 * 3 * 8, base, kv_sum + 2 * 8, kv_sum, base]
