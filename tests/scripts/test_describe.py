"""Proves that describe.py's numbers are those of arithmetic by hand and of the real models."""

import functools
import itertools
import re

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import sketch as sketches
from bench.models import build
from report import cost
from support import tools

WORDS = 1000
SMALL = ("--embed-dim", "32", "--layers", "4", "--attention-dim", "16", "--chunk-size", "8")
THEIRS = (
    *("--decoder-embed-dim", "32", "--decoder-input-dim", "32", "--decoder-output-dim", "32"),
    *("--decoder-layers", "2", "--decoder-ffn-embed-dim", "64", "--decoder-attention-heads", "2"),
)
ARCHITECTURES = ["flash_lm", "flash_quad_lm", "flash_local_lm", "flash_global_lm", "transformer_plus_lm"]
ARCHITECTURES += ["transformer_pp_lm", "mc_transformer_pp_lm", "flash_lm_paper", "transformer_lm"]


@pytest.fixture(scope="module")
def describe():
    return tools.load_script("describe")


def small(arch):
    return ["--arch", arch, *(THEIRS if arch == "transformer_lm" else SMALL)]


@pytest.fixture(scope="module")
def sketch():
    """Makes a sketch, by default of 8 rows; each only once."""

    @functools.cache
    def make(*words, batch=8):
        return sketches.Sketch(list(words), WORDS, torch.float32, batch)

    return make


def by_hand(arch, n, skip_future):
    """Multiply-adds a token, from the formulas; ``n`` is a multiple of the chunk of 256."""
    d, c, words = 512, 256, WORDS
    causal = (n + 1) / 2 if skip_future else n
    if "transformer" in arch:
        r, layers = 64, 6
        ffn = 3 * d * 1368 if "pp" in arch else 2 * d * 2048
        inside = 2 * d * causal
        if arch.startswith("mc"):
            # The last chunk's summary is read by nobody.
            inside = 2 * d * c + r * d * (2 - c / n)
        return layers * (4 * d * d + ffn + inside) + d * words
    e, s, layers = 2 * d, 128, 12
    # A rotary bias is a vector of the distances, as cheap as a norm, and not counted either.
    local, across = c * (s + e), s * e * (2 - c / n)
    attention = {
        "flash_lm": local + across,
        "flash_quad_lm": causal * (s + e),
        "flash_local_lm": local,
        "flash_global_lm": across,
    }[arch]
    return layers * (d * (2 * e + s) + e * d + attention) + d * words


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "flash_lm_paper"])
def test_multiply_adds_are_those_counted_by_hand(sketch, arch):
    for n, skip_future in itertools.product((256, 1024), (False, True)):
        expected = by_hand(arch, n, skip_future)
        found = sketch("--arch", arch).multiply_adds(n, skip_future=skip_future)
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_layer_of_flash_costs_what_the_arithmetic_of_the_paper_says(sketch):
    """3.64 M + 0.43 M + 0.39 M a layer for d = 768; a Transformer layer 12 d d and n d."""
    n, embeddings = 1 << 20, 768 * WORDS
    ours = sketch("--arch", "flash_lm_gpt", batch=1).multiply_adds(n, skip_future=True) - embeddings
    assert ours / 24 == pytest.approx(4.46e6, rel=2e-3)
    theirs = sketch("--arch", "transformer_lm_gpt", batch=1)
    work = theirs.multiply_adds(8192, skip_future=True) - embeddings
    assert work / 12 == pytest.approx(12 * 768**2 + 8192 * 768, rel=1e-3)


@pytest.mark.parametrize("arch", ["flash_lm", "transformer_pp_lm", "transformer_lm"])
@pytest.mark.parametrize("tied", [(), ("--share-decoder-input-output-embed",)], ids=["untied", "tied"])
def test_parameters_are_the_real_models(sketch, arch, tied):
    words = ["--arch", arch, *tied]
    with torch.device("meta"):
        real = build(words, WORDS)
    embedding, rest = sketch(*words).parameters()
    d = real.decoder.output_projection.in_features
    assert embedding == (1 if tied else 2) * WORDS * d
    assert embedding + rest == sum(p.numel() for p in real.parameters())


def tensors(state):
    return [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="module")
def real():
    """Makes a small model with numbers; each only once."""
    return functools.cache(lambda arch: build(small(arch), WORDS))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_the_state_has_the_bytes_of_a_real_one(sketch, real, arch):
    for n in (1, 5, 40):
        incremental = {}
        # fairseq's own decoder takes a token at a time.
        for end in range(1, n + 1) if arch == "transformer_lm" else [n]:
            tokens = torch.full((1, end), 5)
            real(arch).eval().decoder(tokens, incremental_state=incremental)
        expected = sum(x.numel() * x.element_size() for x in tensors(incremental))
        assert sketch(*small(arch), batch=2).state_bytes(n) == expected > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_activations_are_what_a_real_forward_pass_keeps(sketch, real, arch):
    b, n, model, kept = 2, 24, real(arch).train(), {}
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    tokens = torch.randint(4, WORDS, (b, n))
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        log_probs = model.get_normalized_probs(model(tokens), log_probs=True)
        torch.nn.functional.nll_loss(log_probs.flatten(0, 1), tokens.flatten())
    found = sketch(*small(arch), batch=b).activations(n)
    measured = sum(storage.nbytes() for storage in kept.values()) / (b * n)
    assert sum(found) == pytest.approx(measured, rel=1e-3)
    assert found.output >= 4 * WORDS, "the log-probabilities in float32"


