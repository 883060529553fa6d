"""Proves the contract of flash_lm and its systems from outside: fairseq builds, calls, decodes; float64.

Every weight is drawn large, so that each branch, bias and norm matters. Tolerances are multiples of the
machine epsilon, relative to the largest value; the largest errors measured were 22 epsilon for logits, 82
for gradients, and 2.9 of the narrow type's in half precision.
"""

import copy
import math

import pytest
import torch

from support import contract, oracle
from support.contract import EPSILON, assert_close, draw, generation_settings

GRADIENT_TOLERANCE = 1000 * EPSILON
HALF_TOLERANCE = 10  # of the narrow type's epsilon, root mean square
CHUNK, LAYERS = 4, 3
SIZES = (
    *("--embed-dim", "8", "--layers", str(LAYERS), "--attention-dim", "6", "--expansion-factor", "2"),
    *("--chunk-size", str(CHUNK), "--dropout", "0.1", "--tokens-per-sample", "32"),
)
TRANSFORMER = ("--block", "transformer", "--attention-dim", "4")
KINDS = {
    "mixed_chunk": ("--linear-norm", "chunk", "--scaled-sin"),
    "mixed_chunk mean": ("--linear-norm", "mean"),
    "mixed_chunk rotary scalenorm": (
        *("--relative-bias", "rotary", "--norm", "scalenorm"),
        *("--linear-norm", "chunk"),
    ),
    "flash2": ("--arch", "flash2_lm"),
    "mixed_chunk shifted": ("--shift-keys", "--relative-bias", "toeplitz"),
    "local shifted": ("--attention", "local", "--shift-keys"),
    "global shifted fading": (
        *("--attention", "global", "--shift-keys", "--linear-norm", "fading"),
        *("--norm", "rmsnorm", "--scaled-sin"),
    ),
    "local": ("--attention", "local"),
    "global": ("--attention", "global", "--linear-norm", "chunk"),
    "global mean rmsnorm": ("--attention", "global", "--linear-norm", "mean", "--norm", "rmsnorm"),
    "quadratic": ("--attention", "quadratic", "--scaled-sin"),
    "quadratic toeplitz": ("--attention", "quadratic", "--relative-bias", "toeplitz"),
    "quadratic n_ref": ("--attention", "quadratic", "--n-ref", "7"),
    "transformer": (*TRANSFORMER, "--attention", "quadratic"),
    "transformer glu": (
        *(*TRANSFORMER, "--attention", "quadratic", "--glu"),
        *("--norm", "rmsnorm", "--scaled-sin"),
    ),
    "transformer mixed_chunk": (*TRANSFORMER, "--attention", "mixed_chunk", "--glu", "--linear-norm", "mean"),
    "transformer mixed_chunk chunk": (
        *(*TRANSFORMER, "--attention", "mixed_chunk", "--linear-norm", "chunk"),
        *("--norm", "scalenorm", "--ffn-embed-dim", "10"),
    ),
    "transformer mixed_chunk fading": (
        *TRANSFORMER,
        *("--attention", "mixed_chunk", "--linear-norm", "fading"),
    ),
    "transformer local": (*TRANSFORMER, "--attention", "local"),
    "transformer global": (*TRANSFORMER, "--attention", "global", "--linear-norm", "mean", "--glu"),
}
#: One token, less than a chunk, a chunk, several with and without a rest.
LENGTHS = (1, 3, 4, 7, 13, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a dictionary of 20 words."""
    folder = tmp_path_factory.mktemp("dictionary")
    contract.write_dictionary(folder / "dict.txt")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def built(data):
    """Each kind's model and task, built once."""
    return {kind: build(data, *arguments) for kind, arguments in KINDS.items()}


@pytest.fixture
def setup(built, kind):
    model, task = built[kind]
    return copy.deepcopy(model), task


@pytest.fixture
def model(setup):
    return setup[0]


def build(data, *arguments):
    """The model and its task, with telling weights."""
    arch = () if "--arch" in arguments else ("--arch", "flash_lm")
    model, task = contract.build(data, "language_modeling", *arch, *SIZES, *arguments)
    return contract.make_telling(model), task


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, src_lengths=torch.full((len(tokens),), tokens.shape[1]))[0]


