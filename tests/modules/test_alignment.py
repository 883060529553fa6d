"""Proves that rows are aligned without a look at their numbers, so that every pass is one graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_flash.modules import GatedAttentionUnit, Stack, TransformerBlock, align_rows, restore_rows
from support.pieces import error

TOLERANCE = 256 * torch.finfo(torch.float64).eps  # relative; measured: 6 eps
D, C, N = 8, 4, 13
KINDS = ["mixed_chunk", "quadratic", "local", "global"]
every_kind = pytest.mark.parametrize("attention", KINDS)
#: Operators whose result the host must wait for, or whose shape depends on the numbers.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal", "unique"}


class NoLooks(TorchDispatchMode):
    """Refuses every operator that a device would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def unit(attention, **options):
    sizes = dict(attention_dim=6, chunk_size=C, n_ref=N)
    return GatedAttentionUnit(D, attention=attention, **{**sizes, **options})


def transformer(attention, **options):
    return TransformerBlock(D, attention=attention, attention_dim=4, chunk_size=C, **options)


def batch(leading=5):
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, :leading] = mask[1, 9:] = mask[2] = True
    return torch.randn(3, N, D), mask


@every_kind
@pytest.mark.parametrize("build", [unit, transformer])
@pytest.mark.parametrize("masked", [True, False])
def test_training_never_waits_for_the_device(attention, build, masked):
    layer = build(attention)
    stack = Stack(
        torch.nn.Embedding(20, D), [layer], embed_dim=D, attention_dim=layer.attention_dim, scaled_sin=True
    )
    _, mask = batch()
    mask = mask if masked else None
    with NoLooks():
        out, _ = stack(torch.randint(20, (3, N)), mask)
        out.square().sum().backward()
        _, state = stack(torch.randint(20, (3, N)), mask, stack.empty_state(torch.zeros(3, 1)))
        stack(torch.randint(20, (3, 2)), None, state)


@every_kind
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("relative_bias", ["rotary", "toeplitz"])
def test_an_empty_mask_changes_no_bit(attention, causal, relative_bias):
    layer, (x, mask) = unit(attention, causal=causal, relative_bias=relative_bias), batch()
    assert torch.equal(layer(x, torch.zeros_like(mask))[0], layer(x)[0])


@every_kind
def test_an_empty_mask_changes_no_bit_of_a_transformer(attention):
    layer, (x, mask) = transformer(attention), batch()
    assert torch.equal(layer(x, torch.zeros_like(mask))[0], layer(x)[0])


@pytest.mark.parametrize("build", [unit, transformer])
@every_kind
def test_a_row_of_no_tokens_gives_an_empty_result(attention, build):
    layer, x, mask = build(attention), torch.zeros(2, 0, D), torch.zeros(2, 0, dtype=torch.bool)
    for padding_mask in (None, mask):
        assert layer(x, padding_mask)[0].shape == (2, 0, D)
        state = layer.empty_state(x)
        out, state = layer(x, padding_mask, state)
        assert out.shape == (2, 0, D)
        assert state.position.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.float64])
def test_a_mask_of_another_dtype_is_refused_by_name(dtype):
    x, mask = batch()
    with pytest.raises(ValueError, match=f"padding_mask has dtype {dtype}; allowed: torch.bool"):
        unit("local")(x, mask.to(dtype))


def test_a_mask_of_another_shape_is_refused_by_name():
    x, mask = batch()
    with pytest.raises(ValueError, match=r"padding_mask has shape \(3, 12\); allowed: \(3, 13\)"):
        unit("local")(x, mask[:, 1:])


def test_rows_keep_their_length_and_come_back_where_they_were():
    x, mask = batch()
    aligned, rows = align_rows(x, mask, None, 6, x.dtype)
    assert aligned.shape == x.shape
    assert rows.lengths.tolist() == [8, 9, 0]
    assert torch.equal(aligned[0, :8], x[0, 5:])
    assert (aligned[rows.padding_mask] == 0).all()
    assert torch.equal(restore_rows(aligned, rows), x.masked_fill(mask.unsqueeze(-1), 0))


@every_kind
@pytest.mark.parametrize("build", [unit, transformer])
@pytest.mark.parametrize("masked", [True, False])
def test_a_layer_is_one_graph_for_the_compiler(attention, build, masked):
    torch.compiler.reset()
    layer, (x, mask) = build(attention), batch()
    mask = mask if masked else None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert error(compiled(x, mask)[0], layer(x, mask)[0]) <= TOLERANCE


class FirstOutput(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, padding_mask=None):
        return self.layer(x, padding_mask)[0]


@every_kind
@pytest.mark.parametrize("build", [unit, transformer])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced", ["jit", "export"])
def test_a_trace_made_without_padding_is_right_with_it(attention, build, traced):
    module, (x, mask) = FirstOutput(build(attention)).eval(), batch()
    example = (torch.randn(3, N, D), torch.zeros(3, N, dtype=torch.bool))
    with torch.no_grad():
        if traced == "jit":
            found = torch.jit.trace(module, example)(x, mask)
        else:
            found = torch.export.export(module, example).module()(x, mask)
        assert error(found, module(x, mask)) <= TOLERANCE


@every_kind
@pytest.mark.parametrize("build", [unit, transformer])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [1, C - 1, C, 2 * C, N])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_right_for_rows_of_any_length(attention, build, causal, masked, length):
    if build is transformer and not causal:
        pytest.skip("a Transformer's block is causal")
    module = FirstOutput(build(attention) if causal else build(attention, causal=False)).eval()

    def rows(n):
        mask = torch.arange(n) >= torch.tensor([[n], [n - n // 2]])
        return torch.randn(2, n, D), mask if masked else None

    with torch.no_grad():
        x, mask = rows(length)
        traced = torch.jit.trace(module, (x, mask) if masked else (x,))
        for n in (1, C - 1, C, 2 * C, N):
            x, mask = rows(n)
            found = traced(x, mask) if masked else traced(x)
            assert error(found, module(x, mask)) <= TOLERANCE


def test_a_trace_refuses_padding_in_the_middle_as_well():
    module, mask = FirstOutput(unit("mixed_chunk")), torch.zeros(3, N, dtype=torch.bool)
    program = torch.export.export(module, (torch.randn(3, N, D), mask)).module()
    mask[0, 4] = True
    with pytest.raises(RuntimeError, match="padding between real tokens; allowed: leading and trailing"):
        program(torch.randn(3, N, D), mask)
