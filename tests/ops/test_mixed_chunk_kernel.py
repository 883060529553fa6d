"""Proves that the Triton kernels are the reference: equal in whole numbers, as exact as it in each dtype.

On a machine without a GPU they run in Triton's interpreter, in a process of its own: a kernel is either
interpreted or compiled for as long as a process lives.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fairseq_flash import ops
from fairseq_flash.ops import dispatch
from fairseq_flash.ops.mixed_chunk import exact, gated

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from support import interpreted

    interpreted.mend()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BOTH = ("quad", "lin")
BRANCHES = {"mixed": BOTH, "local": ("quad",), "global": ("lin",)}
#: Chunk size, attention_dim, tokens: each shipped tile, over more than one chunk and in less than one.
SIZES = [(64, 64, 150), (128, 128, 200), (256, 64, 70), (512, 128, 90)]

run_here = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, not interpreted"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
all_branches = pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
either_way_to_sum = pytest.mark.parametrize(
    "serial", [1, 10**9], ids=["a row a program", "a chunk a program"]
)


@pytest.fixture
def kernel():
    from fairseq_flash.ops.mixed_chunk import kernel

    return kernel


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests below run in this process")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def projected_rows(options, b, n, e):
    """Random rows in float32, all of them valid."""
    projected, _, _ = random_inputs(options, (b, n, e, 64), torch.float32)
    return ops.Projected(*(x if x is None else x.to(DEVICE, torch.float32) for x in projected[:6]))


@run_here
@each_dtype
@both_directions
@pytest.mark.parametrize(("c", "s", "n"), SIZES)
def test_whole_numbers_come_out_equal(kernel, c, s, n, causal, dtype):
    options = ops.Options(c, causal, "chunk")
    inputs = exact.draw(options, (2, n, 24, s), padded=True)
    assert exact.mistakes(kernel.run, options, inputs, dtype, DEVICE) == []


@run_here
@both_directions
@all_branches
@either_way_to_sum
@pytest.mark.parametrize("keyed", [False, True], ids=["", "keys"])
def test_every_branch_and_either_way_to_sum_with_a_carry(
    kernel, monkeypatch, branches, causal, serial, keyed
):
    monkeypatch.setattr(kernel, "SERIAL_PROGRAMS", serial)
    options = ops.Options(64, causal, "chunk", branches=branches)
    inputs = exact.draw(options, (2, 150, 72, 64), carried="lin" in branches, keyed=keyed)
    assert exact.mistakes(kernel.run, options, inputs, torch.bfloat16, DEVICE) == []


@run_here
@each_dtype
@pytest.mark.parametrize(("c", "s", "n", "e"), [(64, 64, 1, 7), (128, 128, 300, 40), (512, 64, 70, 24)])
def test_keys_of_another_base_in_whole_numbers(kernel, c, s, n, e, dtype):
    options = ops.Options(c, True, "chunk")
    inputs = exact.draw(options, (2, n, e, s), padded=True, keyed=True)
    assert exact.mistakes(kernel.run, options, inputs, dtype, DEVICE) == []


@run_here
@either_way_to_sum
@pytest.mark.parametrize("carried", [False, True], ids=["", "carry"])
@pytest.mark.parametrize(
    ("c", "s", "n", "e", "dtype"),
    [
        (64, 64, 150, 40, torch.bfloat16),
        (64, 64, 140, 30, torch.float16),
        (64, 64, 300, 7, torch.float32),
        (128, 128, 130, 24, torch.bfloat16),
    ],
)
def test_a_fading_mean_of_whole_numbers(kernel, monkeypatch, serial, carried, c, s, n, e, dtype):
    monkeypatch.setattr(kernel, "SERIAL_PROGRAMS", serial)
    options = ops.Options(c, True, "fading")
    inputs = exact.draw(options, (2, n, e, s), padded=True, carried=carried, keyed=carried)
    assert exact.mistakes(kernel.run, options, inputs, dtype, DEVICE) == []


@pytest.mark.parametrize("name", ["out", "uvz", "gamma", "bias", "kv_sum", "keys"])
def test_whole_numbers_depend_on_all_there_is(name):
    """On the factor that a sum keeps, and on a chunk's own base of keys, in every result that may."""
    options = ops.Options(64, True, "fading")
    inputs = exact.draw(options, (2, 150, 72, 64), carried=True, keyed=True)

    def otherwise(projected, options, carry):
        """What forgets nothing, from one base."""
        return gated.run(projected._replace(keys=None), options._replace(linear_norm="mean"), carry) + (
            0 * projected.keys.sum()
        )

    assert name in exact.mistakes(otherwise, options, inputs, torch.float32, torch.device("cpu"))


