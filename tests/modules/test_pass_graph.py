"""Proves that a recorded pass of training changes speed alone; on a CPU, a replay runs what was recorded.

The graphs themselves are tested on a GPU, in tests/test_cuda.py.
"""

import argparse
import contextlib
import copy
import dataclasses
import pickle

import pytest
import torch

from fairseq_flash.modules import GatedAttentionUnit, Stack, pass_graph
from fairseq_flash.modules.pass_graph import MOST, PATIENCE, SHAPES, PassGraphs, aliased

WORDS = 12
#: The one that records on a GPU.
RECORDING = pass_graph._Recording


class Recording:
    """Stands for the recording of a GPU: same places of tensors, and work that is done again at a replay."""

    made = 0

    def __init__(self, stack, run, inputs, described, other):
        Recording.made += 1
        self.described, self.run, self.replays = described, run, 0
        self.inputs = [x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self.weights = [weight for weight in stack.parameters() if weight.requires_grad]
        self.out = run(*self.inputs).detach()
        self.grad_out = torch.zeros_like(self.out)
        self.grads = [
            torch.zeros_like(x) if x is not None and x.requires_grad else None
            for x in (*self.inputs, *self.weights)
        ]
        self.forward, self.backward = (
            argparse.Namespace(replay=f) for f in (self.attend, self.differentiate)
        )

    @torch.enable_grad()
    def attend(self):
        self.pending = self.run(*self.inputs)
        self.out.copy_(self.pending.detach())

    def differentiate(self):
        wanted = [x for x in (*self.inputs, *self.weights) if x is not None and x.requires_grad]
        grads = torch.autograd.grad(self.pending, wanted, self.grad_out)
        for place, grad in zip([x for x in self.grads if x is not None], grads, strict=True):
            place.copy_(grad)
        self.replays += 1


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setattr(pass_graph, "_Recording", Recording)
    monkeypatch.setattr(Recording, "made", 0)


def build(dropout=0.0):
    torch.manual_seed(0)
    embed = torch.nn.Embedding(WORDS, 8)
    units = [GatedAttentionUnit(8, attention_dim=4, chunk_size=4, dropout=dropout) for _ in range(2)]
    return Stack(embed, units, embed_dim=8, attention_dim=4).double()


def plain(stack):
    return lambda tokens, mask: stack(tokens, mask)[0]


def step(stack, graphs, tokens, mask=None):
    """Gradients of a pass are added to those that are there."""
    out = graphs(stack, plain(stack), (tokens, mask))
    out.square().sum().backward()
    return out


def batch(n=9, seed=1):
    return torch.randint(2, WORDS, (2, n), generator=torch.Generator().manual_seed(seed))


def grads(stack):
    return [p.grad.clone() for p in stack.parameters()]


def warm(stack, graphs, tokens):
    for _ in range(PATIENCE + 1):
        stack.zero_grad()
        step(stack, graphs, tokens)
    assert Recording.made == 1


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_passes_of_a_shape_are_recorded_once_and_replayed_with_the_weights_and_tokens_of_the_moment():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    with torch.no_grad():
        for weight in stack.parameters():
            weight.mul_(1.25)
    stack.zero_grad()
    out = step(stack, graphs, batch(seed=2))
    found = grads(stack)
    stack.zero_grad()
    expected = plain(stack)(batch(seed=2), None)
    expected.square().sum().backward()
    assert_equal([out, *found], [expected, *grads(stack)])
    (recording,) = graphs._recordings.values()
    assert Recording.made == 1
    assert recording.replays == 2


def test_gradients_of_several_batches_add_up_and_outlive_the_next_pass():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    stack.zero_grad()
    one = step(stack, graphs, batch(seed=2))
    kept, first, values = stack.blocks[0].uvz.weight.grad, grads(stack), one.clone()
    step(stack, graphs, batch(seed=3))
    both = grads(stack)
    assert kept is stack.blocks[0].uvz.weight.grad
    stack.zero_grad()
    step(stack, graphs, batch(seed=3))
    assert_equal(both, [a + b for a, b in zip(first, grads(stack), strict=True)])
    assert torch.equal(one, values)


def test_a_pass_that_waits_for_its_backward_pass_is_not_overwritten():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    stack.zero_grad()
    first = graphs(stack, plain(stack), (batch(seed=2), None))
    second = graphs(stack, plain(stack), (batch(seed=3), None))
    (first.square().sum() + second.square().sum()).backward()
    found = grads(stack)
    stack.zero_grad()
    for seed in (2, 3):
        plain(stack)(batch(seed=seed), None).square().sum().backward()
    assert_equal(found, grads(stack))


def test_a_pass_without_a_backward_pass_blocks_no_other():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    graphs(stack, plain(stack), (batch(), None))
    stack.zero_grad()
    step(stack, graphs, batch())
    (recording,) = graphs._recordings.values()
    # The one that was not differentiated left its work behind.
    assert recording.replays == 2


def test_a_pass_is_differentiated_once_and_before_the_next():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    out = graphs(stack, plain(stack), (batch(), None)).square().sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        out.backward()


@pytest.mark.parametrize(
    "change", ["eval", "frozen", "moved", "replaced", "replaced in place", "number", "hook", "dropout"]
)
def test_what_changes_a_stack_is_seen(change):
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    unit, seen = stack.blocks[1], []
    if change == "eval":
        unit.eval()
    elif change == "frozen":
        unit.uvz.weight.requires_grad = False
    elif change == "moved":
        unit.uvz.weight.data = 2 * unit.uvz.weight.data
    elif change == "replaced":
        unit.uvz.weight = torch.nn.Parameter(2 * unit.uvz.weight.detach())
    elif change == "replaced in place":
        unit.uvz.weight = torch.nn.Parameter(unit.uvz.weight.detach())
    elif change == "number":
        unit.attend = dataclasses.replace(unit.attend, backend="recomputed")
    elif change == "hook":
        unit.register_forward_hook(lambda *_: seen.append(True))
    else:
        stack.dropout.p = 0.5
    stack.zero_grad()
    torch.manual_seed(3)
    out = step(stack, graphs, batch())
    found = [p.grad for p in stack.parameters()]
    stack.zero_grad()
    torch.manual_seed(3)
    expected = plain(stack)(batch(), None)
    expected.square().sum().backward()
    # Dropout has drawn in the pass that was thrown away.
    if change != "dropout":
        assert_equal([out], [expected])
        for one, weight in zip(found, stack.parameters(), strict=True):
            assert (one is None) == (weight.grad is None)
            assert one is None or torch.allclose(one, weight.grad, rtol=1e-12, atol=1e-12)
    assert not graphs._recordings
    assert bool(seen) == (change == "hook")


def test_shapes_and_masks_have_recordings_of_their_own_and_there_are_few():
    stack, graphs = build(), PassGraphs()
    lengths = range(4, 4 + SHAPES + 2)
    for n in lengths:
        for _ in range(PATIENCE + 2):
            mask = torch.zeros(2, n, dtype=torch.bool)
            mask[0, -1] = True
            stack.zero_grad()
            out = step(stack, graphs, batch(n), mask)
            assert not out[0, -1].any()
            assert out[1].any()
    assert Recording.made == SHAPES


def test_shapes_that_take_turns_are_not_recorded():
    stack, graphs = build(), PassGraphs()
    for n in (5, 6) * (PATIENCE + 2):
        step(stack, graphs, batch(n))
    assert Recording.made == 0


def test_a_stack_that_changes_again_and_again_is_left_alone():
    stack, graphs = build(), PassGraphs()
    for rate in range((MOST + 3) * (PATIENCE + 1)):
        step(stack, graphs, batch())
        stack.dropout.p = (rate % (PATIENCE + 2)) / 100
    assert 1 < Recording.made <= MOST


def test_memory_that_another_pass_lacks_is_given_back():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    failures = [torch.OutOfMemoryError("CUDA out of memory.")]

    def run(tokens, mask):
        if failures:
            raise failures.pop()
        return stack(tokens, mask)[0]

    out = graphs(stack, run, (batch(5), None))
    assert_equal([out], [plain(stack)(batch(5), None)])
    assert not graphs._recordings
    failures.append(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        graphs(stack, run, (batch(5), None))


def test_memory_that_ran_out_elsewhere_is_given_back(monkeypatch):
    stack, graphs, ooms = build(), PassGraphs(), [1]
    monkeypatch.setattr(pass_graph, "_shortages", lambda device: len(ooms))
    warm(stack, graphs, batch())
    graphs.give_back(torch.device("cpu"))
    assert graphs._recordings
    ooms.append(1)
    with pytest.warns(UserWarning, match=r"from here on passes run without CUDA graphs: memory ran out$"):
        graphs.give_back(torch.device("cpu"))
    assert not graphs._recordings
    assert "its memory was needed" in graphs.objections(stack, batch())[-1]
    assert_equal([step(stack, graphs, batch())], [plain(stack)(batch(), None)])


def test_gradients_reach_inputs_that_have_them():
    linear, graphs = torch.nn.Linear(3, 2).double(), PassGraphs()
    for _ in range(PATIENCE + 2):
        x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
        y = graphs(linear, lambda x, none: linear(x), (x, None))
        y.sum().backward()
        torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(4, 3))
    assert Recording.made == 1


def test_what_cannot_be_recorded_runs_with_one_warning(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(pass_graph, "_Recording", fail)
    stack, graphs = build(), PassGraphs()
    for _ in range(PATIENCE):
        step(stack, graphs, batch())
    with pytest.warns(UserWarning, match="recording one failed: OutOfMemoryError: CUDA out of memory.$"):
        out = step(stack, graphs, batch())
    assert_equal([out], [plain(stack)(batch(), None)])
    step(stack, graphs, batch())
    assert "failed" in graphs.objections(stack, batch())[-1]


def test_a_stack_that_learns_nothing_is_not_recorded():
    stack, graphs = build().requires_grad_(False), PassGraphs()
    for _ in range(PATIENCE + 2):
        out = graphs(stack, plain(stack), (batch(), None))
    assert_equal([out], [plain(stack)(batch(), None)])
    assert Recording.made == 0


def test_copies_and_saved_models_have_no_recording():
    stack, graphs = build(), PassGraphs()
    warm(stack, graphs, batch())
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert not other._recordings
        assert not other._in_a_row


@pytest.fixture
def stubs(monkeypatch):
    """CUDA's part of a recording, which does nothing; what was called is kept."""
    called = []

    @contextlib.contextmanager
    def graph(graph, **options):
        called.append(sorted(options))
        yield

    streams = dict(
        Stream=lambda device: "side", stream=contextlib.nullcontext, current_stream=lambda device: "own"
    )
    modes = dict(get_sync_debug_mode=lambda: 0, set_sync_debug_mode=called.append)
    rest = dict(
        CUDAGraph=object, graph=graph, graph_pool_handle=lambda: "pool", default_generators={None: None}
    )
    for name, value in {**streams, **modes, **rest}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return called


def test_a_recording_keeps_what_the_pass_gave_and_shares_memory_and_stream(stubs):
    stack = build()
    first = RECORDING(stack, plain(stack), (batch(), None), [], None)
    second = RECORDING(stack, plain(stack), (batch(5), None), [], first)
    assert (second.pool, second.stream) == (first.pool, first.stream) == ("pool", "side")
    assert stubs == 2 * ["error", 0, *2 * [["capture_error_mode", "pool", "stream"]]]
    expected = plain(stack)(batch(), None)
    assert_equal([first.out], [expected])
    expected.backward(torch.ones_like(expected))
    assert [grad.shape for grad in first.grads[2:]] == [p.grad.shape for p in stack.parameters()]
    assert first.grads[:2] == [None, None]
    assert all(x is y for x, y in zip(first.weights, stack.parameters(), strict=True))


def test_a_recording_that_fails_leaves_the_stack_and_the_device_as_they_were(stubs):
    stack, passes = build(), []
    own = list(stack.parameters())

    def run(tokens, mask):
        passes.append(tokens)
        if len(passes) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return stack(tokens, mask)[0]

    with pytest.raises(RuntimeError, match="not permitted"):
        RECORDING(stack, run, (batch(), None), [], None)
    assert all(x is y for x, y in zip(own, stack.parameters(), strict=True))
    assert stubs[:2] == ["error", 0]


def test_objections_say_why_a_pass_is_not_recorded():
    stack, graphs = build().eval(), PassGraphs()
    cpu, training = graphs.objections(stack, batch())
    assert "not on a CUDA device" in cpu
    assert "does not train" in training


def test_aliases_lie_in_the_same_places_and_have_gradients_of_their_own():
    stack = build()
    stack.blocks[1].uvz.weight = stack.blocks[0].uvz.weight
    own = dict(stack.named_parameters())
    loss = plain(stack)(batch(), None).square().sum()
    expected = torch.autograd.grad(loss, own.values())
    with aliased(stack) as aliases:
        assert stack.blocks[1].uvz.weight is stack.blocks[0].uvz.weight is aliases[own["blocks.0.uvz.weight"]]
        assert not any(weight is own[name] for name, weight in stack.named_parameters())
        assert [x.data_ptr() for x in aliases.values()] == [x.data_ptr() for x in own.values()]
        found = torch.autograd.grad(plain(stack)(batch(), None).square().sum(), aliases.values())
    assert_equal(found, expected)
    assert all(weight is own[name] for name, weight in stack.named_parameters())
