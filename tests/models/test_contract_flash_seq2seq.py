"""Proves the contract of flash_seq2seq from outside: fairseq builds, calls, decodes; float64.

Every weight is drawn large, so that each branch, bias and norm matters. Tolerances are multiples of the
machine epsilon, relative to the largest value; the largest errors measured were 31 epsilon for logits, 384
for gradients, and 3.6 of the narrow type's in half precision.
"""

import copy
import functools
import math

import pytest
import torch

from support import as_oracle, contract, oracle
from support.contract import EPSILON, assert_close, generation_settings

GRADIENT_TOLERANCE = 1000 * EPSILON
HALF_TOLERANCE = 10  # of the narrow type's epsilon, root mean square
CHUNK, PAD, EOS = 4, 1, 2
SIZES = (
    *("--embed-dim", "8", "--encoder-layers", "2", "--decoder-layers", "2", "--attention-dim", "6"),
    *("--chunk-size", str(CHUNK), "--dropout", "0.1", "--max-target-positions", "32"),
)
ALIKE = ("--share-all-embeddings", "--target-lang", "alike")
KINDS = {
    "mixed_chunk": ("--linear-norm", "chunk", "--scaled-sin"),
    "mixed_chunk alike": ("--linear-norm", "mean", *ALIKE),
    "mixed_chunk table": ("--relative-bias", "toeplitz", "--norm", "scalenorm"),
    "mixed_chunk shifted": ("--shift-keys", "--linear-norm", "mean"),
    "local": ("--attention", "local", "--norm", "rmsnorm"),
    "global": ("--attention", "global", "--linear-norm", "chunk", "--share-decoder-input-output-embed"),
    "quadratic": ("--attention", "quadratic", "--scaled-sin"),
    "quadratic toeplitz": ("--attention", "quadratic", "--relative-bias", "toeplitz", "--n-ref", "33"),
}
#: Of the words that every dictionary has.
draw = functools.partial(contract.draw, words=17)
#: Of source and target: one token, less than a chunk, a chunk, several with and without a rest.
LENGTHS = ((1, 1), (3, 7), (13, 4), (8, 13))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with dictionaries: of 20 words for the source, the same again, and of 17 for the target."""
    folder = tmp_path_factory.mktemp("dictionaries")
    for language in ("source", "alike"):
        contract.write_dictionary(folder / f"dict.{language}.txt")
    contract.write_dictionary(folder / "dict.target.txt", "qrstuvwxyzabc")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def built(data):
    """Each kind's model and task, built once."""
    return {kind: build(data, *arguments) for kind, arguments in KINDS.items()}


@pytest.fixture(scope="module")
def others(data):
    """As ``built``, with other weights."""
    return {kind: build(data, *arguments, seed="other")[0] for kind, arguments in KINDS.items()}


@pytest.fixture
def setup(built, kind):
    model, task = built[kind]
    return copy.deepcopy(model), task


@pytest.fixture
def model(setup):
    return setup[0]


def build(data, *arguments, seed: str = ""):
    """The model and its task, with telling weights."""
    words = ["--arch", "flash_seq2seq", *SIZES, "--source-lang", "source"]
    words += [] if "--target-lang" in arguments else ["--target-lang", "target"]
    model, task = contract.build(data, "translation", *words, *arguments)
    return contract.make_telling(model, seed, lifting=(".bias.", "_scale.beta")), task