def decode(model, tokens: torch.Tensor, ends, state=None) -> torch.Tensor:
    """The last logits of each prefix that ends in ``ends``, with a state, as fairseq's generator asks."""
    state = {} if state is None else state
    with torch.no_grad():
        return torch.cat([model(tokens[:, :end], incremental_state=state)[0] for end in ends], dim=1)


def oracle_parameters(model, parameters: dict | None = None) -> dict:
    """The parameters of fairseq's state dict under the oracle's names."""
    weights = dict(model.named_parameters()) if parameters is None else parameters
    stack = {name.removeprefix("decoder.stack."): weight for name, weight in weights.items()}
    layers = []
    for index in range(LAYERS):
        begin = f"blocks.{index}."
        own = {name.removeprefix(begin): w for name, w in stack.items() if name.startswith(begin)}
        layers.append(dict(layer_parameters(own), norm=norm_parameters(own, "norm")))
        if "ffn_in.weight" in own:
            layers[-1]["ffn_norm"] = norm_parameters(own, "ffn_norm")
    return dict(
        embedding=stack["embed_tokens.weight"],
        alpha=stack.get("embed_positions.alpha", 0.0),
        layers=layers,
        norm=norm_parameters(stack, "final_norm"),
        output_weight=weights["decoder.output_projection.weight"],
    )


def layer_parameters(weights: dict) -> dict:
    """A layer's parameters but for its norms."""
    found = {}
    for name, weight in weights.items():
        module, _, part = name.rpartition(".")
        if module in ("offset_scale", "bias"):
            found[part] = weight
        elif module in ("q_scale", "k_scale"):
            found[f"{module[0]}_{part}"] = weight[0]
        elif "norm" not in module:
            found[f"{module}_{part}"] = weight
    return found


def norm_parameters(weights: dict, name: str) -> dict:
    if f"{name}.scale" in weights:
        return dict(g=weights[f"{name}.scale"], eps=1e-5)
    found = {part: weights[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in weights}
    return dict(found, eps=1e-5)


def attention_of(kind: str) -> str:
    words = KINDS[kind]
    return words[words.index("--attention") + 1] if "--attention" in words else "mixed_chunk"


def expected_logits(model, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """What the oracle says of one row, (n, words), by the options in ``KINDS[kind]``."""
    words = [word for word in KINDS[kind] if word not in ("--scaled-sin", "--glu", "--shift-keys")]
    chosen = dict(zip(words[::2], words[1::2], strict=True))
    attention = attention_of(kind)
    norm = {"scalenorm": "scale_norm", "rmsnorm": "rms_norm"}.get(chosen.get("--norm"), "layer_norm")
    options = dict(norm=norm, attention=attention, chunk_size=CHUNK)
    flash2 = "--arch" in chosen
    options["linear_norm"] = chosen.get("--linear-norm", "fading" if flash2 else "mean")
    if "--block" in chosen:
        options.update(block="transformer", head_dim=4, glu="--glu" in KINDS[kind], embed_scale=8**0.5)
    else:
        bias = None if attention == "global" else chosen.get("--relative-bias", "rotary")
        options.update(causal=True, denominator=int(chosen.get("--n-ref", 32)), bias=bias)
        options["shift_keys"] = flash2 or "--shift-keys" in KINDS[kind]
    return oracle.stack(tokens, oracle_parameters(model), **options)


@pytest.mark.parametrize("length", [1, 3, 13])
def test_the_logits_are_those_of_the_paper(model, kind, length):
    tokens = draw(1, length)
    with torch.no_grad():
        assert_close(logits(model, tokens)[0], expected_logits(model, tokens[0], kind))


def test_the_gradients_are_those_of_the_paper(model, kind):
    tokens = draw(1, 9)
    weights = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        torch.autograd.grad((weights * out).sum(), list(model.parameters()), allow_unused=True)
        for out in (logits(model, tokens)[0], expected_logits(model, tokens[0], kind))
    )
    padding = model.decoder.padding_idx
    for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert ours is not None, name
        if "embed_tokens" in name:
            assert not ours[padding].any()
        assert_close(ours, theirs, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("length", [7, 13])
def test_a_token_never_sees_its_future(model, length):
    tokens = draw(2, length)
    with torch.no_grad():
        before = logits(model, tokens)
        for position in range(length):
            changed = tokens.clone()
            changed[:, position:] = (changed[:, position:] - 3) % 16 + 4
            assert torch.equal(logits(model, changed)[:, :position], before[:, :position])


def test_a_token_sees_its_own_chunk_and_earlier_ones_as_its_attention_says(model, kind):
    tokens = draw(1, 13)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] - 3) % 16 + 4
    with torch.no_grad():
        seen = (logits(model, changed) != logits(model, tokens)).any(dim=2)[0].tolist()
    own = attention_of(kind) != "global"
    # The first key of a chunk may be half of the token before it.
    later = attention_of(kind) != "local" or "--shift-keys" in KINDS[kind]
    assert seen == [False] * 4 + [True] + [own] * 3 + [later] * 5


