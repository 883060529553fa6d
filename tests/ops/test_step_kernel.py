"""Proves that a step in Triton is the reference's, output and state, on Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_flash import ops
from fairseq_flash.modules import RotaryBias
from fairseq_flash.ops import dispatch

pytest.importorskip("triton")

#: Relative, in float32; measured: 3e-6.
TOLERANCE = 64 * torch.finfo(torch.float32).eps
BRANCHES = {"mixed": ("quad", "lin"), "local": ("quad",), "global": ("lin",)}
B, E, S, C = 3, 40, 16, 16

if os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads the variable when it is imported, which other tests of this process may have done.
    def test_on_the_interpreter_in_a_process_of_its_own():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]

else:

    def projected_of(kind, b, position, dtype, *, keyed=False):
        copies = 2 * len(BRANCHES[kind])
        angles = ops.rotary_angles(position.unsqueeze(1), S)
        return ops.Projected(
            torch.randn(b, 1, 2 * E + S, dtype=dtype),
            torch.randn(copies, S, dtype=dtype),
            torch.randn(copies, S, dtype=dtype),
            *angles,
            None,
            keys=torch.randn(b, 1, S, dtype=dtype) if keyed else None,
        )

    def relative(found, expected):
        scale = expected.float().abs().max().clamp(min=1)
        return float((found.float() - expected.float()).abs().max() / scale)

    def module(name):
        return dispatch._module(dispatch.STEPS[name])

    @torch.no_grad()
    @pytest.mark.parametrize("keyed", [False, True], ids=["", "keys"])
    @pytest.mark.parametrize("linear_norm", ["mean", "chunk", "fading"])
    @pytest.mark.parametrize("kind", BRANCHES)
    def test_40_steps_from_unequal_positions_are_the_reference_s(kind, linear_norm, keyed):
        torch.set_default_dtype(torch.float32)
        options = ops.Options(C, True, linear_norm, branches=BRANCHES[kind])
        bias = RotaryBias(S)
        for vector in bias.parameters():
            vector.normal_()
        expected = ops.ChunkState.empty(torch.zeros(B, 0), C, S, E, options.branches)
        expected = expected._replace(position=torch.tensor([0, 5, C - 1]))
        found = expected.map(torch.clone)
        gamma, beta = torch.randn(2, 2 * len(options.branches), S)
        for _ in range(40):
            token = projected_of(kind, B, expected.position, torch.float32, keyed=keyed)
            token = token._replace(gamma=gamma, beta=beta)
            if "quad" in options.branches:
                # Not negative: a token could stay blind to itself in all 40.
                token = token._replace(bias=bias.by_distance(C).abs())
            want, expected = module("reference").run(token, options, expected)
            assert not module("triton").objections(token, options, found)
            out, found = module("triton").run(token, options, found)
            assert relative(out, want) <= TOLERANCE
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or relative(ours, theirs) <= TOLERANCE

    @torch.no_grad()
    @pytest.mark.parametrize("e", [7, 40, 96])
    @pytest.mark.parametrize("chunks", [1, 2, 70, 5000])
    def test_a_fading_mean_far_from_the_start_and_of_any_number_of_groups(chunks, e):
        torch.set_default_dtype(torch.float32)
        options = ops.Options(C, True, "fading", branches=("lin",))
        state = ops.ChunkState.empty(torch.zeros(B, 0), C, S, e, options.branches)
        position = C * chunks + torch.tensor([0, 1, C - 1])
        state = state.map(lambda x: torch.randn(x.shape))._replace(position=position)
        for _ in range(2):
            angles = ops.rotary_angles(state.position.unsqueeze(1), S)
            token = ops.Projected(torch.randn(B, 1, 2 * e + S), *torch.randn(2, 2, S), *angles, None)
            want, expected = module("reference").run(token, options, state.map(torch.clone))
            out, state = module("triton").run(token, options, state)
            assert relative(out, want) <= TOLERANCE
            assert relative(state.kv_sum, expected.kv_sum) <= TOLERANCE

    @torch.no_grad()
    @pytest.mark.parametrize("b", [5, 33])
    def test_many_rows_take_wider_slices_and_give_the_same(b):
        torch.set_default_dtype(torch.float32)
        options = ops.Options(C, True)
        state = ops.ChunkState.empty(torch.zeros(b, 0), C, S, E)
        token = projected_of("mixed", b, state.position, torch.float32)._replace(bias=torch.randn(C))
        want, _ = module("reference").run(token, options, state.map(torch.clone))
        out, _ = module("triton").run(token, options, state)
        assert relative(out, want) <= TOLERANCE

    @torch.no_grad()
    @pytest.mark.parametrize("linear_norm", ["mean", "fading"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_as_near_to_float64_as_the_reference(dtype, linear_norm):
        torch.set_default_dtype(torch.float32)
        options = ops.Options(C, True, linear_norm)
        states = {
            name: ops.ChunkState.empty(torch.zeros(B, 0, dtype=kind), C, S, E)
            for name, kind in (("triton", dtype), ("reference", dtype), ("exact", torch.float64))
        }
        worst = {"triton": 0.0, "reference": 0.0}
        gamma, beta = torch.randn(2, 4, S, dtype=dtype)
        bias = torch.randn(C)
        for _ in range(20):
            token = projected_of("mixed", B, states["exact"].position, dtype, keyed=True)
            token = token._replace(gamma=gamma, beta=beta, bias=bias)
            exact = token._replace(
                **{k: getattr(token, k).double() for k in ("uvz", "gamma", "beta", "bias", "keys")}
            )
            want, states["exact"] = module("reference").run(exact, options, states["exact"])
            for name in worst:
                out, states[name] = module(name).run(token, options, states[name])
                worst[name] = max(worst[name], relative(out, want))
        assert worst["triton"] <= 2 * worst["reference"]

    @pytest.mark.parametrize(
        ("sizes", "dtype", "said"),
        [
            (dict(S=12), torch.float32, "attention_dim is 12"),
            (dict(C=24), torch.float32, "chunk_size is 24"),
            (dict(), torch.float64, "uvz is torch.float64"),
        ],
    )
    def test_what_the_kernels_do_not_take_is_said(sizes, dtype, said):
        c, s = sizes.get("C", C), sizes.get("S", S)
        token = ops.Projected(
            torch.zeros(1, 1, 2 * E + s, dtype=dtype), torch.zeros(4, s), torch.zeros(4, s), None, None, None
        )
        reasons = module("triton").objections(token, ops.Options(c, True), None)
        assert any(said in reason for reason in reasons)
        assert any("gradients are enabled" in reason for reason in reasons)
        with torch.no_grad():
            assert len(module("triton").objections(token, ops.Options(c, True), None)) == len(reasons) - 1
