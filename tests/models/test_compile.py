"""Proves that --compile changes speed alone: the same numbers, names and checkpoints, in few graphs.

Float32, compared with layers that run as they are.
"""

import argparse
import copy

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics

from fairseq_flash.models import _layers
from fairseq_flash.models._presets import FLASH2
from fairseq_flash.models.flash_lm import FlashLanguageModel, FlashLanguageModelConfig
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM, FlashMaskedLMConfig
from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq, FlashSeq2SeqConfig

TOLERANCE = 100 * torch.finfo(torch.float32).eps
WORDS = 20
SIZES = dict(embed_dim=8, attention_dim=4, chunk_size=4, dropout=0.0)
MODELS = {
    "gau": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=2)),
    "flash2": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=2, **FLASH2)),
    "quadratic": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=2, attention="quadratic")),
    "transformer": (FlashLanguageModel, FlashLanguageModelConfig, dict(layers=2, block="transformer")),
    "masked": (FlashMaskedLM, FlashMaskedLMConfig, dict(layers=2)),
    "seq2seq": (FlashSeq2Seq, FlashSeq2SeqConfig, dict(encoder_layers=2, decoder_layers=2)),
}
SHAPES = [(3, 9), (2, 12), (5, 6), (4, 17), (2, 30), (6, 11)]


def build(kind, **changes):
    dictionary = Dictionary()
    for word in range(WORDS - len(dictionary)):
        dictionary.add_symbol(str(word))
    model, config, options = MODELS[kind]
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    torch.manual_seed(0)
    return model.build_model(config(**{**SIZES, **options, **changes}), task)


def run(model, tokens):
    """Logits, whatever the model reads."""
    if isinstance(model, FlashSeq2Seq):
        return model(tokens, None, tokens.flip(1))[0]
    return model(tokens)[0]


def gradients(model, tokens):
    model.zero_grad()
    torch.manual_seed(1)
    run(model, tokens).square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def tokens_of(b, n):
    return torch.randint(4, WORDS, (b, n), generator=torch.Generator().manual_seed(n))


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs from nothing; what is compiled runs as PyTorch does, which takes less time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(_layers.whole_rows, fullgraph=True, backend="eager")
    monkeypatch.setattr(_layers, "compiled_layers", lambda: compiled)
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-3)


def assert_same(compiled, plain, tokens):
    found = gradients(compiled, tokens)
    for name, expected in gradients(plain, tokens).items():
        assert_close(found[name], expected)


@pytest.mark.parametrize("n", [8, pytest.param(9, marks=pytest.mark.long)])
def test_the_compiler_itself_takes_rows(n):
    if not torch._dynamo.is_dynamo_supported() or _layers.compile_objections():
        pytest.skip("nothing can be compiled here")
    torch._dynamo.reset()
    plain, compiled = build("gau"), build("gau", compile=True)
    assert_same(compiled, plain, tokens_of(3, n))


@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_training_on_six_shapes_is_the_same_in_few_graphs(kind, graphs):
    plain, compiled = build(kind), build(kind, compile=True)
    for shape in SHAPES:
        assert_same(compiled, plain, tokens_of(*shape))
    assert 0 < graphs() <= 3 * (2 if kind == "seq2seq" else 1)


@pytest.mark.parametrize("kind", ["gau", "flash2", "transformer"])
def test_two_layers_share_a_graph_with_checkpointing_and_dropout(kind, graphs):
    options = dict(dropout=0.3, checkpoint_activations=True)
    plain, compiled = build(kind, **options), build(kind, compile=True, **options)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert_same(compiled, plain, tokens_of(3, 9))
    # Without and with gradients: checkpointing runs each layer both ways.
    assert graphs() == 2


