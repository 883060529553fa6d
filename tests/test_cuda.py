"""Proves that a GPU computes what the CPU does, in every precision that fairseq trains in there."""

import pytest
import torch
from fairseq.trainer import Trainer
from torch import nn

from fairseq_flash.modules import (
    DecoderLayer,
    GatedAttentionUnit,
    GatedCrossAttention,
    Stack,
    TransformerBlock,
    pass_graph,
)
from fairseq_flash.modules.pass_graph import PATIENCE, PassGraphs
from fairseq_flash.modules.step_graph import StepGraphs
from fairseq_flash.ops import dispatch
from support import tools

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = 4096 * torch.finfo(torch.float64).eps  # passed on an H100; other orders of long sums
KINDS = ["mixed_chunk", "quadratic", "local", "global"]
EVERY_KIND = [*KINDS, "flash2", *(f"transformer {attention}" for attention in KINDS)]
BIDIRECTIONAL = [(kind, False) for kind in KINDS]
N = 300


def build(kind, causal=True):
    torch.manual_seed(0)
    *transformer, attention = kind.split()
    if transformer:
        sizes = dict(attention_dim=32, chunk_size=64, glu=True)
        blocks = [TransformerBlock(64, attention=attention, **sizes) for _ in range(3)]
    else:
        sizes = dict(chunk_size=64, causal=causal, n_ref=N)
        if attention == "flash2":
            attention = "mixed_chunk"
            sizes |= dict(shift_keys=True, linear_norm="fading")
        blocks = [GatedAttentionUnit(64, attention=attention, **sizes) for _ in range(3)]
    stack = Stack(nn.Embedding(50, 64), blocks, embed_dim=64, attention_dim=blocks[0].attention_dim)
    return stack.double().eval()


def batch():
    tokens = torch.randint(50, (3, N), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, :70] = mask[1, 210:] = True
    return tokens, mask


@pytest.mark.parametrize(("kind", "causal"), [*((kind, True) for kind in EVERY_KIND), *BIDIRECTIONAL])
def test_outputs_and_gradients_are_the_cpus(kind, causal):
    results = {}
    for device in ("cpu", "cuda"):
        stack = build(kind, causal).to(device)
        out, _ = stack(*(x.to(device) for x in batch()))
        # Not a sum of squares: behind a norm that is constant, and its gradient rounding alone.
        (out * torch.linspace(-1, 1, 64, dtype=out.dtype, device=device)).sum().backward()
        results[device] = [out.detach().cpu(), *(p.grad.cpu() for p in stack.parameters())]
    for cpu, cuda in zip(results["cpu"], results["cuda"], strict=True):
        assert (cpu - cuda).abs().max() <= TOLERANCE * cpu.abs().max()


