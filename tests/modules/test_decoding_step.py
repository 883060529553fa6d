"""Proves that a decoding step does the same work at every position, in place, and waits for nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_flash.modules import GatedAttentionUnit, Stack, TransformerBlock

CONSTANT = ["mixed_chunk", "local", "global", "mixed_chunk fading", "global fading"]
#: Operators whose result the host must wait for, or whose shape depends on the numbers.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal", "unique"}
GROWING = {"cat", "stack", "constant_pad_nd"}


class Operators(TorchDispatchMode):
    """Notes every operator with the shapes that go in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = tuple(tuple(x.shape) for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        self.calls.append((function.overloadpacket.__name__, shapes))
        return function(*args, **(kwargs or {}))


def build(block, attention, size, **options):
    attention, *fading = attention.split()
    sizes = dict(attention=attention, attention_dim=size, chunk_size=4)
    if fading:
        options |= dict(linear_norm="fading")
    if fading and block is GatedAttentionUnit:
        options |= dict(shift_keys=True)
    blocks = [block(8, **sizes, **options) for _ in range(2)]
    return Stack(torch.nn.Embedding(20, 8), blocks, embed_dim=8, attention_dim=size).eval()


@pytest.fixture(
    params=[(GatedAttentionUnit, 6), (TransformerBlock, 4)], ids=["gated attention unit", "transformer"]
)
def block(request):
    """A class of layers, and a size of heads for it."""
    return request.param


@pytest.fixture(params=CONSTANT)
def stack(request, block):
    kind, size = block
    return build(kind, request.param, size)


def tensors(state):
    return [x for layer in state.layers for x in layer if x is not None]


@torch.no_grad()
def test_every_position_costs_the_same_operators_and_none_that_waits_or_grows(stack):
    tokens = torch.randint(0, 20, (3, 1))
    state, seen = stack.empty_state(tokens), []
    for _ in range(14):
        with Operators() as operators:
            _, state = stack(tokens, None, state)
        seen.append(operators.calls)
    assert all(calls == seen[0] for calls in seen)
    names = [name for name, _ in seen[0]]
    assert not WAITING & set(names)
    rings = {tuple(x.shape[-2:]) for x in tensors(state) if x.dim() > 1 and x.shape[-2] > 1}
    assert rings
    assert not any(rings & {s[-2:] for s in shapes} for name, shapes in seen[0] if name in GROWING)


@torch.no_grad()
def test_the_state_stays_where_it_is(stack):
    tokens = torch.randint(0, 20, (3, 1))
    state = stack.empty_state(tokens)
    places = [x.data_ptr() for x in tensors(state) if x.dim() > 1]
    sizes = [x.shape for x in tensors(state)]
    for _ in range(11):
        _, state = stack(tokens, None, state)
    assert [x.data_ptr() for x in tensors(state) if x.dim() > 1] == places
    assert [x.shape for x in tensors(state)] == sizes


@torch.no_grad()
def test_a_step_is_one_graph_for_the_compiler(stack):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda tokens, state: stack(tokens, None, state), backend="eager", fullgraph=True
    )
    tokens = torch.randint(0, 20, (2, 9))
    ours, theirs = stack.empty_state(tokens), stack.empty_state(tokens)
    for step in range(9):
        token = tokens[:, step : step + 1]
        found, ours = compiled(token, ours)
        expected, theirs = stack(token, None, theirs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_cache_is_written_in_place_and_a_step_waits_for_nothing(block):
    kind, size = block
    options = dict(n_ref=8) if kind is GatedAttentionUnit else {}
    stack = build(kind, "quadratic", size, **options)
    tokens, copies = torch.randint(0, 20, (3, 1)), 0
    state = stack.empty_state(tokens)
    for _ in range(150):
        with Operators() as operators:
            _, state = stack(tokens, None, state)
        names = [name for name, _ in operators.calls]
        assert not WAITING & set(names)
        copies += any(
            shapes[0][:2] == (3, state.layers[0].columns - 1)
            for name, shapes in operators.calls
            if name == "cat"
        )
    assert 2 <= copies <= 4