def test_a_prefix_gives_what_the_whole_row_gives(model):
    tokens = draw(2, 18)
    with torch.no_grad():
        whole = logits(model, tokens)
        for length in range(1, 18):
            assert_close(logits(model, tokens[:, :length]), whole[:, :length])


@pytest.mark.parametrize("ends", [range(1, 19), (5, *range(6, 19)), (3, 4, 10, 18), (18,)])
def test_decoding_gives_what_training_computes(model, ends):
    tokens = draw(3, 18)
    with torch.no_grad():
        expected = logits(model, tokens)[:, [end - 1 for end in ends]]
    assert_close(decode(model, tokens, ends), expected)


@pytest.mark.parametrize(("order", "switch"), [([2, 0, 0, 1], 3), ([1, 1, 1], 4), ([2], 10), ([0, 2], 7)])
def test_decoding_goes_on_after_rows_are_reordered_repeated_and_dropped(model, order, switch):
    before, after, state = draw(3, switch), draw(len(order), 8, seed=1), {}
    order = torch.tensor(order)
    decode(model, before, range(1, switch + 1), state)
    model.decoder.reorder_incremental_state_scripting(state, order)
    tokens = torch.cat((before[order], after), dim=1)
    with torch.no_grad():
        expected = logits(model, tokens)[:, switch:]
    assert_close(decode(model, tokens, range(switch + 1, switch + 9), state), expected)


def generate(model, task, incremental: bool, prefixes=None, rows: int = 3, **arguments):
    """Hypotheses of fairseq's generator; without a state it computes the whole prefix at every step."""
    settings = copy.deepcopy(generation_settings("language_modeling"))
    for name, value in arguments.items():
        settings[name] = value
    torch.manual_seed(1)
    generator = task.build_generator([model], settings)
    assert generator.model.has_incremental
    generator.model.has_incremental = incremental
    tokens = torch.full((rows, 1), task.source_dictionary.eos())
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": torch.ones(rows)}}
    return task.inference_step(generator, [model], sample, prefix_tokens=prefixes)


@pytest.mark.parametrize(
    "arguments",
    [dict(beam=1), dict(beam=4, temperature=0.5), dict(beam=3, sampling=True, sampling_topk=5)],
    ids=["greedy", "beam", "sampling"],
)
@pytest.mark.parametrize("prompts", [False, True], ids=["no prompt", "prompts of 2, 3 and 6 words"])
def test_a_beam_search_finds_what_it_finds_without_a_state(setup, arguments, prompts):
    model, task = setup
    prefixes = None
    if prompts:
        prefixes = draw(3, 6)
        prefixes[0, 2:] = prefixes[1, 3:] = task.source_dictionary.pad()
    found, expected = (
        generate(model, task, incremental, prefixes, max_len_b=14, **arguments)
        for incremental in (True, False)
    )
    assert {len(hypothesis["tokens"]) for row in found for hypothesis in row} != {1}
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one["positional_scores"], other["positional_scores"])


def test_a_beam_search_finds_the_same_while_its_batch_shrinks(setup):
    model, task = setup
    prompts, sizes, forward = draw(6, 8), [], model.decoder.forward
    for row, length in enumerate((1, 2, 5, 7, 8, 3)):
        prompts[row, length:] = task.source_dictionary.pad()
        if row not in (0, 3):
            prompts[row, length - 1] = task.source_dictionary.eos()
    model.decoder.forward = lambda tokens, **kwargs: sizes.append(len(tokens)) or forward(tokens, **kwargs)
    found, expected = (
        generate(model, task, incremental, prompts, rows=6, max_len_b=14, beam=2)
        for incremental in (True, False)
    )
    assert len(set(sizes)) >= 4, "sentences end at different steps"
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]