@pytest.mark.parametrize("kind", EVERY_KIND)
@torch.no_grad()
def test_decoding_on_the_gpu_is_the_parallel_pass(kind):
    stack = build(kind).cuda()
    tokens = batch()[0].cuda()
    whole, _ = stack(tokens)
    out, state = stack(tokens[:, :170], None, stack.empty_state(tokens))
    outs = [out]
    for t in range(170, N):
        out, state = stack(tokens[:, t : t + 1], None, state)
        outs.append(out)
    assert (torch.cat(outs, dim=1) - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", EVERY_KIND)
@torch.no_grad()
def test_decoding_never_waits_for_the_gpu(kind):
    stack = build(kind).cuda()
    tokens = batch()[0].cuda()
    _, state = stack(tokens, None, stack.empty_state(tokens))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(3):
            _, state = stack(tokens[:, t : t + 1], None, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [["--fp16"], ["--bf16"], ["--amp"], ["--memory-efficient-bf16"]], ids=str)
@pytest.mark.parametrize("arch", ["flash_lm", "flash_quad_lm", "transformer_pp_lm", "mc_transformer_pp_lm"])
def test_fairseq_trains_in_reduced_precision(arch, options, data_bin, tmp_path, capsys):
    recipe = [*(option for option in tools.RECIPE if option != "--cpu"), *tools.ADAM]
    words = ["--arch", f"{arch}_tiny", *tools.SMALL, *options]

    def train(updates):
        output = tools.train(data_bin, tmp_path, *words, updates=updates, recipe=recipe)
        # Other packages that fairseq imports may put a handler of their own, on stderr, in place of ours.
        return tools.losses(output) or tools.losses(capsys.readouterr().err)

    losses = [float(loss) for _, loss in train(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert train(32)


# By the reference, and in float32 by the kernels.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_recorded_pass_of_training_is_the_pass(kind, dtype):
    stack, graphs = build(kind).to("cuda", dtype).train(), PassGraphs()
    # Gradients of sums over all tokens are in the thousands: larger steps end in numbers that are not finite.
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-5)
    tokens, mask = (x.cuda() for x in batch())

    def gradients(run, update):
        optimizer.zero_grad()
        outs = []
        for turn in (1, 2):
            out = run(tokens.roll(turn * update, 1), mask.roll(turn, 0))
            (out * torch.linspace(-1, 1, 64, dtype=dtype, device="cuda")).sum().backward()
            outs.append(out)
        return [*outs, *(p.grad.clone() for p in stack.parameters())]

    for update in range(PATIENCE + 2):
        found = gradients(lambda *inputs: graphs(stack, lambda *x: stack(*x)[0], inputs), update)
        expected = gradients(lambda *inputs: stack(*inputs)[0], update)
        bound = TOLERANCE * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= bound * other.abs().max()
        optimizer.step()
        # As by a loss that somebody keeps for the log: autograd's part of the weights lives on with it.
        kept = stack(tokens, mask)[0]
    assert graphs._recordings
    assert kept.requires_grad


def test_a_recorded_pass_draws_dropout_anew_and_by_the_seed_of_the_moment():
    torch.manual_seed(0)
    units = [GatedAttentionUnit(64, chunk_size=64, dropout=0.3) for _ in range(2)]
    stack = Stack(nn.Embedding(50, 64), units, embed_dim=64, attention_dim=128).cuda()
    graphs, (tokens, mask) = PassGraphs(), (x.cuda() for x in batch())

    def passed(seed):
        torch.cuda.manual_seed(seed)
        out = graphs(stack, lambda *x: stack(*x)[0], (tokens, mask))
        out.sum().backward()
        return out

    for seed in range(PATIENCE + 1):
        passed(seed)
    assert graphs._recordings
    first, second, again = passed(1), passed(2), passed(1)
    assert torch.equal(first, again)
    # A start's units add little to their input: what they drop is seen in most numbers, but small.
    assert (first != second).sum() > (first != 0).sum() / 2


def test_recordings_give_their_memory_back_when_it_ran_out_elsewhere():
    stack, graphs = build("mixed_chunk").cuda().train(), PassGraphs()
    tokens, mask = (x.cuda() for x in batch())
    for _ in range(PATIENCE + 1):
        graphs(stack, lambda *x: stack(*x)[0], (tokens, mask)).sum().backward()
        graphs.give_back(tokens.device)
    assert graphs._recordings
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")
    with pytest.warns(UserWarning, match="memory ran out"):
        graphs.give_back(tokens.device)
    assert not graphs._recordings


@pytest.mark.parametrize("arch", ["flash2_lm", "transformer_pp_lm"])
def test_a_compiled_training_records_its_passes_and_learns_the_same(
    arch, data_bin, tmp_path, capsys, recwarn, monkeypatch
):
    made, found, recording = [], {}, pass_graph._Recording
    monkeypatch.setattr(pass_graph, "_Recording", lambda *given: made.append(recording(*given)) or made[-1])
    recipe = [*(option for option in tools.RECIPE if option != "--cpu"), *tools.ADAM]
    words = ["--arch", f"{arch}_tiny", *tools.SMALL, "--bf16", "--update-freq", "2", "--dropout", "0"]
    for options in ((), ("--compile",)):
        folder = tmp_path / str(len(options))
        output = tools.train(data_bin, folder, *words, *options, updates=12, recipe=recipe)
        rows = tools.losses(output) or tools.losses(capsys.readouterr().err)
        found[options] = torch.tensor([float(loss) for _, loss in rows])
    assert made
    assert not [warning for warning in recwarn if "CUDA graphs" in str(warning.message)]
    plain, compiled = found.values()
    assert (plain - compiled).abs().max() <= 0.05


@pytest.mark.parametrize("options", [(), ("--compile",)], ids=str)
def test_no_update_waits_for_the_gpu(options, data_bin, tmp_path, monkeypatch):
    step = Trainer.train_step

    def watched(self, *args, **kwargs):
        settled = self.get_num_updates() > 6
        torch.cuda.set_sync_debug_mode("error" if settled else "default")
        try:
            return step(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", watched)
    recipe = [*(option for option in tools.RECIPE if option != "--cpu"), *tools.ADAM]
    words = ["--arch", "flash_lm_tiny", *tools.SMALL, "--bf16", "--clip-norm", "0.5", "--log-interval", "100"]
    words += ["--optimizer", "fused_adam", *options]
    tools.train(data_bin, tmp_path, *words, updates=12, recipe=recipe)


def build_decoder():
    torch.manual_seed(0)
    blocks = [
        DecoderLayer(GatedAttentionUnit(64, chunk_size=64), GatedCrossAttention(64, init="paper"))
        for _ in range(2)
    ]
    return Stack(nn.Embedding(50, 64), blocks, embed_dim=64, attention_dim=128).double().eval()


def test_a_decoder_reads_its_source_as_on_the_cpu():
    results = {}
    torch.manual_seed(1)
    source = torch.randn(3, 90, 64, dtype=torch.float64)
    source_mask = torch.zeros(3, 90, dtype=torch.bool)
    source_mask[1, :40] = source_mask[2] = True
    for device in ("cpu", "cuda"):
        stack = build_decoder().to(device)
        given = dict(source=source.to(device), source_padding_mask=source_mask.to(device))
        tokens = batch()[0].to(device)
        out, _ = stack(tokens, None, **given)
        (out * torch.linspace(-1, 1, 64, dtype=out.dtype, device=device)).sum().backward()
        results[device] = [out.detach().cpu(), *(p.grad.cpu() for p in stack.parameters())]
        with torch.no_grad():
            pieces, state = [], stack.empty_state(tokens, **given)
            for start, end in ((0, 150), (150, 151), (151, N)):
                piece, state = stack(tokens[:, start:end], None, state)
                pieces.append(piece)
        assert (torch.cat(pieces, dim=1) - out).abs().max() <= 1e-10
    for cpu, cuda in zip(results["cpu"], results["cuda"], strict=True):
        assert (cpu - cuda).abs().max() <= TOLERANCE * cpu.abs().max()


def stepped(kind, dtype=torch.float32):
    stack = build(kind).to("cuda", dtype)
    return stack, batch()[0].cuda()


def walk(step, stack, tokens, state):
    """Features of every token behind the first 100."""
    outs = []
    for t in range(100, N):
        out, state = step(tokens[:, t : t + 1], state)
        outs.append(out.clone())
    return torch.cat(outs, dim=1)


CONSTANT = [kind for kind in EVERY_KIND if "quadratic" not in kind]


@pytest.mark.parametrize("kind", CONSTANT)
@torch.no_grad()
def test_a_recorded_step_is_the_step(kind):
    stack, tokens = stepped(kind)
    graphs = StepGraphs()

    def recorded(token, state):
        assert not graphs.objections(stack, token, state)
        return graphs(stack, token, state)

    _, state = stack(tokens[:, :100], None, stack.empty_state(tokens))
    want = walk(
        lambda token, state: stack(token, None, state), stack, tokens, state.reorder(torch.arange(3).cuda())
    )
    found = walk(recorded, stack, tokens, state)
    assert graphs._recordings
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_two_generations_in_turns_do_not_feel_each_other():
    stack, tokens = stepped("mixed_chunk")
    graphs, states, outs = StepGraphs(), {}, {1: [], 2: []}
    rows = {1: tokens[:2], 2: tokens.flip(1)[:2]}
    want = {name: stack(row)[0] for name, row in rows.items()}
    states = {name: stack.empty_state(row) for name, row in rows.items()}
    for t in range(40):
        for name, row in rows.items():
            out, states[name] = graphs(stack, row[:, t : t + 1], states[name])
            outs[name].append(out.clone())
    for name, found in outs.items():
        assert (torch.cat(found, dim=1) - want[name][:, :40]).abs().max() <= 1e-5 * want[name].abs().max()


@torch.no_grad()
def test_beams_that_reorder_and_rows_that_leave_are_exact_when_recorded():
    stack, tokens = stepped("mixed_chunk")
    graphs, eager = StepGraphs(), stack.empty_state(tokens)
    state = stack.empty_state(tokens)
    orders = {20: [2, 0, 0], 30: [1, 2, 1], 45: [2, 0], 60: [1]}
    for t in range(80):
        if t in orders:
            order = torch.tensor(orders[t], device="cuda")
            state, eager, tokens = state.reorder(order), eager.reorder(order), tokens[order]
        token = tokens[:, t : t + 1]
        found, state = graphs(stack, token, state)
        want, eager = stack(token, None, eager)
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_weights_that_have_moved_are_not_read_where_they_were():
    stack, tokens = stepped("mixed_chunk")
    graphs = StepGraphs()
    for factor in (1.0, 2.0):
        for weight in stack.parameters():
            weight.data = weight.data * factor  # elsewhere in memory
        want = stack(tokens[:, :20])[0]
        state, outs = stack.empty_state(tokens), []
        for t in range(20):
            out, state = graphs(stack, tokens[:, t : t + 1], state)
            outs.append(out.clone())
        assert (torch.cat(outs, dim=1) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mixed_chunk", "local", "global"])
@torch.no_grad()
def test_the_kernels_of_a_step_are_as_near_to_float64_as_the_reference(kind, dtype):
    worst = {}
    exact = walk_of(kind, torch.float64, "reference")
    for backend in ("triton", "reference"):
        found = walk_of(kind, dtype, backend)
        worst[backend] = float((found.double() - exact).abs().max() / exact.abs().max())
    assert worst["triton"] <= 2 * worst["reference"] + 1e-6


def walk_of(kind, dtype, backend):
    """A stack's steps with one implementation of them."""
    stack, tokens = stepped(kind, dtype)
    steps = {backend: dispatch.STEPS[backend]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairseq_flash.ops.mixed_chunk.step.STEPS", steps)
        patch.setattr(dispatch, "BACKENDS", ("auto", *steps))
        return walk(lambda token, state: stack(token, None, state), stack, tokens, stack.empty_state(tokens))
