"""Proves that the Triton kernels are the reference: equal in whole numbers, as exact as it in each dtype.

On a machine without a GPU they run in Triton's interpreter, in a process of its own: a kernel is either
interpreted or compiled for as long as a process lives.
"""

import os
import subprocess
import sys

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
#: Chunk size, attention_dim, tokens: each shipped tile, over more than one chunk and in less than one.
SIZES = [(64, 64, 150), (128, 128, 200), (256, 64, 70), (512, 128, 90)]

run_here = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, not interpreted"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


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
    projected, _, _ = random_inputs(options, b, n, e, 64, torch.float32)
    return ops.Projected(*(x if x is None else x.to(DEVICE, torch.float32) for x in projected[:6]))


def equal(kernel, options, inputs, dtype):
    ours = exact.results(kernel.run, options, inputs, dtype, DEVICE)
    want = exact.results(gated.run, options, inputs, torch.float64, torch.device("cpu"))
    return [name for name, x in ours.items() if not torch.equal(x.cpu(), want[name].to(x.dtype))] == []


@run_here
@each_dtype
@both_directions
@pytest.mark.parametrize(("c", "s", "n"), SIZES)
def test_whole_numbers_come_out_equal(kernel, c, s, n, causal, dtype):
    options = ops.Options(c, causal, "chunk")
    assert equal(kernel, options, exact.draw(options, (2, n, 24, s), padded=True), dtype)


@run_here
@both_directions
@pytest.mark.parametrize("branches", [BOTH, ("quad",), ("lin",)], ids=["mixed", "local", "global"])
@pytest.mark.parametrize("serial", [1, 10**9], ids=["a row a program", "a chunk a program"])
def test_every_branch_and_either_way_to_sum_with_a_carry(kernel, monkeypatch, branches, causal, serial):
    monkeypatch.setattr(kernel, "SERIAL_PROGRAMS", serial)
    options = ops.Options(64, causal, "chunk", branches=branches)
    inputs = exact.draw(options, (2, 150, 72, 64), carried="lin" in branches)
    assert equal(kernel, options, inputs, torch.bfloat16)


def random_inputs(options, b, n, e, s, dtype):
    h, m = 2 * len(options.branches), min(options.chunk_size, n)
    cos, sin = ops.rotary_angles(torch.arange(n), s, torch.float64)
    lengths = torch.tensor([n] * (b - 1) + [max(1, n - 20)])
    bias = torch.randn(m, m) / 2 if "quad" in options.branches else None
    rounded = [
        x if x is None else x.to(dtype).double()
        for x in (torch.randn(b, n, 2 * e + s), torch.randn(h, s), torch.randn(h, s), bias)
    ]
    projected = ops.Projected(*rounded[:3], cos.float(), sin.float(), rounded[3], lengths)
    return projected, None, torch.randn(b, n, e).to(dtype).double()


@run_here
@each_dtype
@both_directions
@pytest.mark.parametrize(("n", "e"), [(150, 24), (1, 7)])
def test_errors_are_at_most_twice_the_reference_s(kernel, n, e, causal, dtype):
    """Both against float64; measured: 0.6 to 1.3 times."""
    options = ops.Options(64, causal, "mean")
    inputs = random_inputs(options, 2, n, e, 64, dtype)
    want = exact.results(gated.run, options, inputs, torch.float64, DEVICE)
    ours = exact.results(kernel.run, options, inputs, dtype, DEVICE)
    reference = exact.results(gated.run, options, inputs, dtype, DEVICE)
    for name, exactly in want.items():
        errors = [(x[name].double() - exactly).square().mean().sqrt() for x in (ours, reference)]
        # Of one token, the reference's numbers may happen to be exact.
        few = 1 / 8 if n > 1 else 4
        assert errors[0] <= 2 * errors[1] + few * torch.finfo(dtype).eps * exactly.square().mean().sqrt(), (
            name
        )


@run_here
def test_two_segments_are_the_whole_row_once_the_carry_goes_along(kernel):
    options = ops.Options(64, True, "mean")
    whole = projected_rows(options, 2, 150, 24)
    parts = [
        whole._replace(uvz=whole.uvz[:, part], cos=whole.cos[part], sin=whole.sin[part])
        for part in (slice(0, 128), slice(128, 150))
    ]
    parts[1] = parts[1]._replace(bias=whole.bias[:22, :22])
    first = kernel.run(parts[0], options, None)
    second = kernel.run(parts[1], options, kernel.next_carry(parts[0], options))
    expected = kernel.run(whole, options, None)
    assert (torch.cat((first, second), 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@run_here
def test_the_operator_is_sound_and_lives_in_a_compiled_graph(kernel):
    options = ops.Options(64, True)
    projected = projected_rows(options, 2, 70, 8)
    projected.uvz.requires_grad_()
    torch.library.opcheck(kernel._gated, kernel._arguments(projected, options, None))

    def loss(projected):
        return ops.gated_mixed_chunk(projected, options, backend="triton").sum()

    dispatch.check_backend("triton")  # as a layer does when it is built: a compiler cannot import
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, want = (torch.autograd.grad(f(projected), projected.uvz)[0] for f in (compiled, loss))
    assert torch.equal(found, want)


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
    with torch.inference_mode():
        assert exact.mistakes(kernel.run, ops.Options(64, True), 64, DEVICE, torch.bfloat16) == []


@run_here
def test_auto_takes_the_kernels_where_they_can_run(kernel):
    options = ops.Options(64, True)
    assert dispatch.choose("auto", projected_rows(options, 2, 70, 8), options) is kernel.run


@run_here
def test_rows_of_no_tokens_give_an_empty_result(kernel):
    options = ops.Options(64, True)
    projected, _, _ = random_inputs(options, 2, 1, 8, 64, torch.float32)
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


def test_a_card_that_computes_wrongly_is_named_in_a_warning_and_left_out(monkeypatch):
    from fairseq_flash.ops.mixed_chunk import kernel

    tried = []

    def mistakes(run, options, s, device, dtype, b):
        tried.append((options.chunk_size, options.causal, options.branches, s, b))
        return ["out"] if b > 2 else []

    monkeypatch.setattr(kernel, "mistakes", mistakes)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    kernel._failures.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton 3\S+ on a card computes out wrongly in torch.bfloat16"):
        assert len(kernel._failures(0, torch.bfloat16, 128, 256, False, BOTH)) == 1
    assert tried == [(256, False, BOTH, 128, 2), (256, False, BOTH, 128, 64)]
    assert 64 * 2 >= kernel.SERIAL_PROGRAMS > 2 * 2, "the rows make few programs, and many"
    kernel._failures.cache_clear()


def test_a_card_that_cannot_run_them_is_named_in_a_warning_and_left_out(monkeypatch):
    from fairseq_flash.ops.mixed_chunk import kernel

    def mistakes(*args, **rest):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernel, "mistakes", mistakes)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a small card")
    kernel._failures.cache_clear()
    with pytest.warns(UserWarning, match="a small card fails with RuntimeError: out of resource"):
        assert len(kernel._failures(0, torch.bfloat16, 128, 256, False, BOTH)) == 1
    kernel._failures.cache_clear()


def test_what_is_wrong_is_found():
    def wrong(projected, options, carry):
        return gated.run(projected, options, carry) + 1

    assert "out" in exact.mistakes(wrong, ops.Options(64, True), 64, torch.device("cpu"), torch.bfloat16)
