"""Proves the contract of flash_masked_lm from outside: fairseq builds it and calls it; float64.

Every weight is drawn large, so that each branch, bias and norm matters. Tolerances are multiples of the
machine epsilon, relative to the largest value; the largest errors measured were 23 epsilon for outputs, 860
for gradients (of the global kind, whose undivided sums grow; 320 of the others), and in half precision 12 of
the narrow type's for the few numbers of a class, 5 for all others.
"""

import copy
import math

import pytest
import torch

from support import as_oracle, contract, oracle
from support.contract import EPSILON, assert_close, draw

GRADIENT_TOLERANCE = 2000 * EPSILON
HALF_TOLERANCE = 20  # of the narrow type's epsilon, root mean square
CHUNK, CLASSES = 4, 3
SIZES = (
    *("--embed-dim", "8", "--layers", "3", "--attention-dim", "6", "--expansion-factor", "2"),
    *("--chunk-size", str(CHUNK), "--dropout", "0.1", "--tokens-per-sample", "32"),
)
QUADRATIC = ("--attention", "quadratic")
KINDS = {
    "mixed_chunk": ("--linear-norm", "mean"),
    "mixed_chunk table": (
        *("--relative-bias", "toeplitz", "--linear-norm", "chunk", "--scaled-sin"),
        "--untie-weights-roberta",
    ),
    "mixed_chunk rotary scalenorm": ("--relative-bias", "rotary", "--norm", "scalenorm"),
    "mixed_chunk shifted": ("--shift-keys",),
    "local": ("--attention", "local", "--relative-bias", "toeplitz"),
    "global": ("--attention", "global", "--linear-norm", "chunk"),
    "global mean rmsnorm": ("--attention", "global", "--linear-norm", "mean", "--norm", "rmsnorm"),
    "quadratic": (*QUADRATIC, "--scaled-sin"),
    "quadratic toeplitz": (*QUADRATIC, "--relative-bias", "toeplitz"),
}
TINY_ROBERTA = (
    *("--encoder-layers", "4", "--encoder-embed-dim", "256", "--encoder-ffn-embed-dim", "1152"),
    *("--encoder-attention-heads", "4"),
)
EMBEDDING = {
    "FlashMaskedLM": "encoder.stack.embed_tokens.weight",
    "RobertaModel": "encoder.sentence_encoder.embed_tokens.weight",
}
#: One token, less than a chunk, a chunk, several with and without a rest.
LENGTHS = (1, 3, 4, 7, 13, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a dictionary of 20 words; the task adds ``<mask>``."""
    folder = tmp_path_factory.mktemp("dictionary")
    contract.write_dictionary(folder / "dict.txt")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def built(data):
    """Each kind's model, built once."""
    return {kind: build(data, *arguments) for kind, arguments in KINDS.items()}


@pytest.fixture
def model(built, kind):
    return copy.deepcopy(built[kind])


def build(data, *arguments):
    """The model with a head and telling weights."""
    model, _ = contract.build(data, "masked_lm", "--arch", "flash_masked_lm", *SIZES, *arguments)
    model.register_classification_head("head", num_classes=CLASSES)
    return contract.make_telling(model)


def outputs(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each use of the model gives, with fairseq's arguments."""
    net_input = dict(src_tokens=tokens, src_lengths=torch.full((len(tokens),), tokens.shape[1]))
    return {
        "logits": model(**net_input, src_id=0)[0],
        "features": model(**net_input, features_only=True)[0],
        "classes": model(**net_input, features_only=True, classification_head_name="head")[0],
    }


def expected_outputs(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the oracle says of one row (n,)."""
    features = as_oracle.stack(model.encoder.stack)(tokens)
    head, classifier = model.encoder.lm_head, model.classification_heads["head"]
    kind, norm = as_oracle.norm(head.norm)
    lm_head = dict(
        weight=head.dense.weight,
        bias=head.dense.bias,
        norm=norm,
        output_weight=head.weight,
        output_bias=head.bias,
    )
    classes = dict(weight=classifier.dense.weight, bias=classifier.dense.bias)
    classes |= dict(output_weight=classifier.out_proj.weight, output_bias=classifier.out_proj.bias)
    return {
        "logits": oracle.masked_lm_head(features, lm_head, kind),
        "features": features,
        "classes": oracle.classification_head(features, classes),
    }


@pytest.mark.parametrize(
    ("arch", "roberta"),
    [
        ("flash_masked_lm", ()),
        ("flash_quad_masked_lm", ()),
        ("flash_masked_lm_tiny", TINY_ROBERTA),
        ("flash_quad_masked_lm_tiny", TINY_ROBERTA),
    ],
)
def test_it_has_as_many_parameters_as_the_roberta_that_it_pairs_with(data, arch, roberta):
    counts = []
    for words in (("--arch", arch), ("--arch", "roberta_base", *roberta)):
        model, _ = contract.build(data, "masked_lm", "--tokens-per-sample", "512", *words)
        # At a vocabulary of 8000: the embeddings are shared with the output, which has a bias.
        width, words = model.get_parameter(EMBEDDING[type(model).__name__]).shape[::-1]
        counts.append(sum(p.numel() for p in model.parameters()) + (8000 - words) * (width + 1))
    assert counts[0] == pytest.approx(counts[1], rel=0.05)


@pytest.mark.parametrize("length", [1, 3, 13])
def test_features_and_logits_are_those_of_the_paper(model, length):
    tokens = draw(1, length)
    with torch.no_grad():
        expected = expected_outputs(model, tokens[0])
        for name, ours in outputs(model, tokens).items():
            assert_close(ours[0], expected[name])


@pytest.mark.parametrize("use", ["logits", "classes"])
def test_the_gradients_are_those_of_the_paper(model, use):
    tokens = draw(1, 9)
    ours, theirs = outputs(model, tokens)[use][0], expected_outputs(model, tokens[0])[use]
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    used = {"logits": "classification_heads", "classes": "encoder.lm_head"}[use]
    named = [(name, p) for name, p in model.named_parameters() if not name.startswith(used)]
    found, expected = (
        torch.autograd.grad((weights * out).sum(), [p for _, p in named]) for out in (ours, theirs)
    )
    for (name, _), ours, theirs in zip(named, found, expected, strict=True):
        if "embed_tokens" in name and use == "classes":
            assert not ours[model.encoder.padding_idx].any()
        assert_close(ours, theirs, GRADIENT_TOLERANCE)


def test_a_token_sees_both_sides_as_its_attention_says(model, kind):
    tokens = draw(1, 13)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] - 3) % 16 + 4
    with torch.no_grad():
        difference = outputs(model, changed)["features"] - outputs(model, tokens)["features"]
    seen = difference.ne(0).any(dim=2)[0].tolist()
    elsewhere = not kind.startswith("local")
    assert seen == [elsewhere] * 4 + [True] * 4 + [elsewhere] * 5


@pytest.mark.parametrize("side", ["leading", "trailing"])
@pytest.mark.parametrize("amount", [1, 4, 9])
def test_padding_and_neighbours_change_nothing(model, side, amount):
    pad = model.encoder.padding_idx
    with torch.no_grad():
        alone = {length: outputs(model, draw(1, length)) for length in LENGTHS}
        if model.encoder.lm_head.weight is not model.encoder.stack.embed_tokens.weight:
            model.encoder.stack.embed_tokens.weight[pad] = math.nan
        for length, expected in alone.items():
            tokens = torch.full((4, length + amount), pad)
            span = slice(amount, None) if side == "leading" else slice(length)
            tokens[0, span] = draw(1, length)[0]
            tokens[1] = draw(1, length + amount, seed=1)[0]
            tokens[2, -1] = 5
            found = outputs(model, tokens)
            assert_close(found["features"][:1, span], expected["features"])
            assert_close(found["logits"][:1, span], expected["logits"])
            assert_close(found["classes"][:1], expected["classes"])
            assert not found["features"][0][tokens[0].eq(pad)].any()


def test_the_order_of_a_batch_does_not_matter(model):
    tokens = torch.full((4, 9), model.encoder.padding_idx)
    for row, length in enumerate((2, 9, 5, 7)):
        tokens[row, :length] = draw(1, length, seed=row)[0]
    order = [2, 0, 3, 1]
    with torch.no_grad():
        before, after = outputs(model, tokens), outputs(model, tokens[order])
    for name, ours in after.items():
        assert_close(ours, before[name][order])


def test_only_masked_positions_are_projected_and_as_among_all(model):
    tokens = torch.full((3, 9), model.encoder.padding_idx)
    for row, length in enumerate((9, 4, 6)):
        tokens[row, :length] = draw(1, length, seed=row)[0]
    masked, projected = torch.zeros(3, 9, dtype=torch.bool), []
    masked[0, 2] = masked[0, 8] = masked[2, 0] = True
    model.encoder.lm_head.dense.register_forward_pre_hook(lambda layer, args: projected.append(len(args[0])))
    with torch.no_grad():
        found, _ = model(tokens, masked_tokens=masked)
        assert projected == [3]
        assert_close(found, outputs(model, tokens)["logits"][masked])


def test_a_row_of_padding_alone_gives_finite_numbers_and_gradients(model):
    model.train()
    tokens = draw(3, 7)
    tokens[1] = model.encoder.padding_idx
    found = outputs(model, tokens)
    assert all(out.isfinite().all() for out in found.values())
    sum(out.square().sum() for out in found.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    alone = outputs(model, torch.full((1, 5), model.encoder.padding_idx))
    assert all(out.isfinite().all() for out in alone.values())


@pytest.mark.parametrize("words", [[], [3] * 9, [20] * 9], ids=["no word", "unknown words", "masks"])
def test_a_row_without_a_known_word_gives_finite_numbers_and_gradients(model, words):
    model.train()
    tokens = torch.full((2, 12), model.encoder.padding_idx)
    tokens[0, : len(words) + 2] = torch.tensor([0, *words, 2])
    tokens[1] = draw(1, 12)[0]
    found = outputs(model, tokens)
    assert all(out.isfinite().all() for out in found.values())
    sum(out.square().sum() for out in found.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_padding_between_words_is_a_word(model):
    tokens = draw(2, 7)
    tokens[0, 3] = model.encoder.padding_idx
    tokens[1, 5:] = model.encoder.padding_idx
    found = outputs(model, tokens)
    tokens[0, 3] = model.encoder.dictionary.unk()
    for name, expected in outputs(model, tokens).items():
        assert torch.equal(found[name], expected), name


def test_there_is_no_maximum_length(model, kind):
    assert model.max_positions() == model.encoder.max_positions() == 2**30
    if "toeplitz" in kind:
        with pytest.raises(ValueError, match=r"33 tokens .* limit is 32"):
            model(draw(1, 33))
        return
    with torch.no_grad():
        long = outputs(model, draw(1, 1500))
    assert all(out.isfinite().all() for out in long.values())


def test_one_chunk_as_long_as_the_row_is_the_quadratic_attention(data):
    sizes = ("--relative-bias", "toeplitz", "--chunk-size", "16")
    local = build(data, "--attention", "local", *sizes)
    quadratic = build(data, "--attention", "quadratic", "--n-ref", "16", *sizes, "--change-trained-options")
    weights = quadratic.state_dict()
    kept = weights["_extra_state"]  # says what they were trained with, which is not the same
    weights.update(local.state_dict() | {"_extra_state": kept})
    quadratic.load_state_dict(weights)
    with torch.no_grad():
        for name, ours in outputs(local, draw(2, 16)).items():
            assert_close(ours, outputs(quadratic, draw(2, 16))[name])


def test_dropout_is_the_options_and_only_in_training(model):
    head = model.classification_heads["head"]
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1, head.dropout.p}
    tokens = draw(1, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], model(tokens)[0])
        model.train()
        assert not torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(model, dtype):
    tokens = draw(2, 18)
    tokens[1, 13:] = model.encoder.padding_idx
    with torch.no_grad():
        expected = outputs(model, tokens)
        model.to(dtype)
        for name, found in outputs(model, tokens).items():
            assert found.dtype == dtype
            error = (found.double() - expected[name]).square().mean().sqrt()
            assert error <= HALF_TOLERANCE * torch.finfo(dtype).eps * expected[name].square().mean().sqrt()


def test_probabilities_add_up_in_the_models_precision(model):
    logits = model(draw(2, 5))
    for log_probs in (False, True):
        found = model.get_normalized_probs(logits, log_probs)
        assert found.dtype == torch.float64
        assert_close((found.exp() if log_probs else found).sum(2), torch.ones(2, 5, dtype=torch.float64))
