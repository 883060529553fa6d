"""Proves that positions and relative biases are the paper's, at any distance and in any piece."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_flash import ops
from fairseq_flash.ops.positions import summed_angles
from support import oracle

TOLERANCE = 32 * torch.finfo(torch.float64).eps  # measured: 4 eps


def close(ours, expected, tolerance=TOLERANCE):
    return (ours - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0, 2**30), half=st.integers(1, 9))
def test_rotary_is_the_oracles_at_any_position(position, half):
    x = torch.randn(2 * half)
    ours = ops.rotary(x.unsqueeze(0), torch.tensor([position])).squeeze(0)
    # sin and cos of a large angle carry the rounding of the angle itself.
    assert close(ours, oracle.rotary(x, position), TOLERANCE + position * torch.finfo(torch.float64).eps)


def test_rotary_in_half_precision_has_the_angles_of_float32():
    x = torch.randn(7, 8)
    positions = torch.arange(100_000, 100_007)
    exact = ops.rotary(x, positions)
    for dtype in (torch.float16, torch.bfloat16):
        error = (ops.rotary(x.to(dtype), positions).double() - exact).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0, 10**6), half=st.integers(1, 9))
def test_scaled_sin_is_the_oracles_at_any_position(position, half):
    ours = ops.scaled_sin(torch.tensor([position]), 2 * half, torch.float64).squeeze(0)
    tolerance = TOLERANCE + position * torch.finfo(torch.float64).eps
    assert close(ours, oracle.scaled_sin(position, 2 * half, 1.0), tolerance)


@pytest.mark.parametrize("limit", [1, 2, 7, 16])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_toeplitz_bias_is_the_oracles_up_to_its_limit(limit, length):
    table = torch.randn(2 * limit - 1, requires_grad=True)
    if length > limit:
        with pytest.raises(ValueError, match=f"length={length} is beyond.*1 to {limit}"):
            ops.toeplitz_bias(table, length)
        return
    ours = ops.toeplitz_bias(table, length)
    pairs = [(i, j) for i in range(length) for j in range(length)]
    expected = torch.stack([oracle.toeplitz_bias(table, i, j, limit) for i, j in pairs]).view(length, length)
    assert torch.equal(ours, expected)
    weights = torch.randn(length, length)
    (ours_grad,) = torch.autograd.grad((ours * weights).sum(), table)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), table)
    assert close(ours_grad, expected_grad)


def test_rotary_bias_is_the_oracles_and_depends_on_the_distance_alone():
    a, b = torch.randn(2, 6)
    queries, keys = torch.arange(5), torch.arange(7)
    ours = ops.rotary_bias(a, b, queries, keys)
    for i in queries:
        for j in keys:
            assert close(ours[i, j], oracle.rotary_bias(a, b, int(i), int(j)))
    assert close(ops.rotary_bias(a, b, queries + 1000, keys + 1000), ours, 1e-11)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9])
def test_rotary_bias_by_distance_is_the_oracles(length):
    a, b = torch.randn(2, 6)
    expected = [oracle.rotary_bias(a, b, t + 20, 20) for t in range(1 - length, length)]
    assert close(ops.rotary_bias_by_distance(a, b, length, both=True), torch.stack(expected))
    assert close(ops.rotary_bias_by_distance(a, b, length), torch.stack(expected[length - 1 :]))


@pytest.mark.parametrize(
    "angles",
    [lambda t: summed_angles(t, 6), lambda t: ops.rotary_bias_by_distance(t[:6] * 1.0, t[:6] * 1.0, 7)],
)
def test_a_compiled_graph_makes_no_table_on_the_host(angles):
    """A table that a compiler traces would be made, and copied to the device, in every pass."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(angles, backend=keep, fullgraph=True)(torch.arange(30))
    made = [node for node in graphs[0].graph.nodes if node.op.startswith("call")]
    moves = [node for node in made if node.target == "to" and torch.device("cpu") in node.args]
    assert made
    assert not moves
    assert not [node for node in made if node.target is torch.arange and 2048 in node.args]


def test_an_odd_dimension_is_refused_by_name():
    with pytest.raises(ValueError, match="attention_dim=7 is odd"):
        ops.rotary(torch.randn(3, 7), torch.arange(3))
    with pytest.raises(ValueError, match="embed_dim=7 is odd"):
        ops.scaled_sin(torch.arange(3), 7)


def positions_up_to_a_million():
    edges = torch.tensor([0, 1, 2047, 2048, 2049, 4_194_303, 4_194_304, 2**32, 2**33 - 1])
    return torch.cat((edges, torch.randint(10**6, (4000,)), torch.arange(99_990, 100_010)))


def test_angles_without_float64_are_exact_to_the_rounding_of_float32():
    """What a GPU computes; a product of angles in float32 would be off by the position times epsilon."""
    positions = positions_up_to_a_million()
    for dim in (2, 6, 128):
        exact = ops.rotary_angles(positions, dim, torch.float64)
        for ours, expected in zip(summed_angles(positions, dim), exact, strict=True):
            assert ours.dtype == torch.float32
            error = (ours.double() - expected).abs().max()
            assert error <= 4 * torch.finfo(torch.float32).eps  # measured: 1.6 eps


def test_float64_has_angles_of_float64_and_a_cpu_the_nearest_of_float32():
    positions = torch.randint(10**6, (100,))
    cos, sin = ops.rotary_angles(positions, 6, torch.float64)
    narrow = ops.rotary_angles(positions, 6, torch.float32)
    assert cos.dtype == sin.dtype == torch.float64
    assert all(torch.equal(a.float(), b) for a, b in zip((cos, sin), narrow, strict=True))


def test_angles_beside_a_device_are_made_without_float64():
    seen = []

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    positions = torch.arange(5)
    summed_angles(positions, 6)
    with Dtypes():
        summed_angles(positions, 6)
    assert torch.float32 in seen
    assert torch.float64 not in seen
