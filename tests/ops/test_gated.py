"""Proves the op of a unit: from pre-activations it is the oracle's parts, one after the other."""

import pytest
import torch

from fairseq_flash import ops
from fairseq_flash.ops import dispatch
from fairseq_flash.ops.mixed_chunk import recomputed
from support import oracle

TOLERANCE = 256 * torch.finfo(torch.float64).eps  # relative; measured: 10 eps
S, E, C = 4, 6, 4
BRANCHES = {"mixed": ("quad", "lin"), "local": ("quad",), "global": ("lin",)}
#: Those whose keys have a base of their own.
SHIFTED = {"shifted": "mixed", "shifted_local": "local", "shifted_global": "global"}
BRANCHES |= {name: BRANCHES[kind] for name, kind in SHIFTED.items()}
every_kind = pytest.mark.parametrize("kind", BRANCHES)
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
#: Whether causal, and the norm.
MEANS = {"causal": (True, "mean"), "bidirectional": (False, "mean"), "fading": (True, "fading")}
every_mean = pytest.mark.parametrize(("causal", "linear_norm"), MEANS.values(), ids=MEANS)
CHUNKS = {"causal-chunk": (True, "chunk"), "bidirectional-chunk": (False, "chunk")}


def draw(kind, b, n, lengths=None):
    copies = 2 * len(BRANCHES[kind])
    angles = ops.rotary_angles(torch.arange(n), S, torch.float64)
    c = min(C, n)
    bias = torch.randn(c, c) if "quad" in BRANCHES[kind] else None
    keys = torch.randn(b, n, S) if kind in SHIFTED else None
    uvz, gamma, beta = torch.randn(b, n, 2 * E + S), torch.randn(copies, S), torch.randn(copies, S)
    return ops.Projected(uvz, gamma, beta, *angles, bias, lengths, keys)


def runs_here(name):
    """Whether an implementation takes these on a CPU; the kernels are proven in test_mixed_chunk_kernel."""
    if name == "auto":
        return True
    module = dispatch._module(dispatch.IMPLEMENTATIONS[name])
    return not isinstance(module, list) and not module.objections(draw("mixed", 1, C), options_of("mixed"))


def options_of(kind, causal=True, linear_norm="mean"):
    return ops.Options(C, causal, linear_norm, branches=BRANCHES[kind])


#: A new implementation is proven by being listed.
each_backend = pytest.mark.parametrize("backend", [name for name in ops.BACKENDS if runs_here(name)])


def run(projected, options, backend, carry=None):
    return ops.gated_mixed_chunk(projected, options, carry=carry, backend=backend)


def expected(projected, options, row, n):
    """The oracle of the first ``n`` tokens of a row."""
    u, v, z = torch.nn.functional.silu(projected.uvz[row, :n]).split([E, E, S], dim=-1)
    keys = z if projected.keys is None else torch.nn.functional.silu(projected.keys[row, :n])
    copies = [
        torch.stack([oracle.rotary(gamma * z_i + beta, i) for i, z_i in enumerate(keys if h % 2 else z)])
        for h, (gamma, beta) in enumerate(zip(projected.gamma, projected.beta, strict=True))
    ]
    given = dict(zip(options.branches, (copies[:2], copies[2:]), strict=False))
    pairs = [*given.get("quad", (None, None)), *given.get("lin", (None, None))]
    bias = None if projected.bias is None else lambda i, j: projected.bias[i % C, j % C]
    branch = {("quad", "lin"): "both", ("quad",): "local", ("lin",): "global"}[options.branches]
    rest = dict(chunk_size=C, branch=branch, causal=options.causal, linear_norm=options.linear_norm)
    return u * oracle.mixed_chunk_attention(*pairs, v, bias, **rest)


@each_backend
@every_kind
@pytest.mark.parametrize(
    ("causal", "linear_norm"), [*MEANS.values(), *CHUNKS.values()], ids=[*MEANS, *CHUNKS]
)
@pytest.mark.parametrize("n", [1, 3, 4, 7, 8, 13])
def test_a_padded_batch_is_the_oracle_of_each_row(backend, kind, causal, linear_norm, n):
    lengths = torch.tensor([n, max(1, n - 2), 0])
    projected, options = draw(kind, 3, n, lengths), options_of(kind, causal, linear_norm)
    ours = run(projected, options, backend)
    assert ours.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        want = expected(projected, options, row, length) if length else torch.zeros(0, E)
        scale = want.abs().max().clamp(min=1) if length else 1
        assert ((ours[row, :length] - want).abs() <= TOLERANCE * scale).all()


@each_backend
@every_kind
@every_mean
def test_lengths_that_leave_nothing_out_change_no_bit(backend, kind, causal, linear_norm):
    projected, options = draw(kind, 2, 11), options_of(kind, causal, linear_norm)
    full = projected._replace(lengths=torch.tensor([11, 11]))
    assert torch.equal(run(full, options, backend), run(projected, options, backend))