def random_inputs(options, sizes, dtype, *, carried=False, keyed=False):
    (b, n, e, s), h, m = sizes, 2 * len(options.branches), min(options.chunk_size, sizes[1])
    cos, sin = ops.rotary_angles(torch.arange(n), s, torch.float64)
    lengths = torch.tensor([n] * (b - 1) + [max(1, n - 20)])
    bias = torch.randn(m, m) / 2 if "quad" in options.branches else None
    keys = torch.randn(b, n, s) if keyed else None
    rounded = [
        x if x is None else x.to(dtype).double()
        for x in (torch.randn(b, n, 2 * e + s), torch.randn(h, s), torch.randn(h, s), bias, keys)
    ]
    projected = ops.Projected(*rounded[:3], cos.float(), sin.float(), rounded[3], lengths, rounded[4])
    # Of few chunks, and of so many that the weights of all that fades have nothing more to add.
    counts = options.chunk_size * torch.tensor([3, 5000])[:b]
    divisor = ops.linear_denominator(options.linear_norm, options.chunk_size, counts, e, torch.float64)
    kv_sum = (torch.randn(b, s, e) * divisor[:, None]).float().double()
    carry = ops.Carry(kv_sum, counts) if carried else None
    return projected, carry, torch.randn(b, n, e).to(dtype).double()


def errors(kernel, options, inputs, dtype):
    """By result, those of the kernels and of the reference in this dtype, and the size of the numbers."""
    want = exact.results(gated.run, options, inputs, torch.float64, DEVICE)
    both = [exact.results(run, options, inputs, dtype, DEVICE) for run in (kernel.run, gated.run)]
    assert all(x.isfinite().all() for x in both[1].values())

    def size(x):
        return x.square().mean().sqrt()

    return {
        name: (*(size(x[name].double() - exactly) for x in both), size(exactly))
        for name, exactly in want.items()
    }


@run_here
@each_dtype
@both_directions
@pytest.mark.parametrize(("n", "e"), [(150, 24), (1, 7)])
def test_errors_are_at_most_twice_the_reference_s(kernel, n, e, causal, dtype):
    """Both against float64; measured: 0.6 to 1.3 times."""
    options = ops.Options(64, causal, "mean")
    inputs = random_inputs(options, (2, n, e, 64), dtype)
    for name, (ours, theirs, size) in errors(kernel, options, inputs, dtype).items():
        # Of one token, the reference's numbers may happen to be exact.
        few = 1 / 8 if n > 1 else 4
        assert ours <= 2 * theirs + few * torch.finfo(dtype).eps * size, name


@run_here
@each_dtype
@either_way_to_sum
@pytest.mark.parametrize(("n", "e", "branches"), [(150, 24, BOTH), (300, 16, ("lin",)), (1, 7, BOTH)])
def test_of_fading_means_and_keys_too(kernel, monkeypatch, n, e, branches, serial, dtype):
    """Both against float64; measured: 0.6 to 1.2 times, of one token 0.4 to 2.4."""
    monkeypatch.setattr(kernel, "SERIAL_PROGRAMS", serial)
    options = ops.Options(64, True, "fading", branches=branches)
    inputs = random_inputs(options, (2, n, e, 64), dtype, carried=n != 150, keyed=n > 1)
    for name, (ours, theirs, size) in errors(kernel, options, inputs, dtype).items():
        few = 1 / 8 if n > 1 else 4
        assert ours <= 2 * theirs + few * torch.finfo(dtype).eps * size, name


@run_here
@pytest.mark.parametrize("norm", ["mean", "fading"])
def test_two_segments_are_the_whole_row_once_the_carry_goes_along(kernel, norm):
    options = ops.Options(64, True, norm)
    whole = projected_rows(options, 2, 150, 24)
    whole = whole._replace(keys=torch.randn(2, 150, 64, device=DEVICE).float())
    parts = [
        whole._replace(
            uvz=whole.uvz[:, part], keys=whole.keys[:, part], cos=whole.cos[part], sin=whole.sin[part]
        )
        for part in (slice(0, 128), slice(128, 150))
    ]
    parts[1] = parts[1]._replace(bias=whole.bias[:22, :22])
    carry = ops.Carry(gated._summary(parts[0], options), torch.full((2,), 128, device=DEVICE))
    found = [kernel.run(part, options, seen) for part, seen in zip(parts, (None, carry), strict=True)]
    expected = kernel.run(whole, options, None)
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@run_here
@pytest.mark.parametrize("norm", ["mean", "fading"])
def test_the_operator_is_sound_and_lives_in_a_compiled_graph(kernel, norm):
    options = ops.Options(64, True, norm)
    projected = projected_rows(options, 2, 70, 8)
    projected.uvz.requires_grad_()
    if norm == "fading":
        projected = projected._replace(keys=torch.randn(2, 70, 64, device=DEVICE).float().requires_grad_())
    torch.library.opcheck(kernel._gated, kernel._arguments(projected, options, None))
    leaves = [x for x in (projected.uvz, projected.keys) if x is not None]

    def loss(projected):
        return ops.gated_mixed_chunk(projected, options, backend="triton").sum()

    dispatch.check_backend("triton")  # as a layer does when it is built: a compiler cannot import
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, want = (torch.autograd.grad(f(projected), leaves) for f in (compiled, loss))
    assert all(map(torch.equal, found, want))


