"""Proves that a stack counts positions from the first real token, decodes as it trains, and reorders rows."""

import as_oracle
import oracle
import pytest
import torch
from torch import nn

from fairseq_flash.modules import GatedAttentionUnit, Stack

TOLERANCE = 1024 * torch.finfo(torch.float64).eps  # absolute; measured: 130 eps
D, WORDS, N = 8, 11, 13
KINDS = ["mixed_chunk", "quadratic", "local", "global"]


def build(attention="mixed_chunk", layers=3, scaled_sin=True):
    options = dict(attention=attention, attention_dim=6, chunk_size=4, n_ref=N)
    blocks = [GatedAttentionUnit(D, **options) for _ in range(layers)]
    stack = Stack(nn.Embedding(WORDS, D), blocks, embed_dim=D, attention_dim=6, scaled_sin=scaled_sin).eval()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    return stack


@pytest.mark.parametrize("scaled_sin", [True, False], ids=["scaled sin", "no positions"])
@pytest.mark.parametrize("attention", KINDS)
def test_a_padded_batch_is_the_oracle_of_each_row(attention, scaled_sin):
    stack = build(attention, scaled_sin=scaled_sin)
    alpha = stack.embed_positions.alpha if scaled_sin else 0.0
    tokens = torch.randint(WORDS, (3, N))
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, :5] = mask[1, 9:] = True
    units = [as_oracle.unit(block) for block in stack.blocks]
    _, final_norm = as_oracle.norm(stack.final_norm)

    def function(row):
        x = [
            stack.embed_tokens.weight[t] + oracle.scaled_sin(i, D, alpha)
            for i, t in enumerate(row)
        ]
        x = torch.stack(x)
        for unit in units:
            x = unit(x)
        return torch.stack([oracle.layer_norm(x_i, **final_norm) for x_i in x])

    expected = oracle.padded(function, mask, tokens)
    ours, _ = stack(tokens, mask)
    assert (ours - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", KINDS)
@torch.no_grad()
def test_reordered_and_dropped_rows_go_on_as_if_they_had_always_been_there(attention):
    stack = build(attention)
    tokens = torch.randint(WORDS, (4, N))
    order = torch.tensor([2, 0, 2])
    _, state = stack(tokens[:, :6], None, stack.empty_state(tokens))
    state = state.reorder(order)
    rows = torch.cat((tokens[order, :6], torch.randint(WORDS, (3, N - 6))), dim=1)
    expected, _ = stack(rows)
    for t in range(6, N):
        out, state = stack(rows[:, t : t + 1], None, state)
        assert (out[:, 0] - expected[:, t]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_reordered_state_shares_no_memory_with_the_old():
    stack = build()
    tokens = torch.randint(WORDS, (2, 6))
    _, state = stack(tokens, None, stack.empty_state(tokens))
    expected, _ = stack(tokens[:, :1], None, state.reorder(torch.tensor([0, 1])))
    for _ in range(3):  # each would spoil the next if they shared
        out, _ = stack(tokens[:, :1], None, state.reorder(torch.tensor([0, 1])))
        assert torch.equal(out, expected)


@torch.no_grad()
def test_ragged_prompts_go_on_token_by_token():
    stack = build()
    prompt, rest = torch.randint(WORDS, (2, 6)), torch.randint(WORDS, (2, 7))
    mask = torch.tensor([[False] * 6, [True, True] + [False] * 4])
    _, state = stack(prompt, mask, stack.empty_state(prompt))
    outs = []
    for t in range(7):
        out, state = stack(rest[:, t : t + 1], None, state)
        outs.append(out)
    for row, lead in enumerate([0, 2]):
        expected, _ = stack(torch.cat((prompt[row, lead:], rest[row])).unsqueeze(0))
        assert (torch.cat(outs, dim=1)[row] - expected[0, -7:]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stack_in_half_precision_is_finite_and_keeps_its_sum_in_float32(dtype):
    stack = build().to(dtype)
    tokens = torch.randint(WORDS, (2, N))
    with torch.no_grad():
        out, state = stack(tokens, None, stack.empty_state(tokens))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert all(layer.kv_sum.dtype == torch.float32 for layer in state.layers)


def test_a_long_row_steps_at_the_cost_of_a_short_one():
    """By the operations that run, not by the clock: none has a size that depends on the position."""
    stack = build(layers=1)

    def shapes(prefix):
        token = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            _, state = stack(torch.zeros(1, prefix, dtype=torch.long), None, stack.empty_state(token))
            with torch.profiler.profile(record_shapes=True) as profile:
                stack(token, None, state)
        operations = [event for event in profile.events() if event.name.startswith("aten::")]
        return [(event.name, str(event.input_shapes)) for event in operations]

    assert shapes(3) == shapes(4) == shapes(1000)