@pytest.mark.parametrize("kind", ["gau", "flash2", "masked", "seq2seq"])
def test_layers_go_through_a_graph_in_groups(kind, graphs, monkeypatch):
    monkeypatch.setattr(_layers, "layers_in_a_graph", lambda device, layers: 2)
    layers = dict.fromkeys(("encoder_layers", "decoder_layers") if kind == "seq2seq" else ("layers",), 4)
    plain, compiled = build(kind, **layers), build(kind, compile=True, **layers)
    tokens = tokens_of(3, 9)
    tokens[0, -2:] = 1
    assert_same(compiled, plain, tokens)
    assert graphs() == (2 if kind == "seq2seq" else 1)
    assert_close(run(copy.deepcopy(compiled).eval(), tokens), run(plain.eval(), tokens))


@pytest.mark.parametrize("part", ["", "uvz"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_what_watches_a_layer_or_a_part_of_it_sees_every_pass_and_no_other(part, kind, graphs, monkeypatch):
    monkeypatch.setattr(_layers, "layers_in_a_graph", lambda device, layers: 4)
    model, tokens, seen = build("gau", compile=True), tokens_of(3, 9), []
    run(model, tokens)
    watched = model.decoder.stack.blocks[1].get_submodule(part)
    handle = getattr(watched, f"register_{kind}_hook")(lambda *_: seen.append(True))
    run(model, tokens)
    run(model, tokens)
    handle.remove()
    run(model, tokens)
    assert len(seen) == 2


def test_diagnostics_report_the_same_between_compiled_updates(graphs):
    def reports(model):
        found = []
        for update in range(4):
            model.set_num_updates(update)
            with metrics.aggregate(new_root=True) as logged:
                run(model.train(), tokens_of(3, 9)).sum().backward()
            found.append(logged.get_smoothed_values())
        return found

    plain, compiled = (reports(build("gau", diagnostics_interval=2, compile=on)) for on in (False, True))
    assert [bool(report) for report in compiled] == [True, False, True, False]
    for found, expected in zip(compiled, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert graphs() > 0


def test_a_forward_that_was_put_in_place_of_a_layers_own_is_called(graphs, monkeypatch):
    monkeypatch.setattr(_layers, "layers_in_a_graph", lambda device, layers: 4)
    model, tokens = build("gau", compile=True), tokens_of(3, 9)
    block, seen = model.decoder.stack.blocks[1], []
    own = block.forward
    block.forward = lambda *args, **kwargs: (seen.append(True), own(*args, **kwargs))[1]
    run(model, tokens)
    assert seen == [True]


def test_on_a_cpu_each_layer_is_a_graph_and_on_a_gpu_up_to_four_are():
    assert {_layers.layers_in_a_graph("cpu", layers) for layers in (1, 4, 7, 24)} == {1}
    # Of 7, three graphs are compiled as one of 3 layers and one of 1.
    found = {layers: _layers.layers_in_a_graph("cuda", layers) for layers in (1, 3, 4, 6, 7, 8, 12, 24)}
    assert found == {1: 1, 3: 3, 4: 2, 6: 3, 7: 3, 8: 4, 12: 4, 24: 4}


def test_a_copy_such_as_emas_computes_with_its_own_weights(graphs):
    model, tokens = build("quadratic", compile=True).eval(), tokens_of(2, 9)
    before = run(model, tokens)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    assert_close(run(copied, tokens), before)
    assert not torch.equal(run(model, tokens), before)
    assert graphs() > 0


@pytest.mark.parametrize("kind", ["gau", "flash2"])
def test_decoding_compiles_nothing(kind, graphs):
    model, tokens = build(kind, compile=True).eval(), tokens_of(2, 6)
    state = {}
    with torch.no_grad():
        steps = [model(tokens[:, : end + 1], incremental_state=state)[0] for end in range(6)]
        assert graphs() == 0
        assert_close(torch.cat(steps, dim=1), run(build(kind).eval(), tokens))


def test_all_objections_come_at_once_before_training(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "is_dynamo_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_layers.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile cannot run: torch .*; there is no C\+\+ compiler"):
        build("gau", compile=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_layers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile cannot run: torch .*; Triton"):
        build("gau", compile=True)


@pytest.mark.long
def test_compiled_for_this_machine_it_is_the_same():
    torch._dynamo.reset()
    assert_same(build("gau", compile=True), build("gau"), tokens_of(3, 9))