def logits(model, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return model(source, source.ne(PAD).sum(1), target)[0]


def decode(model, encoder_out, target: torch.Tensor, ends, state: dict | None = None) -> torch.Tensor:
    """Last logits of the prefixes that end at ``ends``, one call after another on one state."""
    state = {} if state is None else state
    with torch.no_grad():
        outs = [model.decoder(target[:, :end], encoder_out, incremental_state=state)[0] for end in ends]
    assert all(out.shape[1] == 1 for out in outs)
    return torch.cat(outs, dim=1)


def expected_logits(model, source: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """What the oracle says of one row, (n, words), by the options in ``KINDS[kind]``."""
    words = [word for word in KINDS[kind] if not word.startswith(("--share", "--scaled", "--shift"))]
    chosen = dict(zip(words[::2], words[1::2], strict=True))
    attention = chosen.get("--attention", "mixed_chunk")
    norm = {"scalenorm": "scale_norm", "rmsnorm": "rms_norm"}.get(chosen.get("--norm"), "layer_norm")
    return oracle.sequence_to_sequence(
        source,
        target,
        as_oracle.sequence_to_sequence_parameters(model),
        norm=norm,
        n_ref=int(chosen.get("--n-ref", 32)) if attention == "quadratic" else None,
        attention=attention,
        chunk_size=CHUNK,
        linear_norm=chosen.get("--linear-norm", "mean"),
        bias=None if attention == "global" else chosen.get("--relative-bias", "rotary"),
        shift_keys="--shift-keys" in KINDS[kind],
    )


@pytest.mark.parametrize(("m", "n"), LENGTHS)
def test_the_logits_are_those_of_the_definition(model, kind, m, n):
    source, target = draw(1, m), draw(1, n, seed=1)
    with torch.no_grad():
        expected = expected_logits(model, source[0], target[0], kind)
        assert_close(logits(model, source, target)[0], expected)


def test_the_gradients_are_those_of_the_definition(model, kind):
    source, target = draw(1, 6), draw(1, 9, seed=1)
    expected = expected_logits(model, source[0], target[0], kind)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        torch.autograd.grad((weights * out).sum(), list(model.parameters()), allow_unused=True)
        for out in (logits(model, source, target)[0], expected)
    )
    for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted, strict=True):
        assert ours is not None, name
        assert_close(ours, theirs, GRADIENT_TOLERANCE)


def test_a_target_token_never_sees_its_future_and_always_sees_the_whole_source(model):
    source, target = draw(2, 9), draw(2, 13, seed=1)
    with torch.no_grad():
        before = logits(model, source, target)
        for position in range(13):
            changed = target.clone()
            changed[:, position:] = (changed[:, position:] - 3) % 13 + 4
            assert torch.equal(logits(model, source, changed)[:, :position], before[:, :position])
        for position in range(9):
            changed = source.clone()
            changed[:, position] = (changed[:, position] - 3) % 13 + 4
            assert (logits(model, changed, target) != before).any(dim=2).all()


def test_a_prefix_gives_what_the_whole_target_gives(model):
    source, target = draw(2, 9), draw(2, 18, seed=1)
    with torch.no_grad():
        whole = logits(model, source, target)
        for length in range(1, 18):
            assert_close(logits(model, source, target[:, :length]), whole[:, :length])


@pytest.mark.parametrize("ends", [range(1, 19), (5, *range(6, 19)), (3, 4, 10, 18), (18,)])
def test_decoding_gives_what_training_computes(model, ends):
    source, target = draw(3, 9), draw(3, 18, seed=1)
    source[0, :4] = source[1, 7:] = PAD
    with torch.no_grad():
        expected = logits(model, source, target)[:, [end - 1 for end in ends]]
        encoder_out = model.encoder(source)
    assert_close(decode(model, encoder_out, target, ends), expected)


@pytest.mark.parametrize(("order", "switch"), [([2, 0, 0, 1], 3), ([1, 1, 1], 4), ([2], 10), ([0, 2], 7)])
def test_decoding_goes_on_after_rows_are_reordered_repeated_and_dropped(model, order, switch):
    source, before, state = draw(3, 9), draw(3, switch, seed=1), {}
    source[1, :5] = source[2, 6:] = PAD
    after, order = draw(len(order), 8, seed=2), torch.tensor(order)
    with torch.no_grad():
        encoder_out = model.encoder(source)
    decode(model, encoder_out, before, range(1, switch + 1), state)
    model.decoder.reorder_incremental_state_scripting(state, order)
    encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
    target = torch.cat((before[order], after), dim=1)
    with torch.no_grad():
        expected = logits(model, source[order], target)[:, switch:]
        fresh = decode(model, encoder_out, target, [switch + 8])
    assert_close(decode(model, encoder_out, target, range(switch + 1, switch + 9), state), expected)
    assert_close(fresh, expected[:, -1:])


def test_the_source_is_read_once_and_not_again_at_each_step(model):
    source, target, state = draw(2, 9), draw(2, 6, seed=1), {}
    layers = [block.cross_attention for block in model.decoder.stack.blocks]
    calls = []
    for layer in layers:
        layer.vz.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        encoder_out = model.encoder(source)
    decode(model, encoder_out, target, range(1, 7), state)
    assert len(calls) == len(layers)


