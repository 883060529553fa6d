"""Proves that a GPU computes what the CPU does, in every precision that fairseq trains in there."""

import pytest
import torch
from torch import nn

from fairseq_flash.modules import (
    DecoderLayer,
    GatedAttentionUnit,
    GatedCrossAttention,
    Stack,
    TransformerBlock,
)
from support import tools

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = 4096 * torch.finfo(torch.float64).eps  # passed on an H100; other orders of long sums
KINDS = ["mixed_chunk", "quadratic", "local", "global"]
EVERY_KIND = [*KINDS, *(f"transformer {attention}" for attention in KINDS)]
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
