"""Proves that a stack counts positions from the first real token, decodes as it trains, and reorders rows."""

import pytest
import torch
from torch import nn

from fairseq_flash.modules import GatedAttentionUnit, Stack, TransformerBlock
from support import as_oracle, oracle

TOLERANCE = 1024 * torch.finfo(torch.float64).eps  # absolute; measured: 130 eps
D, WORDS, N = 8, 11, 13
ATTENTIONS = ["mixed_chunk", "quadratic", "local", "global"]
KINDS = [*ATTENTIONS, *(f"transformer {attention}" for attention in ATTENTIONS)]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind="mixed_chunk", layers=3, **options):
    *transformer, attention = kind.split()
    if transformer:
        size, block, oracle_of = 4, TransformerBlock, as_oracle.transformer
        blocks = [block(D, attention=attention, attention_dim=size, chunk_size=4) for _ in range(layers)]
    else:
        size, block, oracle_of = 6, GatedAttentionUnit, as_oracle.unit
        sizes = dict(attention_dim=size, chunk_size=4, n_ref=N)
        blocks = [block(D, attention=attention, **sizes) for _ in range(layers)]
    stack = Stack(nn.Embedding(WORDS, D), blocks, embed_dim=D, attention_dim=size, **options).eval()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    stack.oracles = [oracle_of(block) for block in blocks]
    return stack


@pytest.mark.parametrize("options", [dict(scaled_sin=True), dict(embed_scale=3.0)], ids=str)
@every_kind
def test_a_padded_batch_is_the_oracle_of_each_row(kind, options):
    stack = build(kind, **options)
    alpha = stack.embed_positions.alpha if "scaled_sin" in options else 0.0
    scale = options.get("embed_scale", 1.0)
    tokens = torch.randint(WORDS, (3, N))
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[0, :5] = mask[1, 9:] = True
    _, final_norm = as_oracle.norm(stack.final_norm)

    def function(row):
        words = stack.embed_tokens.weight[row]
        x = torch.stack([scale * word + oracle.scaled_sin(i, D, alpha) for i, word in enumerate(words)])
        for block in stack.oracles:
            x = block(x)
        return torch.stack([oracle.layer_norm(x_i, **final_norm) for x_i in x])

    expected = oracle.padded(function, mask, tokens)
    ours, _ = stack(tokens, mask)
    assert (ours - expected).abs().max() <= TOLERANCE


@every_kind
@torch.no_grad()
def test_reordered_and_dropped_rows_go_on_as_if_they_had_always_been_there(kind):
    stack = build(kind)
    tokens = torch.randint(WORDS, (4, N))
    order = torch.tensor([2, 0, 2])
    _, state = stack(tokens[:, :6], None, stack.empty_state(tokens))
    state = state.reorder(order)
    rows = torch.cat((tokens[order, :6], torch.randint(WORDS, (3, N - 6))), dim=1)
    expected, _ = stack(rows)
    for t in range(6, N):
        out, state = stack(rows[:, t : t + 1], None, state)
        assert (out[:, 0] - expected[:, t]).abs().max() <= TOLERANCE


COPIES = {
    "reordered": lambda state: state.reorder(torch.tensor([0, 1])),
    "no row anew": lambda state: state.start_anew(torch.tensor([False, False])),
}


@every_kind
@pytest.mark.parametrize("copied", COPIES)
@torch.no_grad()
def test_a_copied_state_shares_no_memory_with_the_old(kind, copied):
    stack, copy = build(kind), COPIES[copied]
    tokens = torch.arange(6).expand(2, 6)
    _, state = stack(tokens, None, stack.empty_state(tokens))

    def after_two_steps(state, between):
        """The second step reads what the first has written, unless one on ``between`` lay over it."""
        _, state = stack(tokens[:, :1], None, state)
        stack(tokens[:, 5:], None, between)
        return stack(tokens[:, 1:2], None, state)[0]

    other = stack.empty_state(tokens)
    expected = after_two_steps(copy(state), other)
    for between in (copy(state), state):
        assert torch.equal(after_two_steps(copy(state), between), expected)


@every_kind
@torch.no_grad()
def test_some_rows_start_anew_and_the_others_go_on(kind):
    stack = build(kind)
    tokens = torch.randint(WORDS, (3, N))
    _, state = stack(tokens[:, :6], None, stack.empty_state(tokens))
    state = state.start_anew(torch.tensor([False, True, False]))
    found, state = stack(tokens[:, 6:], None, state)
    whole, anew = stack(tokens)[0][:, 6:], stack(tokens[:, 6:])[0]
    for row, expected in enumerate((whole, anew, whole)):
        assert (found[row] - expected[row]).abs().max() <= TOLERANCE
    assert state.position.tolist() == [N, N - 6, N]


@every_kind
@torch.no_grad()
def test_ragged_prompts_go_on_token_by_token(kind):
    stack = build(kind)
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


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stack_in_half_precision_is_finite_and_keeps_its_sum_in_float32(dtype, kind):
    stack = build(kind).to(dtype)
    tokens = torch.randint(WORDS, (2, N))
    with torch.no_grad():
        out, state = stack(tokens, None, stack.empty_state(tokens))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    sums = [getattr(layer, "kv_sum", None) for layer in state.layers]
    assert (sums[0] is not None) == (kind.split()[-1] in ("mixed_chunk", "global"))
    assert all(kv_sum is None or kv_sum.dtype == torch.float32 for kv_sum in sums)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "quadratic" not in kind])
def test_a_long_row_steps_at_the_cost_of_a_short_one(kind):
    """By the operations that run, not by the clock: none has a size that depends on the position."""
    stack = build(kind, layers=1)

    def shapes(prefix):
        token = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            _, state = stack(torch.zeros(1, prefix, dtype=torch.long), None, stack.empty_state(token))
            with torch.profiler.profile(record_shapes=True) as profile:
                stack(token, None, state)
        operations = [event for event in profile.events() if event.name.startswith("aten::")]
        return [(event.name, str(event.input_shapes)) for event in operations]

    assert shapes(3) == shapes(4) == shapes(1000)