def test_two_models_share_no_state(model, others, kind):
    """Though fairseq gives each its own dictionary, one for both would do as well."""
    source, target, state = draw(2, 9), draw(2, 7, seed=1), {}
    for end in range(1, 8):
        for each in (model, others[kind]):
            with torch.no_grad():
                expected = logits(each, source, target[:, :end])[:, -1:]
                encoder_out = each.encoder(source)
            assert_close(decode(each, encoder_out, target, [end], state), expected)


def generate(models, task, source, incremental: bool, prefixes=None, **arguments):
    """Hypotheses of fairseq's generator; without a state it computes the whole prefix at every step."""
    settings = copy.deepcopy(generation_settings("translation"))
    for name, value in arguments.items():
        settings[name] = value
    torch.manual_seed(1)
    generator = task.build_generator(models, settings)
    assert generator.model.has_incremental
    generator.model.has_incremental = incremental
    sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(PAD).sum(1)}}
    return task.inference_step(generator, models, sample, prefix_tokens=prefixes)


def assert_same_hypotheses(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one["positional_scores"], other["positional_scores"])


@pytest.mark.parametrize(
    "arguments",
    [dict(beam=1), dict(beam=4, temperature=0.5), dict(beam=3, sampling=True, sampling_topk=5)],
    ids=["greedy", "beam", "sampling"],
)
@pytest.mark.parametrize("prompts", [False, True], ids=["no prefix", "prefixes of 1, 2 and 3 words"])
def test_a_beam_search_finds_what_it_finds_without_a_state(setup, arguments, prompts):
    (model, task), source, prefixes = setup, draw(3, 9), None
    source[0, :4] = PAD
    if prompts:
        prefixes = draw(3, 3, seed=1)
        prefixes[0, 1:] = prefixes[1, 2:] = PAD
    found, expected = (
        generate([model], task, source, incremental, prefixes, max_len_b=14, **arguments)
        for incremental in (True, False)
    )
    assert {len(hypothesis["tokens"]) for row in found for hypothesis in row} != {1}
    assert_same_hypotheses(found, expected)


def test_an_ensemble_finds_what_it_finds_without_a_state(setup, others, kind):
    (one, task), other, source = setup, others[kind], draw(3, 9)
    alone, both, expected = (
        generate(models, task, source, incremental, beam=3, max_len_b=12)
        for models, incremental in (([one], True), ([one, other], True), ([one, other], False))
    )
    assert_same_hypotheses(both, expected)
    scores = [[float(row[0]["score"]) for row in rows] for rows in (alone, both)]
    assert scores[0] != scores[1]


def test_a_beam_search_finds_the_same_while_its_batch_shrinks_and_in_any_batch(setup):
    model, task = setup
    source, prefixes, sizes, forward = draw(6, 9), draw(6, 8, seed=1), [], model.decoder.forward
    for row, length in enumerate((1, 2, 5, 7, 8, 3)):
        source[row, : 2 * row % 7] = prefixes[row, length:] = PAD
        if row not in (0, 3):
            prefixes[row, length - 1] = EOS
    model.decoder.forward = lambda tokens, **kwargs: sizes.append(len(tokens)) or forward(tokens, **kwargs)
    found, expected = (
        generate([model], task, source, incremental, prefixes, max_len_b=14, beam=2)
        for incremental in (True, False)
    )
    assert len(set(sizes)) >= 4, "sentences end at different steps"
    assert_same_hypotheses(found, expected)
    for row in range(6):
        real = source[row : row + 1, source[row].ne(PAD)]
        prefix = prefixes[row : row + 1, prefixes[row].ne(PAD)]
        alone = generate([model], task, real, True, prefix, max_len_b=14, beam=2)
        assert_same_hypotheses(alone, found[row : row + 1])