def test_recomputing_layers_keeps_only_their_inputs(sketch):
    n, d = 64, 32
    plain = sketch(*small("flash_lm"), batch=2).activations(n)
    saving = sketch(*small("flash_lm"), "--checkpoint-activations", batch=2).activations(n)
    assert saving.output == plain.output
    assert 4 * 4 * d <= saving.layers < plain.layers / 4


def test_the_crossover_is_the_shortest_row_that_costs_no_more(sketch, monkeypatch):
    monkeypatch.setattr(sketches, "LONGEST", 1 << 13)
    ours = sketch("--arch", "flash_lm_gpt", "--layers", "2")
    theirs = sketch("--arch", "transformer_lm_gpt", "--decoder-layers", "1")
    for skip_future in (True, False):
        n = sketches.crossover(ours, theirs, skip_future=skip_future)
        costs = [
            [each.multiply_adds(length, skip_future=skip_future) for each in (ours, theirs)]
            for length in (n - 256, n)
        ]
        assert costs[0][0] > costs[0][1]
        assert costs[1][0] <= costs[1][1]
    # By the formulas: twice 4.46 M = 7.08 M + 768 n, so n = 2400; the last chunk's summary makes it less.
    assert sketches.crossover(ours, theirs, skip_future=True) in (2304, 2560)


def test_attention_that_never_wins_has_no_crossover(sketch):
    quadratic = sketch("--arch", "flash_quad_lm", "--layers", "2")
    theirs = sketch("--arch", "transformer_pp_lm", "--layers", "1")
    assert sketches.crossover(quadratic, theirs, skip_future=True) is None
    table = sketch(*small("flash_quad_lm"), "--relative-bias", "toeplitz", "--n-ref", "64")
    assert any("rows of this model end at its table" in line for line in cost.crossovers(table))
    chunks = sketch(*small("flash_lm"), "--relative-bias", "toeplitz")
    assert chunks.multiply_adds(1 << 14, skip_future=False) > 0, "a table for a chunk ends no row"


def test_the_crossover_says_its_unit_and_the_measured_one_stands_beside_it(tmp_path, monkeypatch):
    rows = ["name,size,device,dtype,threads,n,median_ms,status"]
    for n, ours, theirs in ((512, 3, 2), (1024, 3, 4), (2048, 3.5, 3), (4096, 4, 6), (8192, 4, 9)):
        rows += [
            f"flash_lm,tiny,cpu,float32,2,{n},{ours},ok",
            f"transformer_lm,tiny,cpu,float32,2,{n},{theirs},ok",
        ]
    rows += ["flash_lm,tiny,cpu,float32,2,16384,,out of memory"]
    monkeypatch.setattr(cost, "MEASURED", tmp_path / "training.csv")
    (tmp_path / "training.csv").write_text("\n".join(rows) + "\n")
    found = list(cost.measured_crossovers("flash_lm_tiny", "transformer_lm"))
    assert found == ["from 4096 tokens on, in the time of a training step on cpu, float32, 2 threads"]
    assert "not measured" in next(cost.measured_crossovers("flash_lm_gpt", "transformer_lm"))
    assert "not measured" in next(cost.measured_crossovers("flash_lm", "transformer_lm"))


@pytest.mark.parametrize("arch", ["flash_lm_tiny", "flash_lm", "mc_transformer_pp_lm_gpt"])
def test_the_transformers_compared_with_have_as_many_parameters(sketch, arch):
    ours = sketch("--arch", arch)
    for name, words in sketches.transformers(ours).items():
        theirs = sketch(*words)
        assert theirs.name == name
        assert sum(theirs.parameters()) == pytest.approx(sum(ours.parameters()), rel=1e-3)
        assert theirs.parameters()[0] == ours.parameters()[0]


def test_it_prints_every_number_it_promises(describe, capsys, monkeypatch):
    monkeypatch.setattr(sketches, "LONGEST", 1 << 10)
    describe.main([*small("flash_lm"), "--layers", "2", "--tokens-per-sample", "64", "--vocabulary", "1000"])
    printed = capsys.readouterr().out
    for line in (
        "parameters ",
        "multiply-adds ",
        "activations ",
        "per row whatever the length",
        "against transformer_pp_lm of ",
        "against transformer_lm of ",
        "both skipping the future",
        "both as computed",
        "crossover           in multiply-adds, against",
    ):
        assert line in printed
    describe.main([*small("transformer_pp_lm"), "--layers", "1", "--tokens-per-sample", "64"])
    printed = capsys.readouterr().out
    assert "skipping the future" in printed
    assert "per row after 64 tokens" in printed
    assert "crossover" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "no_such_lm"], "--arch no_such_lm is unknown; allowed: .*flash_lm"),
        (["--arch", "flash_lm", "--vocabulary", "3"], "--vocabulary 3 is not allowed; allowed: 5 or more"),
        (["--arch", "flash_lm", "--batch", "0"], "--batch 0 is not allowed; allowed: 1 or more"),
        (["--arch", "flash_lm", "--chunk-size", "0"], "chunk_size=0 is not allowed"),
        (
            ["--arch", "transformer_lm_wiki103", "--vocabulary", "200001"],
            "adaptive input or softmax cannot be described",
        ),
    ],
)
def test_what_cannot_be_described_is_named(describe, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        describe.main([*words, "--tokens-per-sample", "64"])
    assert stopped.value.code != 0
    assert re.search(message, f"{stopped.value.code} {capsys.readouterr().err}")
