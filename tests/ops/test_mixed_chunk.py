"""Proves that mixed chunk attention is the paper's: whole, in pieces, stepped, and its gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_flash import ops
from support import oracle

TOLERANCE = 256 * torch.finfo(torch.float64).eps  # measured: 20 eps
S, E = 4, 6
BRANCHES = {"both": (True, True), "local": (True, False), "global": (False, True)}
LENGTHS = [1, 3, 4, 5, 7, 8, 13]  # below, at and beyond a chunk of 4, multiples and not
NORMS = ["chunk", "mean", "fading"]
#: Fading is for causal attention alone.
DIRECTIONS = [*itertools.product([True, False], NORMS[:2]), (True, "fading")]


def inputs_of(tensors, bias=None, lengths=None):
    """``tensors`` are q_quad, k_quad, q_lin, k_lin, v."""
    q_quad, k_quad, q_lin, k_lin, v = tensors
    quad = None if q_quad is None else ops.Pair(q_quad, k_quad)
    lin = None if q_lin is None else ops.Pair(q_lin, k_lin)
    return ops.Inputs(quad, lin, v, bias, lengths)


def lengths_of(mask):
    return (~mask).sum(1)


def draw(b, n, c, branch):
    quadratic, linear = BRANCHES[branch]
    q_quad, k_quad, q_lin, k_lin = torch.randn(4, b, n, S)
    return (
        *((q_quad, k_quad) if quadratic else (None, None)),
        *((q_lin, k_lin) if linear else (None, None)),
        torch.randn(b, n, E),
        torch.randn(2 * c - 1) if quadratic else None,
    )


def expected(tensors, table, mask, c, branch, **options):
    """The oracle on the real tokens of each row; ``tensors`` are q_quad, k_quad, q_lin, k_lin, v."""
    bias = None if table is None else lambda i, j: oracle.toeplitz_bias(table, i, j, c)
    rows = []
    for row, padding in enumerate(mask):
        n = int((~padding).sum())
        args = [None if x is None else x[row, :n] for x in tensors]
        out = oracle.mixed_chunk_attention(*args, bias, chunk_size=c, branch=branch, **options)
        rows.append(torch.cat((out, torch.zeros(len(padding) - n, E))))
    return torch.stack(rows)


def error(ours, expected, mask):
    difference = (ours - expected).masked_fill(mask.unsqueeze(-1), 0).abs().max()
    return difference / expected.abs().max().clamp(min=1e-3)


def empty_state(tensors, c):
    present = (("quad", tensors[0]), ("lin", tensors[2]))
    branches = tuple(name for name, x in present if x is not None)
    return ops.ChunkState.empty(tensors[4], c, S, E, branches)


def square(table, c):
    return None if table is None else ops.toeplitz_bias(table, c)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("causal", "linear_norm"), DIRECTIONS)
def test_a_padded_batch_is_the_oracle_of_each_row(n, branch, causal, linear_norm):
    c = 4
    *tensors, table = draw(3, n, c, branch)
    mask = torch.arange(n) >= torch.tensor([n, max(1, n - 2), 0]).unsqueeze(1)
    inputs = inputs_of(tensors, square(table, c), lengths_of(mask))
    ours, state = ops.mixed_chunk_attention(inputs, ops.Options(c, causal, linear_norm))
    assert state is None
    assert torch.isfinite(ours).all()
    want = expected(tensors, table, mask, c, branch, causal=causal, linear_norm=linear_norm)
    assert error(ours, want, mask) <= TOLERANCE


@pytest.mark.parametrize("branch", BRANCHES)
@settings(deadline=None, max_examples=25)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ragged=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    c=st.integers(1, 6),
    linear_norm=st.sampled_from(NORMS),
)
def test_pieces_of_any_size_with_any_padding_give_the_whole(branch, pieces, ragged, c, linear_norm):
    """Every piece may end in padding, another amount in each row, as ragged prompts do."""
    *tensors, table = draw(2, sum(pieces), c, branch)
    mask = torch.zeros(2, sum(pieces), dtype=torch.bool)
    ends = list(itertools.accumulate(pieces))
    for piece, end, padding in zip(pieces, ends, ragged, strict=False):
        mask[1, end - min(padding, piece) : end] = True
    state = empty_state(tensors, c)
    outs = []
    for piece, end in zip(pieces, ends, strict=True):
        cut = slice(end - piece, end)
        lengths = lengths_of(mask[:, cut]) if mask[:, cut].any() else None
        inputs = inputs_of([None if x is None else x[:, cut] for x in tensors], square(table, c), lengths)
        out, state = ops.mixed_chunk_attention(inputs, ops.Options(c, True, linear_norm), state=state)
        outs.append(out)
    # The oracle sees the row without its padding.
    order = mask.long().argsort(dim=1, stable=True).unsqueeze(-1)
    moved = [None if x is None else x.gather(1, order.expand_as(x)) for x in tensors]
    ours = torch.cat(outs, dim=1)
    ours = ours.gather(1, order.expand_as(ours))
    mask = mask.sort(dim=1, stable=True).values
    want = expected(moved, table, mask, c, branch, causal=True, linear_norm=linear_norm)
    assert error(ours, want, mask) <= TOLERANCE
    assert state.position.tolist() == (~mask).sum(1).tolist()


@pytest.mark.parametrize("grad", [False, True], ids=["in place", "under autograd"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("linear_norm", NORMS)
def test_token_by_token_gives_the_whole_at_constant_size(grad, branch, linear_norm):
    c, n = 3, 11
    *tensors, table = draw(2, n, c, branch)
    state = empty_state(tensors, c)
    sizes = [None if x is None else x.shape for x in state]
    outs = []
    with torch.set_grad_enabled(grad):
        for t in range(n):
            bias = None if table is None else square(table, c)[t % c].expand(2, 1, c)
            inputs = inputs_of([None if x is None else x[:, t : t + 1] for x in tensors], bias)
            out, state = ops.mixed_chunk_step(inputs, ops.Options(c, True, linear_norm), state)
            outs.append(out)
            assert [None if x is None else x.shape for x in state] == sizes
    mask = torch.zeros(2, n, dtype=torch.bool)
    want = expected(tensors, table, mask, c, branch, causal=True, linear_norm=linear_norm)
    assert error(torch.cat(outs, dim=1), want, mask) <= TOLERANCE


@pytest.mark.parametrize("linear_norm", NORMS)
def test_stepping_under_autograd_leaves_the_state_that_came_in(linear_norm):
    c = 3
    *tensors, table = draw(1, 1, c, "both")
    state = ops.ChunkState.empty(tensors[4], c, S, E)
    state.kv_sum.fill_(1)
    before = state.map(torch.clone)
    inputs = inputs_of(tensors, square(table, c)[:1].expand(1, 1, c))
    ops.mixed_chunk_step(inputs, ops.Options(c, True, linear_norm), state)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(state, before, strict=True))


@torch.no_grad()
def test_a_fading_mean_goes_on_over_many_chunks_in_steps_and_in_pieces():
    """Beyond a block of chunks, whose weights are one matrix, and of groups of several columns."""
    c, n, e = 2, 2 * 2 * 64 + 7, 32
    quad, lin = (ops.Pair(*torch.randn(2, 1, n, S)) for _ in range(2))
    v, options = torch.randn(1, n, e), ops.Options(c, True, "fading")
    bias = torch.zeros(c, c)
    whole, _ = ops.mixed_chunk_attention(ops.Inputs(quad, lin, v, bias), options)
    zero = [torch.zeros(n, S)] * 2
    branch = dict(causal=True, chunk_size=c, branch="global", linear_norm="fading")
    want = oracle.mixed_chunk_attention(*zero, *(x[0] for x in lin), v[0], None, **branch)
    near, _ = ops.mixed_chunk_attention(ops.Inputs(quad, None, v, bias), options)
    assert ((whole - near)[0] - want).abs().max() <= TOLERANCE * whole.abs().max()
    for piece in (1, 3, 150):
        state, outs = ops.ChunkState.empty(v, c, S, e), []
        for start in range(0, n, piece):
            cut = slice(start, start + piece)
            pairs = (ops.Pair(*(x[:, cut] for x in pair)) for pair in (quad, lin))
            inputs = ops.Inputs(*pairs, v[:, cut], bias)
            if piece == 1:
                out, state = ops.mixed_chunk_step(inputs._replace(bias=torch.zeros(1, 1, c)), options, state)
            else:
                out, state = ops.mixed_chunk_attention(inputs, options, state=state)
            outs.append(out)
        assert (torch.cat(outs, dim=1) - whole).abs().max() <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("causal", "linear_norm"), DIRECTIONS)
def test_gradients_pass_gradcheck(branch, causal, linear_norm):
    c, n = 3, 7
    *tensors, table = draw(2, n, c, branch)
    mask = torch.arange(n) >= torch.tensor([n, n - 2]).unsqueeze(1)
    present = [x for x in (*tensors, table) if x is not None]

    def function(*inputs):
        given = iter(inputs)
        *given, t = (None if x is None else next(given) for x in (*tensors, table))
        given = inputs_of(given, square(t, c), lengths_of(mask))
        out, _ = ops.mixed_chunk_attention(given, ops.Options(c, causal, linear_norm))
        return out.masked_fill(mask.unsqueeze(-1), 0)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in present])


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("linear_norm", NORMS[1:])
def test_changing_the_future_leaves_the_past_bit_equal(branch, linear_norm):
    c, n = 4, 13
    *tensors, table = draw(2, n, c, branch)
    for cut in range(1, n):
        changed = [None if x is None else x.clone() for x in tensors]
        for x in changed:
            if x is not None:
                x[:, cut:] = 100 * torch.randn_like(x[:, cut:])
        outs = [
            ops.mixed_chunk_attention(inputs_of(ts, square(table, c)), ops.Options(c, True, linear_norm))[0]
            for ts in (tensors, changed)
        ]
        assert torch.equal(*(out[:, :cut] for out in outs))


def test_one_chunk_that_holds_the_row_is_the_quadratic_branch():
    n = 7
    *tensors, table = draw(2, n, n, "both")
    for causal in (True, False):
        inputs = inputs_of([*tensors[:2], None, None, tensors[4]], square(table, n))
        ours, _ = ops.mixed_chunk_attention(inputs, ops.Options(n, causal))
        quadratic = ops.quadratic_attention(
            *(x.unsqueeze(1) for x in (*tensors[:2], tensors[4])),
            square(table, n),
            causal=causal,
            denominator=n,
        )
        assert torch.equal(ours, quadratic.squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 64.0], ids=["ordinary", "squares overflow float16"])
@pytest.mark.parametrize("linear_norm", NORMS[1:])
def test_half_precision_stays_near_float64(dtype, magnitude, linear_norm):
    c, n = 8, 29
    *tensors, table = draw(2, n, c, "both")
    tensors = [magnitude * x if i < 4 else x / magnitude**2 for i, x in enumerate(tensors)]
    halves = [x.to(dtype) for x in tensors]
    assert magnitude == 1 or (tensors[0] @ tensors[1].mT).abs().max() / c > 256
    options, bias = ops.Options(c, True, linear_norm), square(table, c).to(dtype)
    ours, _ = ops.mixed_chunk_attention(inputs_of(halves, bias), options)
    doubles = inputs_of([x.double() for x in halves], bias.double())
    exact, _ = ops.mixed_chunk_attention(doubles, options)
    assert ours.dtype == dtype
    relative = (ours.double() - exact).norm() / exact.norm()
    assert relative <= 4 * torch.finfo(dtype).eps  # measured: 0.3 eps float16, 1.3 eps bfloat16


def test_the_state_is_float32_for_half_precision_and_wider_for_wider():
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        state = ops.ChunkState.empty(torch.zeros(1, 1, dtype=dtype), 2, S, E)
        assert (state.kv_sum.dtype, state.v.dtype) == (wide, dtype)


def test_autocast_does_not_narrow_the_products():
    c, n = 4, 9
    *tensors, table = (None if x is None else x.float() for x in draw(1, n, c, "both"))
    inputs, options = inputs_of(tensors, square(table, c)), ops.Options(c, True)
    plain, _ = ops.mixed_chunk_attention(inputs, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = ops.mixed_chunk_attention(inputs, options)
    assert torch.equal(plain, cast)


def test_bad_arguments_are_refused_by_name():
    *tensors, table = draw(1, 3, 2, "both")
    state = ops.ChunkState.empty(tensors[4], 2, S, E)
    inputs = inputs_of(tensors, square(table, 2))
    with pytest.raises(ValueError, match="state is given with causal=False"):
        ops.mixed_chunk_attention(inputs, ops.Options(2, False), state=state)
    carry = ops.Carry(state.kv_sum, state.position)
    with pytest.raises(ValueError, match="state and carry are both given"):
        ops.mixed_chunk_attention(inputs, ops.Options(2, True), state=state, carry=carry)
    with pytest.raises(ValueError, match="one branch is needed"):
        ops.mixed_chunk_attention(ops.Inputs(None, None, tensors[4]), ops.Options(2, True))
    with pytest.raises(ValueError, match="softmax=True with causal=False"):
        ops.mixed_chunk_attention(inputs, ops.Options(2, False, softmax=True))
    with pytest.raises(ValueError, match="linear_norm='none' is unknown; allowed: chunk, mean, fading"):
        ops.mixed_chunk_attention(inputs, ops.Options(2, True, "none"))
    with pytest.raises(ValueError, match="linear_norm='fading' with causal=False is not allowed; allowed: c"):
        ops.mixed_chunk_attention(inputs, ops.Options(2, False, "fading"))