@each_backend
@every_kind
@every_mean
def test_a_row_in_two_segments_is_the_whole_row_once_the_carry_goes_along(backend, kind, causal, linear_norm):
    """Each segment is carried what the linear branch sees of the other one."""
    n, cut = 13, 8
    projected, options = draw(kind, 2, n), options_of(kind, causal, linear_norm)
    whole = run(projected, options, backend)
    segments = [
        projected._replace(
            uvz=projected.uvz[:, part],
            cos=projected.cos[part],
            sin=projected.sin[part],
            keys=None if projected.keys is None else projected.keys[:, part],
        )
        for part in (slice(0, cut), slice(cut, n))
    ]
    carries = [carry_of(segment, options) for segment in segments]
    seen = [None if causal else carries[1], carries[0]]
    found = [run(segment, options, backend, carry) for segment, carry in zip(segments, seen, strict=True)]
    assert (torch.cat(found, dim=1) - whole).abs().max() <= TOLERANCE * whole.abs().max()


def carry_of(projected, options):
    """The linear branch's sum over all tokens, as the next chunk sees it."""
    b, n, _ = projected.uvz.shape
    _, v, z = ops.split_silu(projected.uvz, [E, E, S])
    if "lin" not in options.branches:
        return None
    keys = None if projected.keys is None else torch.nn.functional.silu(projected.keys)
    k_lin = ops.rotated_copies(z, *projected[1:5], keys)[-1]
    if options.linear_norm == "fading":
        chunks_between = (n - 1) // C - torch.arange(n) // C
        v = v * 0.5 ** (chunks_between.unsqueeze(1) / oracle.fading_half_lives(E))
    return ops.Carry(torch.einsum("bns,bne->bse", k_lin, v), torch.full((b,), n))


@each_backend
@every_kind
@every_mean
@pytest.mark.parametrize("n", [7, 14])
def test_gradients_pass_gradcheck(backend, kind, causal, linear_norm, n):
    projected = draw(kind, 2, n, torch.tensor([n, n - 2]))
    options = options_of(kind, causal, linear_norm)
    real = (torch.arange(n) < projected.lengths.unsqueeze(1)).unsqueeze(-1)
    names = [
        name for name in ("uvz", "gamma", "beta", "bias", "keys") if getattr(projected, name) is not None
    ]

    def function(*tensors):
        given = projected._replace(**dict(zip(names, tensors, strict=True)))
        return run(given, options, backend) * real

    tensors = [getattr(projected, name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=n > 7)


@each_backend
@every_kind
@both_directions
def test_rows_of_no_tokens_give_an_empty_result(backend, kind, causal):
    projected, options = draw(kind, 2, 1), options_of(kind, causal)
    empty = projected._replace(uvz=projected.uvz[:, :0], cos=projected.cos[:0], sin=projected.sin[:0])
    empty = empty._replace(keys=None if empty.keys is None else empty.keys[:, :0])
    assert run(empty, options, backend).shape == (2, 0, E)
    none = torch.zeros(2, 0, S)
    pairs = [ops.Pair(none, none) if name in options.branches else None for name in ("quad", "lin")]
    inputs = ops.Inputs(*pairs, torch.zeros(2, 0, E), projected.bias)
    assert ops.mixed_chunk_attention(inputs, options)[0].shape == (2, 0, E)


def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"gamma has shape \(2, 4\).*allowed for branches quad, lin: \(4, s\)"
    ):
        ops.gated_mixed_chunk(draw("local", 1, 3), options_of("mixed"))


@each_backend
@every_mean
def test_what_is_carried_in_has_the_reference_s_gradient(backend, causal, linear_norm):
    projected, options = draw("mixed", 2, 11, torch.tensor([11, 6])), options_of("mixed", causal, linear_norm)
    real = (torch.arange(11) < projected.lengths.unsqueeze(1)).unsqueeze(-1)
    kv_sum = torch.randn(2, S, E).requires_grad_()
    carry, d_out = ops.Carry(kv_sum, torch.tensor([4, 8])), torch.randn(2, 11, E) * real
    found, want = (
        torch.autograd.grad(run(projected, options, name, carry), kv_sum, d_out)[0]
        for name in (backend, "reference")
    )
    assert (found - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_leaving_out_blocks_above_the_diagonal_changes_nothing(monkeypatch, block):
    monkeypatch.setattr(recomputed, "BLOCK", block)
    projected, options = draw("mixed", 2, 11), options_of("mixed")
    inputs = [x.requires_grad_() for x in (*projected[:3], projected.bias)]
    d_out = torch.randn(2, 11, E)
    for found, want in zip(
        *(
            torch.autograd.grad(run(projected, options, name), inputs, d_out)
            for name in ("recomputed", "reference")
        ),
        strict=True,
    ):
        assert (found - want).abs().max() <= TOLERANCE * want.abs().max()


@every_kind
def test_the_fast_path_keeps_as_many_bytes_as_it_says(kind):
    """3e + s + s e / c numbers a token, without the linear branch 3e + s; the reference keeps far more.

    Keys with a base of their own are s more."""
    n = 16 * C
    projected, options = draw(kind, 2, n), options_of(kind, linear_norm="fading")
    projected.uvz.requires_grad_()
    stated = 3 * E + S + (S * E / C if "lin" in options.branches else 0) + (S if kind in SHIFTED else 0)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(projected, options, "recomputed")
    small = sum(x.nbytes for x in projected[1:-1] if x is not None)
    assert sum(kept.values()) <= 8 * 2 * n * stated + small