@pytest.mark.parametrize("side", ["leading", "trailing"])
@pytest.mark.parametrize("amount", [1, 4, 9])
def test_padding_and_neighbours_change_nothing(model, side, amount):
    pad = model.decoder.padding_idx
    with torch.no_grad():
        model.decoder.stack.embed_tokens.weight[pad] = math.nan
        for length in LENGTHS:
            tokens = torch.full((3, length + amount), pad)
            span = slice(amount, None) if side == "leading" else slice(length)
            tokens[0, span] = draw(1, length)[0]
            tokens[1] = draw(1, length + amount, seed=1)[0]
            tokens[2, -1] = 5
            assert_close(logits(model, tokens)[:1, span], logits(model, draw(1, length)))


def test_a_row_of_padding_alone_gives_finite_numbers_and_gradients(model):
    model.train()
    tokens = draw(3, 7)
    tokens[1] = model.decoder.padding_idx
    out = logits(model, tokens)
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert logits(model, torch.full((1, 5), model.decoder.padding_idx)).isfinite().all()


def test_padding_between_words_is_a_word(model):
    tokens = draw(2, 7)
    tokens[0, 3] = model.decoder.padding_idx
    tokens[1, 5:] = model.decoder.padding_idx
    found, read_at_once = logits(model, tokens), model(tokens[:1], incremental_state={})[0]
    tokens[0, 3] = model.decoder.dictionary.unk()
    assert torch.equal(found, logits(model, tokens))
    assert torch.equal(read_at_once, model(tokens[:1], incremental_state={})[0])


def test_dropout_is_the_options_and_only_in_training(model):
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    tokens = draw(1, 9)
    with torch.no_grad():
        assert torch.equal(logits(model, tokens), logits(model, tokens))
        model.train()
        assert not torch.equal(logits(model, tokens), logits(model, tokens))


def test_one_chunk_as_long_as_the_row_is_the_quadratic_attention(data):
    sizes = ("--relative-bias", "toeplitz", "--chunk-size", "16")
    local, _ = build(data, "--attention", "local", *sizes)
    quadratic, _ = build(
        data, "--attention", "quadratic", "--n-ref", "16", *sizes, "--change-trained-options"
    )
    weights = quadratic.state_dict()
    kept = weights["_extra_state"]  # says what they were trained with, which is not the same
    weights.update(local.state_dict() | {"_extra_state": kept})
    quadratic.load_state_dict(weights)
    with torch.no_grad():
        for length in LENGTHS:
            assert_close(logits(local, draw(2, length)), logits(quadratic, draw(2, length)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(model, dtype):
    tokens = draw(2, 18)
    with torch.no_grad():
        expected = logits(model, tokens)
        model.to(dtype)
        for found in (logits(model, tokens), decode(model, tokens, range(1, 19))):
            assert found.dtype == dtype
            error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert error <= HALF_TOLERANCE * torch.finfo(dtype).eps


def tensors(state) -> list[torch.Tensor]:
    """Every tensor inside dicts and tuples."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_the_state_has_the_size_of_the_paper_at_every_position(model, kind):
    tokens, d, c = draw(2, 40), 8, CHUNK
    s, e, copies = (4, 4, 2) if kind.startswith("transformer") else (6, 2 * d, 1)
    quad, lin = c * s, c * s + s * e
    per_head = {"mixed_chunk": quad + lin, "local": quad, "global": lin}.get(attention_of(kind))
    if per_head is None:
        pytest.skip("keys and values of every token")
    base = s if model.decoder.stack.blocks[0].describe_state(torch.empty(1, 0)).before is not None else 0
    sizes, state = [], {}
    for end in range(1, tokens.shape[1] + 1):
        decode(model, tokens, [end], state)
        sizes.append(sum(tensor.numel() for tensor in tensors(state)))
    assert set(sizes) == {2 * LAYERS * (copies * (per_head + c * e) + base + 1)}


def test_there_is_no_maximum_length(model, kind):
    assert model.max_positions() == model.decoder.max_positions() == 2**30
    if "toeplitz" in kind:
        with pytest.raises(ValueError, match=r"33 tokens .* limit is 32"):
            logits(model, draw(1, 33))
    else:
        assert logits(model, draw(1, 67)).isfinite().all()