@pytest.mark.parametrize("side", ["leading", "trailing", "both"])
@pytest.mark.parametrize("amount", [1, 4, 9])
def test_padding_and_neighbours_change_nothing(model, side, amount):
    with torch.no_grad():
        for stack in (model.encoder.stack, model.decoder.stack):
            stack.embed_tokens.weight[PAD] = math.nan
        for lengths in LENGTHS:
            rows, spans = [], []
            for seed, length in enumerate(lengths):
                before, after = (amount if side in (here, "both") else 0 for here in ("leading", "trailing"))
                spans.append(slice(before, before + length))
                rows.append(torch.full((3, before + length + after), PAD))
                rows[-1][0, spans[-1]] = draw(1, length, seed)[0]
                rows[-1][1] = draw(1, rows[-1].shape[1], seed=2)[0]
                rows[-1][2, -1] = 5
            expected = logits(model, *(draw(1, length, seed) for seed, length in enumerate(lengths)))
            # The output projection may be the embedding, in which the padding's own word is NaN.
            found = logits(model, *rows)[:1, spans[1]]
            words = [word for word in range(expected.shape[2]) if word != PAD]
            assert_close(found[..., words], expected[..., words])


def test_what_an_encoder_hands_over_at_padding_has_no_weight(model):
    source, target = draw(2, 9), draw(2, 7, seed=1)
    source[0, :4] = source[1, 6:] = PAD
    with torch.no_grad():
        encoder_out = model.encoder(source)
        expected = model.decoder(target, encoder_out)[0]
        (mask,) = encoder_out["encoder_padding_mask"]
        for content in (math.nan, 1e30):
            spoilt = encoder_out["encoder_out"][0].masked_fill(mask.t().unsqueeze(-1), content)
            assert torch.equal(model.decoder(target, {**encoder_out, "encoder_out": [spoilt]})[0], expected)


def test_rows_of_padding_alone_give_finite_numbers_and_gradients(model):
    model.train()
    source, target = draw(4, 7), draw(4, 6, seed=1)
    source[1] = target[2] = PAD
    source[3] = target[3] = PAD
    out = logits(model, source, target)
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    nothing = torch.full((1, 5), PAD)
    assert logits(model, nothing, nothing).isfinite().all()


def test_padding_between_words_is_a_word(model):
    source, target = draw(2, 7), draw(2, 7, seed=1)
    for row in (source, target):
        spoilt = row.clone()
        spoilt[0, 3] = PAD
        found = logits(model, *(spoilt if other is row else other for other in (source, target)))
        spoilt[0, 3] = model.encoder.dictionary.unk()
        expected = logits(model, *(spoilt if other is row else other for other in (source, target)))
        assert torch.equal(found, expected)


def test_sources_of_unknown_words_and_of_nothing_but_an_end_are_translated(setup):
    (model, task), source = setup, torch.full((2, 6), task_unk := 3)
    source[1] = PAD
    source[:, -1] = EOS
    hypotheses = generate([model], task, source, True, beam=3, max_len_b=9)
    assert task_unk == task.source_dictionary.unk()
    assert all(math.isfinite(hypothesis["score"]) for row in hypotheses for hypothesis in row)


def test_a_decoder_without_a_source_is_refused(model):
    with pytest.raises(ValueError, match="encoder_out=None is not allowed"):
        model.decoder(draw(1, 3))


def test_dropout_is_the_options_and_only_in_training(model):
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    source, target = draw(1, 9), draw(1, 9, seed=1)
    with torch.no_grad():
        assert torch.equal(logits(model, source, target), logits(model, source, target))
        model.train()
        assert not torch.equal(logits(model, source, target), logits(model, source, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(model, dtype):
    source, target = draw(2, 9), draw(2, 18, seed=1)
    with torch.no_grad():
        expected = logits(model, source, target)
        model.to(dtype)
        decoded = decode(model, model.encoder(source), target, range(1, 19))
        for found in (logits(model, source, target), decoded):
            assert found.dtype == dtype
            error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert error <= HALF_TOLERANCE * torch.finfo(dtype).eps


def test_there_is_no_maximum_length(model, kind):
    assert model.max_positions() == (2**30, 2**30)
    assert model.max_decoder_positions() == 2**30
    if "toeplitz" in kind:
        with pytest.raises(ValueError, match=r"34 tokens .* limit is 33"):
            logits(model, draw(1, 34), draw(1, 3))
    else:
        with torch.no_grad():
            assert logits(model, draw(1, 3000), draw(1, 67)).isfinite().all()


@pytest.mark.parametrize("wrapped", ["--checkpoint-activations", "--offload-activations"])
def test_saving_memory_changes_no_gradient(data, wrapped):
    source, target = draw(2, 9), draw(2, 7, seed=1)
    source[0, :4] = PAD
    gradients = []
    for options_ in ((), (wrapped,)):
        model, _ = build(data, *options_)
        logits(model, source, target).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
