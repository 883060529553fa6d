"""Proves that candidates of the linear branch are what their formulas say, see no future, and have a size."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from fairseq.data import Dictionary

from ablation.candidate_layers import CandidateUnit, Choice, Convolution
from ablation.candidate_states import (
    decayed_states,
    delta_states,
    faded_means,
    grouped_norm,
    half_lives,
    summed_states,
)
from ablation.candidate_systems import BASES, CHANGES, OF_LINEAR, OURS, Size, build, describe, parse_system
from fairseq_flash.modules import GatedAttentionUnit
from fairseq_flash.ops.mixed_chunk.reference import to_chunks
from support import oracle
from support.contract import write_dictionary

#: Sums in another order, in float64; 2e-14 measured.
close = partial(torch.testing.assert_close, rtol=0, atol=1e3 * torch.finfo(torch.float64).eps)
SIZE = Size(embed_dim=32, layers=2, chunk_size=8, attention_dim=16, tokens_per_sample=32)
TOGETHER = ("flash+convzv+data+delta+sigmoid+norope", "flash+shiftz+decaylearn+l2+randchunk+hybrid")
CANDIDATES = [
    *(f"{base}+{change}" for base in OURS[::2] for change in CHANGES),
    "flash_chunk+conv",
    *TOGETHER,
]
CANDIDATES = [name for name in CANDIDATES if not (name[:5] == "local" and name[6:] in OF_LINEAR)]


@pytest.fixture
def dictionary(tmp_path):
    write_dictionary(tmp_path / "dict.txt")
    return Dictionary.load(str(tmp_path / "dict.txt"))


def built(name, dictionary, noise=0.0):
    torch.manual_seed(1)
    model = build(parse_system(name), SIZE, dictionary).double().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # A bias that is negative at every distance leaves the quadratic branch nothing.
            weight.add_(noise * torch.randn_like(weight) * (".bias." not in key))
    return model


def logits(model, tokens):
    return model.output_layer(model.stack(tokens)[0])


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", [*BASES, *CANDIDATES])
def test_a_token_never_sees_its_future_and_all_learn(name, dictionary):
    model = built(name, dictionary, noise=0.1)
    tokens = torch.randint(4, 20, (2, 29))
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] - 3) % 16 + 4
    before, after = logits(model, tokens), logits(model, changed)
    close(after[:, :17], before[:, :17])
    assert (after[:, 17] - before[:, 17]).abs().min() > 1e-9
    before.logsumexp(-1).sum().backward()
    for key, weight in model.named_parameters():
        unused = key.endswith("log_rate") and "learn" not in name and "data" not in name
        assert unused or weight.grad.isfinite().all(), key
        assert unused or weight.grad.any() or "temperature" in key, key


@pytest.mark.parametrize("name", [name for name in CANDIDATES if "hybrid" not in name])
def test_a_distant_token_is_seen_by_all_but_local_ones(name, dictionary):
    model = built(name, dictionary, noise=0.1)
    tokens = torch.randint(4, 20, (1, 61))
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] - 3) % 16 + 4
    seen = (logits(model, tokens) - logits(model, changed))[0, 32:].abs().max() > 1e-9
    assert seen == name.startswith("flash")


def by_hand(unit, x):
    """The unit on a row (n, d), token by token, and chunk by chunk where the delta rule is."""
    choice, c, s, e = unit.choice, unit.chunk_size, unit.attention_dim, unit.expanded_dim
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], unit.norm.weight, unit.norm.bias)
    u, v, z = (normed @ unit.uvz.weight.T + unit.uvz.bias).split([e, e, s], dim=-1)
    z = convolved(z, unit.conv_z.taps) if choice.conv else z
    v = convolved(v, unit.conv_v.taps) if choice.conv == "zv" else v
    u, v, z = u.sigmoid() if choice.sigmoid else oracle.silu(u), oracle.silu(v), oracle.silu(z)
    before = z.clone()
    for column in range(s):
        if column % (s // 2) % 2 == 1:
            before[1:, column], before[0, column] = z[:-1, column], 0
    bases = [before if choice.shift == "z" or (choice.shift and copy % 2) else z for copy in range(4)]
    copies = [unit.offset_scale.gamma[i] * base + unit.offset_scale.beta[i] for i, base in enumerate(bases)]
    for copy in copies[:2] if choice.plain_linear else copies:
        copy[:] = torch.stack([oracle.rotary(row, i) for i, row in enumerate(copy)])
    q_quad, k_quad, q, k = copies
    if choice.unit_length:
        q, k = (rows / rows.norm(dim=-1, keepdim=True) for rows in (q, k))
        q = q * unit.temperature
    log_decay = torch.zeros(len(x), unit.groups, dtype=x.dtype)
    if choice.decay:
        log_decay[:, :-1] = -unit.log_rate.exp()
    if choice.decay == "data":
        log_decay *= torch.nn.functional.softplus(unit.factor(normed))
    keep = log_decay.exp().repeat_interleave(e // unit.groups, dim=-1)
    fade = torch.ones(unit.groups, dtype=x.dtype)
    if choice.fade:
        fade[:-1] = 0.5 ** (c / half_lives(unit.groups, c))
    fade = fade.repeat_interleave(e // unit.groups)
    state, out, count = torch.zeros(s, e, dtype=x.dtype), torch.zeros_like(u), torch.zeros_like(fade)
    for begin in range(0, len(x), c):
        end = min(begin + c, len(x))
        for i in range(begin, end):
            for j in range(begin, i + 1):
                bias = oracle.rotary_bias(unit.bias.a, unit.bias.b, i, j)
                out[i] += (q_quad[i] @ k_quad[j] / c + bias).relu() ** 2 * v[j]
            found = q[i] @ state
            if choice.norm:
                groups = found.view(unit.groups, -1)
                found = (
                    groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                ).flatten() * unit.gain
            out[i] += found if choice.norm else found / count.clamp(min=1)
        kept, size = keep[begin:end].prod(0), 1.0
        added = torch.zeros_like(state)
        if choice.delta:
            size = max(1.0, float(torch.linalg.matrix_norm(k[begin:end].T @ k[begin:end])))
        for j in range(begin, end):
            new = v[j]
            if choice.delta:
                new = unit.write(normed[j]).sigmoid() * (v[j] - k[j] @ (state * kept))
            added += torch.outer(k[j], new * keep[j + 1 : end].prod(0))
        state, count = state * kept * fade + added / size, count * fade + c
    return x + (u * out) @ unit.out.weight.T + unit.out.bias


def convolved(x, taps):
    return torch.stack(
        [sum(taps[3 - back] * x[i - back] for back in range(min(4, i + 1))) for i in range(len(x))]
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in CANDIDATES if name[:6] == "flash+" and "hybrid" not in name]
)
def test_a_unit_is_its_formula(name, dictionary):
    unit = built(name, dictionary, noise=0.1).stack.blocks[0]
    x = drawn(1, 29, 32)
    close(unit(x)[0][0], by_hand(unit, x[0]))


@pytest.mark.parametrize("base", OURS)
def test_a_candidate_without_a_choice_is_the_packages_layer(base, dictionary):
    model = built(base, dictionary, noise=0.1)
    for n in (1, 7, 8, 29):
        tokens = torch.randint(4, 20, (2, n))
        expected = logits(model, tokens)
        other = built(base, dictionary, noise=0.1)
        for index, block in enumerate(other.stack.blocks):
            unit = CandidateUnit(32, Choice(), attention=block.attention, attention_dim=16, chunk_size=8,
                                 linear_norm=block.linear_norm).double()  # fmt: skip
            unit.load_state_dict(block.state_dict())
            other.stack.blocks[index] = unit
        close(logits(other, tokens), expected)


@pytest.mark.parametrize("name", CANDIDATES)
def test_all_have_the_size_of_flash(name, dictionary):
    size = SIZE._replace(embed_dim=128, attention_dim=32, layers=6, chunk_size=32)
    count, of_flash = (
        sum(map(torch.numel, build(parse_system(one), size, dictionary).parameters()))
        for one in (name, "flash")
    )
    assert abs(count / of_flash - 1) < 0.05


@pytest.mark.parametrize("base", BASES)
def test_bases_have_the_size_of_flash(base, dictionary):
    size = Size(512, 4, 256, 128, 4096)
    count, of_flash = (
        sum(map(torch.numel, build(parse_system(one), size, dictionary).parameters()))
        for one in (base, "flash")
    )
    assert abs(count / of_flash - 1) < 0.05


def test_a_convolution_is_nothing_at_the_start_and_causal():
    convolution, x = Convolution(3).double(), drawn(2, 9, 3)
    assert torch.equal(convolution(x), x)
    torch.nn.init.normal_(convolution.taps)
    expected = torch.zeros_like(x)
    for i in range(9):
        for back in range(min(4, i + 1)):
            expected[:, i] += convolution.taps[3 - back] * x[:, i - back]
    close(convolution(x), expected)


@pytest.mark.parametrize(("n", "c"), [(1, 4), (4, 4), (7, 4), (23, 4), (24, 8)])
def test_decayed_states_are_sums_that_forget_with_every_token(n, c):
    k, v = drawn(2, n, 6), drawn(2, n, 8)
    log_decay = -drawn(2, n, 4).exp()
    found = decayed_states(*(to_chunks(x, c) for x in (k, v, log_decay)))
    state = torch.zeros(2, 6, 8, dtype=torch.float64)
    for i in range(n):
        if i % c == 0:
            close(found[:, i // c], state)
        keep = log_decay[:, i].exp().repeat_interleave(2, dim=-1)
        state = state * keep[:, None] + k[:, i, :, None] * v[:, i, None]


def test_without_decay_they_are_sums():
    k, v = drawn(2, 5, 4, 6), drawn(2, 5, 4, 8)
    close(decayed_states(k, v, torch.zeros(2, 5, 4, 2, dtype=torch.float64)), summed_states(k, v))


@pytest.mark.parametrize("decays", [False, True])
def test_delta_states_are_corrected_once_a_chunk(decays):
    k, v = torch.nn.functional.normalize(drawn(2, 5, 4, 6), dim=-1), drawn(2, 5, 4, 8)
    beta, log_decay = drawn(2, 5, 4).sigmoid(), -drawn(2, 5, 4, 2).exp() * decays
    found = delta_states(k, v, beta, log_decay if decays else None)
    for b in range(2):
        state = torch.zeros(6, 8, dtype=torch.float64)
        for g in range(5):
            close(found[b, g], state)
            step, kept = torch.zeros_like(state), log_decay[b, g].sum(0).exp().repeat_interleave(4)
            for j in range(4):
                left = log_decay[b, g, j + 1 :].sum(0).exp().repeat_interleave(4)
                wrong = v[b, g, j] - k[b, g, j] @ (state * kept)
                step += torch.outer(k[b, g, j], beta[b, g, j] * left * wrong)
            size = max(1.0, float(torch.linalg.matrix_norm(k[b, g].T @ k[b, g])))
            state = state * kept + step / size


def test_the_delta_rule_stays_bounded_when_all_keys_are_alike():
    k = torch.nn.functional.normalize(1 + 0.01 * drawn(1, 200, 16, 8), dim=-1)
    states = delta_states(k, drawn(1, 200, 16, 4), torch.ones(1, 200, 16, dtype=torch.float64), None)
    assert states.abs().max() < 4


def test_a_grouped_norm_gives_each_group_its_gain():
    x, gain = drawn(3, 5, 12), drawn(12)
    expected = torch.cat(
        [part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in x.split(4, -1)], -1
    )
    close(grouped_norm(x, gain, 3), expected * gain)


def test_half_lives_go_from_one_chunk_to_64():
    lives = half_lives(16, 256)
    assert len(lives) == 15
    assert (float(lives[0]), float(lives[-1])) == pytest.approx((256, 64 * 256))


@pytest.mark.parametrize("decay", ["fixed", "learned", "data"])
def test_a_group_halves_in_its_half_life_and_the_last_never(decay):
    unit = CandidateUnit(16, Choice(norm=True, decay=decay), attention_dim=4, chunk_size=8).double()
    rates = unit._log_decay(drawn(1, 2, 8, 16))[0, 0, 0]
    close(rates[:-1] * half_lives(unit.groups, 8).double(), torch.full((15,), -math.log(2)).double(),
          atol=1e-5)  # fmt: skip
    assert rates[-1] == 0


def test_scores_do_not_depend_on_the_chunk_that_was_drawn():
    unit = CandidateUnit(16, Choice(random_chunk=True), attention="local", attention_dim=4, chunk_size=8)
    x = torch.randn(1, 8, 16)
    whole = unit(x)[0]
    unit.current_chunk = 4
    torch.testing.assert_close(unit(x)[0][:, :4], whole[:, :4])


def test_every_name_says_what_is_different():
    assert describe(parse_system("flash+convzv+decay")) == (
        "flash with {'conv': 'zv', 'norm': True, 'decay': 'fixed'}"
    )
    assert {field.name for field in dataclasses.fields(Choice)} - {"groups"} == {
        field for change in CHANGES.values() for field in change
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flush", "'flush' is unknown; allowed: flash, flash2, flash_chunk, local"),
        ("flash+smear", "'smear' is not allowed with flash; allowed: norm, decay"),
        ("local+decay", "'decay' is not allowed with local; allowed: shift, shiftz"),
        ("quad+conv", "'conv' is not allowed with quad; allowed: no change"),
        ("flash+decay+data", "'data' is another decay; allowed: one of them"),
    ],
)
def test_a_wrong_name_is_told_what_is_allowed(name, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        parse_system(name)


def test_padding_and_states_are_refused():
    unit = CandidateUnit(16, Choice(), attention_dim=4, chunk_size=8)
    x = torch.zeros(1, 3, 16)
    for more in (dict(padding_mask=torch.ones(1, 3, dtype=torch.bool)), dict(state=unit.empty_state(x))):
        with pytest.raises(ValueError, match="allowed: whole rows"):
            unit(x, **more)


def test_starts_are_those_of_the_package(dictionary):
    block, changed = (built(name, dictionary).stack.blocks[1] for name in ("flash", "flash+convzv+data"))
    assert isinstance(block, GatedAttentionUnit)
    for key, weight in block.state_dict().items():
        assert torch.equal(changed.state_dict()[key], weight), key


def test_faded_means_are_means_that_forget_chunk_by_chunk():
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 5, 4, width, dtype=torch.float64, generator=generator) for width in (6, 8))
    kept = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found, kept = faded_means(k, v, kept), kept.repeat_interleave(4)
    total, count = torch.zeros(2, 6, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for g in range(5):
        close(found[:, g], total / count.clamp(min=1))
        total, count = kept * total + k[:, g].mT @ v[:, g], kept * count + 4