@run_here
def test_a_second_gradient_is_refused_and_not_left_out(kernel):
    options = ops.Options(64, True)
    projected = projected_rows(options, 1, 70, 8)
    projected.uvz.requires_grad_()
    out = kernel.run(projected, options, None)
    (grad,) = torch.autograd.grad(out.square().sum(), projected.uvz, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@run_here
def test_a_card_is_tried_out_while_somebody_evaluates(kernel):
    options = ops.Options(64, True, "chunk")
    with torch.inference_mode():
        inputs = exact.draw(options, (2, 134, 72, 64), padded=True)
        assert exact.mistakes(kernel.run, options, inputs, torch.bfloat16, DEVICE) == []


@run_here
def test_auto_takes_the_kernels_where_they_can_run(kernel):
    options = ops.Options(64, True)
    assert dispatch.choose("auto", projected_rows(options, 2, 70, 8), options) is kernel.run


@run_here
def test_rows_of_no_tokens_give_an_empty_result(kernel):
    options = ops.Options(64, True)
    projected, _, _ = random_inputs(options, (2, 1, 8, 64), torch.float32)
    assert kernel.run(projected._replace(uvz=projected.uvz[:, :0]), options, None).shape == (2, 0, 8)


def test_what_the_kernels_do_not_take_is_named():
    from fairseq_flash.ops.mixed_chunk import kernel

    options = ops.Options(100, True, softmax=True)
    projected = ops.Projected(
        torch.zeros(1, 3, 2 * 8 + 96), *torch.zeros(2, 4, 96), *torch.zeros(2, 3, 48), torch.zeros(3, 3)
    )
    found = "; ".join(kernel.objections(projected, options))
    for part in ("float64", "attention_dim is 96", "chunk_size is 100", "softmax"):
        assert part in found
    assert INTERPRETED or "cpu, not on a CUDA device" in found


@pytest.mark.parametrize("norm", ["mean", "fading"])
@pytest.mark.parametrize("keyed", [False, True], ids=["", "keys"])
def test_a_card_that_computes_wrongly_is_named_in_a_warning_and_left_out(monkeypatch, keyed, norm):
    from fairseq_flash.ops.mixed_chunk import kernel

    tried = []

    def mistakes(run, options, inputs, dtype, device):
        projected, carry, _ = inputs
        tried.append((options, len(projected.uvz), projected.keys is not None, carry is not None))
        assert projected.uvz.shape[1] > options.chunk_size
        assert projected.gamma.shape == (4, 128)
        return ["out"] if len(projected.uvz) > 2 else []

    monkeypatch.setattr(kernel, "mistakes", mistakes)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    kernel._failures.cache_clear()
    fading = norm == "fading"
    with pytest.warns(UserWarning, match=r"Triton 3\S+ on a card computes out wrongly in torch.bfloat16"):
        assert len(kernel._failures(0, torch.bfloat16, 128, 64, True, BOTH, keyed, fading)) == 1
    options = ops.Options(64, True, "fading" if fading else "chunk")
    carried = [False, True] if fading else [False]
    assert tried == [(options, b, keyed, some) for b in (2, 64) for some in carried]
    assert 64 * 2 >= kernel.SERIAL_PROGRAMS > 2 * 2, "the rows make few programs, and many"
    kernel._failures.cache_clear()


def test_what_is_tried_out_is_what_is_to_be_used(monkeypatch):
    from fairseq_flash.ops.mixed_chunk import kernel

    tried = []
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(kernel, "_tried", lambda *configuration: tried.append(configuration) or [])
    uvz = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    for branches, keys in ((BOTH, None), (BOTH, uvz), (("quad",), None)):
        gamma = torch.zeros(2 * len(branches), 64)
        projected = ops.Projected(uvz, gamma, gamma, None, None, None, keys=keys)
        for norm in ("mean", "fading"):
            assert kernel.objections(projected, ops.Options(64, True, norm, branches=branches)) == []
    assert [configuration[5:] for configuration in tried] == [
        *((BOTH, False, False), (BOTH, False, True), (BOTH, True, False), (BOTH, True, True)),
        *((("quad",), False, False), (("quad",), False, False)),
    ]


def test_a_card_that_cannot_run_them_is_named_in_a_warning_and_left_out(monkeypatch):
    from fairseq_flash.ops.mixed_chunk import kernel

    def mistakes(*args, **rest):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernel, "mistakes", mistakes)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a small card")
    kernel._failures.cache_clear()
    with pytest.warns(UserWarning, match="a small card fails with RuntimeError: out of resource"):
        assert len(kernel._failures(0, torch.bfloat16, 128, 64, False, BOTH, False, False)) == 1
    kernel._failures.cache_clear()


def test_what_is_wrong_is_found():
    def wrong(projected, options, carry):
        return gated.run(projected, options, carry) + 1

    options = ops.Options(64, True, "chunk")
    inputs = exact.draw(options, (2, 134, 72, 64), padded=True)
    assert "out" in exact.mistakes(wrong, options, inputs, torch.bfloat16, torch.device("cpu"))
