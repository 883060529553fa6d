"""Proves that prompts read at once and documents read in segments give what fairseq's own ways give.

Measured in float64: scores of hypotheses differ by 1e-13 at most, losses of documents by 1e-14.
"""

import argparse
import logging

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from torch import nn

from fairseq_flash.models.flash_lm import FlashLanguageModel, FlashLanguageModelConfig
from fairseq_flash.modules import RowMemory
from fairseq_flash.tasks import _prompt_pass
from fairseq_flash.tasks._documents import DocumentSegments
from fairseq_flash.tasks.flash_language_modeling import FlashLanguageModelingConfig, FlashLanguageModelingTask
from support import tools

TOLERANCE = 500 * torch.finfo(torch.float64).eps
WORDS = 40
PAD, EOS = 1, 2
TASKS = ("language_modeling", "flash_language_modeling")
CARRY = ("--task", "flash_language_modeling", "--carry-state")
TRANSFORMER = {"block": "transformer", "glu": True}
#: Every system by what it differs in from flash_lm.
SYSTEMS = {
    "quadratic": {"attention": "quadratic"},
    "local": {"attention": "local"},
    "global": {"attention": "global"},
    "transformer": {**TRANSFORMER, "attention": "quadratic"},
    "transformer mixed_chunk": {**TRANSFORMER, "attention": "mixed_chunk"},
}
CONSTANT = ["mixed_chunk", "local", "global", "transformer mixed_chunk"]
#: Prompts of uneven lengths, one of them blank.
PROMPTS = [torch.arange(4, 4 + n).tolist() for n in (7, 7, 1, 13, 0, 9)]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build_task(**options):
    words = Dictionary()
    for word in range(WORDS):
        words.add_symbol(f"w{word}")
    return FlashLanguageModelingTask(FlashLanguageModelingConfig(**options), words)


def build_model(task, seed=1, **options):
    torch.manual_seed(seed)
    sizes = dict(embed_dim=16, layers=2, attention_dim=8, chunk_size=4, dropout=0.0)
    model = FlashLanguageModel.build_model(FlashLanguageModelConfig(**{**sizes, **options}), task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.decoder.output_projection.weight.mul_(20)
    return model


def batch_of(prompts):
    tokens = torch.full((len(prompts), 1 + max(map(len, prompts))), PAD)
    tokens[:, 0] = EOS
    for row, prompt in enumerate(prompts):
        tokens[row, 1 : 1 + len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    net_input = {"src_tokens": tokens, "src_lengths": tokens.ne(PAD).sum(1)}
    return {"id": torch.arange(len(prompts)), "net_input": net_input}


def hypotheses_both_ways(models, prompts, **options):
    """What the task's own generator finds, and what fairseq's finds token by token."""
    task = build_task()
    args = argparse.Namespace(**{"beam": 3, "max_len_b": 30, **options})
    ours = task.build_generator(models, args)
    theirs = task.build_generator(models, args, seq_gen_cls=SequenceGenerator)
    return tuple(task.inference_step(generator, models, batch_of(prompts)) for generator in (ours, theirs))


def by_score(hypotheses):
    """Equal scores are in no order: rounding decides between them."""
    return sorted(hypotheses, key=lambda h: (-round(float(h["score"]), 10), h["tokens"].tolist()))


def assert_same(ours, theirs):
    for row, pair in enumerate(zip(ours, theirs, strict=True)):
        scores = [float(hypothesis["score"]) for hypothesis in pair[0]]
        assert scores == sorted(scores, reverse=True)
        left, right = map(by_score, pair)
        assert [h["tokens"].tolist() for h in left] == [h["tokens"].tolist() for h in right], row
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a["score"], b["score"], atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(
                a["positional_scores"], b["positional_scores"], atol=TOLERANCE, rtol=TOLERANCE
            )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam": 1},
        {"lenpen": 1.7, "temperature": 0.7},
        {"unnormalized": True},
        {"max_len_b": 9},  # shorter than a prompt
        {"max_len_a": 1.5, "max_len_b": 4},
        {"min_len": 11, "max_len_b": 20},
        {"sampling": True, "sampling_topk": 1},
    ],
    ids=str,
)
def test_a_prompt_read_at_once_gives_the_hypotheses_of_fairseqs_generator(options, caplog):
    with caplog.at_level(logging.INFO):
        ours, theirs = hypotheses_both_ways([build_model(build_task())], PROMPTS, **options)
    assert_same(ours, theirs)
    assert "token by token" not in caplog.text


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_reads_its_prompt_at_once(system, monkeypatch):
    models = [build_model(build_task(), **SYSTEMS[system])]
    assert_same(*hypotheses_both_ways(models, PROMPTS))
    monkeypatch.setattr(_prompt_pass, "LEAST_PIECE", 3)
    monkeypatch.setattr(_prompt_pass, "PIECE_NUMBERS", 1)
    assert_same(*hypotheses_both_ways(models, PROMPTS))


def test_unknown_words_in_a_prompt_are_penalised_as_fairseq_does():
    prompts = [[*prompt, 3, 5] for prompt in PROMPTS]
    assert_same(*hypotheses_both_ways([build_model(build_task())], prompts, unkpen=2.0))


def test_an_ensemble_reads_its_prompt_at_once():
    models = [build_model(build_task(), seed) for seed in (1, 2)]
    assert_same(*hypotheses_both_ways(models, PROMPTS))
    assert_same(*hypotheses_both_ways([models[0], models[0]], PROMPTS))


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        (PROMPTS, {"no_repeat_ngram_size": 2}, "no-repeat-ngram-size"),
        (PROMPTS, {"diverse_beam_groups": 3}, "search counts"),
        (PROMPTS, {"min_len": 20}, "min-len"),
        ([[5, 6, EOS, 7], [5, 6, 7]], {}, "</s> within"),
    ],
)
def test_what_cannot_be_the_same_is_fed_token_by_token_and_says_why(prompts, options, reason, caplog):
    with caplog.at_level(logging.INFO):
        ours, theirs = hypotheses_both_ways([build_model(build_task())], prompts, **options)
    assert_same(ours, theirs)
    assert caplog.text.count("token by token") == 1
    assert reason in caplog.text


def test_a_prompt_costs_one_pass_and_not_one_step_a_token(monkeypatch):
    task = build_task()
    model = build_model(task)
    lengths = []
    features = type(model.decoder.stack)._features

    def counted(self, tokens, *args, **kwargs):
        lengths.append(tokens.shape[1])
        return features(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model.decoder.stack), "_features", counted)
    generator = task.build_generator([model], argparse.Namespace(beam=1, max_len_b=103))
    task.inference_step(generator, [model], batch_of([[5, 6, 7, 8] * 25]))
    assert lengths[0] == 100
    assert set(lengths[1:]) == {1}
    assert len(lengths) <= 5


def test_reading_in_small_pieces_changes_nothing(monkeypatch):
    models, prompts = [build_model(build_task())], [torch.randint(4, 44, (600,)).tolist()]
    whole, _ = hypotheses_both_ways(models, prompts, max_len_b=605)
    monkeypatch.setattr(_prompt_pass, "PIECE_NUMBERS", 1)
    assert_same(hypotheses_both_ways(models, prompts, max_len_b=605)[0], whole)


# Through fairseq's own tools


@pytest.fixture
def float32():
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("beam", [1, 3])
def test_fairseq_generate_writes_the_same_with_either_task(data_bin, checkpoint, beam):
    base = (data_bin, "--user-dir", tools.USER_DIR, "--path", checkpoint, "--beam", beam, "--cpu")
    base += ("--gen-subset", "test", "--sample-break-mode", "eos", "--max-len-b", "40", "--batch-size", "5")
    base += ("--num-workers", "0")
    theirs, ours = (tools.call("generate", *base, "--task", name) for name in TASKS)
    found = tools.rows(ours, "H")
    assert len(found) >= 10
    assert found.keys() == tools.rows(theirs, "H").keys()
    for number, rows in tools.rows(theirs, "H").items():
        for (score, text), (our_score, our_text) in zip(rows, found[number], strict=True):
            assert our_text == text
            assert abs(float(our_score) - float(score)) < 1e-4


def test_fairseq_interactive_writes_the_same_with_either_task(data_bin, checkpoint):
    prompts = "".join(f"{line}\n" for line in ["the value of", "a", "if the object is a class ,"])
    base = (data_bin, "--user-dir", tools.USER_DIR, "--path", checkpoint, "--beam", 2, "--max-len-b", 20)
    theirs, ours = (
        tools.run("fairseq-interactive", *base, "--task", name, stdin=prompts).stdout for name in TASKS
    )
    texts = [{n: [row[-1] for row in rows] for n, rows in tools.rows(o, "H").items()} for o in (theirs, ours)]
    assert len(texts[0]) == 3
    assert texts[1] == texts[0]


@pytest.mark.usefixtures("float32")
def test_the_hub_interface_samples_the_same_text(data_bin, checkpoint):
    text = {}
    for name in TASKS:
        hub = FlashLanguageModel.from_pretrained(
            str(checkpoint.parent), checkpoint.name, str(data_bin), task={"_name": name}
        )
        assert isinstance(hub.task, FlashLanguageModelingTask) == (name == TASKS[1])
        text[name] = hub.sample("the value of", beam=3, max_len_b=15)
    assert text[TASKS[0]] == text[TASKS[1]]
    assert text[TASKS[0]].startswith("the value of")


# State carry


class Lines(list):
    """Lines of tokens as an indexed dataset."""

    @property
    def sizes(self):
        return [len(line) for line in self]


def documents_of(*lengths, seed=0):
    """Documents of ``lengths`` tokens, in lines of up to 7, each but the last followed by an empty line."""
    torch.manual_seed(seed)
    lines = Lines()
    for length in lengths:
        words = torch.randint(4, 4 + WORDS, (length,))
        lines += [torch.cat((line[:-1], torch.tensor([EOS]))) for line in words.split(7)]
        lines.append(torch.tensor([EOS]))
    return Lines(lines[:-1])


def segments_of(lines, length, name="valid"):
    return DocumentSegments(lines, length, name=name, pad=PAD, eos=EOS)


LENGTHS = (61, 6, 30, 23, 13)


@pytest.mark.parametrize("length", [1, 5, 8, 100])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_every_token_is_predicted_once_from_the_one_before_it_in_its_document(length, rows):
    lines = documents_of(*LENGTHS)
    segments = segments_of(lines, length)
    seen = {}
    for batch in segments.batches(rows, seed=3):
        assert len(batch) <= rows
        sample = segments.collater([segments[index] for index in batch])
        inputs, targets = sample["net_input"]["src_tokens"], sample["target"]
        for (document, start), source, target in zip(sample["rows"]["names"], inputs, targets, strict=True):
            kept = target.ne(PAD)
            assert len(seen.get(document, [])) == start, "segments of a document come in order"
            seen.setdefault(document, []).extend(
                zip(source[kept].tolist(), target[kept].tolist(), strict=True)
            )
    targets = [target for document in sorted(seen) for _, target in seen[document]]
    assert targets == torch.cat(list(lines)).tolist()
    for pairs in seen.values():
        assert [source for source, _ in pairs] == [EOS] + [target for _, target in pairs[:-1]]


def test_a_document_ends_with_its_empty_line_and_several_count_as_one():
    full, empty = torch.tensor([5, 6, EOS]), torch.tensor([EOS])
    segments = segments_of(Lines([full, full, empty, empty, full, torch.tensor([9]), full]), 100)
    assert [len(segments[index]["target"]) for index in range(len(segments))] == [8, 7]


def test_processes_share_whole_documents():
    segments = segments_of(documents_of(*LENGTHS), 5)
    batches = segments.batches(2, shards=2)
    of_shards = [{index for batch in batches[shard::2] for index in batch} for shard in (0, 1)]
    assert not of_shards[0] & of_shards[1]
    assert sorted(of_shards[0] | of_shards[1]) == list(range(len(segments)))
    documents = [{int(segments.documents[index]) for index in indices} for indices in of_shards]
    assert not documents[0] & documents[1]


def test_documents_are_shuffled_and_their_segments_are_not():
    segments = segments_of(documents_of(*[12] * 9), 5)
    first, second = ([i for batch in segments.batches(1, seed=s) for i in batch] for s in (1, 2))
    assert first != second
    assert sorted(first) == list(range(len(segments)))


def summed_loss(task, model, batches):
    criterion = CrossEntropyCriterion.build_criterion(CrossEntropyCriterionConfig(sentence_avg=False), task)
    return sum(float(task.valid_step(sample, model, criterion)[0]) for sample in batches)


def samples_of(task, segments, rows):
    return task.get_batch_iterator(segments, max_sentences=rows).next_epoch_itr(shuffle=False)


@pytest.mark.parametrize("system", CONSTANT)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 10])
def test_documents_in_segments_cost_what_a_single_pass_over_each_costs(system, rows, length):
    lines = documents_of(*LENGTHS)
    task = build_task(carry_state=True, tokens_per_sample=length)
    model = build_model(task, **SYSTEMS.get(system, {}))
    carried = summed_loss(task, model, samples_of(task, segments_of(lines, length), rows))
    whole = summed_loss(build_task(), model, samples_of(task, segments_of(lines, 1000), 1))
    assert abs(carried - whole) < TOLERANCE * whole


def test_segments_without_a_carried_state_cost_something_else():
    lines = documents_of(*LENGTHS)
    task = build_task(carry_state=True, tokens_per_sample=8)
    model = build_model(task)
    samples = list(samples_of(task, segments_of(lines, 8), 2))
    carried = summed_loss(task, model, samples)
    for sample in samples:
        del sample["rows"]
    assert abs(summed_loss(task, model, samples) - carried) > 1e-3 * carried


def test_gradients_end_at_the_segment_and_the_state_does_not():
    task = build_task(carry_state=True)
    model = build_model(task)
    tokens = torch.randint(4, 44, (1, 20))
    memory = RowMemory()
    memory.announce([0], [1])
    model(tokens[:, :10], memory=memory)
    memory.announce([1], [2])
    logits, _ = model(tokens[:, 10:], memory=memory)
    logits.square().sum().backward()
    with torch.no_grad():
        _, state = model.decoder.stack(tokens[:, :10], None, model.decoder.stack.empty_state(tokens))
    twin = build_model(task)
    features, _ = twin.decoder.stack(tokens[:, 10:], None, state)
    twin.decoder.output_layer(features).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)


def test_a_remembered_state_holds_no_graph():
    task = build_task()
    model, memory = build_model(task), RowMemory()
    memory.announce([0], [1])
    model(torch.randint(4, 44, (1, 6)), memory=memory)
    memory.announce([1], [2])
    state = memory.recall(model.decoder.stack, torch.zeros(1, 1))
    assert state.position.tolist() == [6]
    assert all(x is None or not x.requires_grad for layer in state.layers for x in layer)


def test_rows_are_found_by_name_wherever_they_lie():
    model, memory = build_model(build_task()), RowMemory()
    tokens = torch.randint(4, 44, (3, 9))
    whole, _ = model(tokens)
    memory.announce(["a0", "b0", "c0"], ["a1", "b1", "c1"])
    model(tokens[:, :5], memory=memory)
    memory.announce(["c1", "new", "a1"], ["c2", "new1", "a2"])
    found, _ = model(tokens[[2, 1, 0], 5:], memory=memory)
    alone, _ = model(tokens[1:2, 5:])
    expected = torch.stack((whole[2, 5:], alone[0], whole[0, 5:]))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=TOLERANCE)


def test_training_and_validation_do_not_see_each_others_states():
    lines = documents_of(*LENGTHS)
    task = build_task(carry_state=True, tokens_per_sample=8)
    model = build_model(task)
    samples = list(samples_of(task, segments_of(lines, 8), 2))
    undisturbed = summed_loss(task, model, samples)
    criterion = CrossEntropyCriterion.build_criterion(CrossEntropyCriterionConfig(sentence_avg=False), task)

    class NoUpdate:
        def backward(self, loss):
            loss.backward()

    loss = 0.0
    for sample in samples:
        task.train_step(samples[3], model, criterion, NoUpdate(), 0)
        loss += float(task.valid_step(sample, model.eval(), criterion)[0])
    assert abs(loss - undisturbed) < TOLERANCE * undisturbed


@pytest.mark.parametrize(
    ("option", "value"),
    [("add_bos_token", True), ("sample_break_mode", "eos"), ("shorten_method", "truncate")],
)
def test_options_that_cut_documents_are_refused(option, value):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} .* not allowed with --carry-state"):
        build_task(carry_state=True, **{option: value})


@pytest.mark.usefixtures("float32")
def test_a_model_without_a_state_of_constant_size_is_refused(data_bin, tmp_path):
    names = ("transformer_lm", "flash_quad_lm_tiny", "transformer_plus_lm_tiny", "transformer_pp_lm_tiny")
    for model in (*(("--arch", name) for name in names), (*tools.TINY, "--attention", "quadratic")):
        with pytest.raises(ValueError, match="state of constant size"):
            tools.train(data_bin, tmp_path, *CARRY, *model)


@pytest.fixture(scope="module")
def document_bin(text_folder, tmp_path_factory):
    """Data of one document for training and three for validation."""
    folder = tmp_path_factory.mktemp("documents")
    lines = tools.real_lines()
    splits = {"train": lines[:120], "valid": [*lines[120:130], "", *lines[130:134], "", *lines[134:150]]}
    tools.write_texts(folder, **splits, test=lines[150:170])
    tools.call("preprocess", *tools.preprocess_arguments(folder, ["train", "valid", "test"]))
    return folder / "bin"


@pytest.mark.usefixtures("float32")
def test_fairseq_eval_lm_of_a_book_in_segments_is_that_of_one_pass(document_bin, checkpoint, data_bin):
    base = (document_bin, "--user-dir", tools.USER_DIR, "--path", checkpoint, "--gen-subset", "test")
    base += ("--num-workers", "0", "--cpu")
    loss = [
        tools.call("eval-lm", *base, *options)
        for options in (("--tokens-per-sample", "10000"), (*CARRY, "--tokens-per-sample", "16"))
    ]
    losses = [float(text.split("Loss (base 2): ")[1].split(",")[0]) for text in loss]
    tokens = [text.split("Evaluated ")[1].split(" tokens")[0] for text in loss]
    assert tokens[0] == tokens[1]
    assert abs(losses[0] - losses[1]) <= 1e-4


@pytest.mark.usefixtures("float32")
def test_fairseq_train_is_not_disturbed_by_validation_and_resumes(document_bin, tmp_path):
    quiet = tools.train(document_bin, tmp_path / "a", *CARRY, "--disable-validation", updates=6)
    often = tools.train(document_bin, tmp_path / "b", *CARRY, "--validate-interval-updates", "1", updates=6)
    assert len(tools.losses(quiet)) == 6
    assert tools.losses(often) == tools.losses(quiet)
    resumed = tools.train(document_bin, tmp_path / "b", *CARRY, updates=8)
    assert [number for number, _ in tools.losses(resumed)] == ["7", "8"]


@pytest.mark.usefixtures("float32")
def test_training_uses_the_carried_state(document_bin, tmp_path, monkeypatch):
    carried = tools.train(document_bin, tmp_path / "a", *CARRY, updates=6)
    monkeypatch.setattr(RowMemory, "recall", lambda self, stack, like: stack.empty_state(like))
    blind = tools.train(document_bin, tmp_path / "b", *CARRY, updates=6)
    assert tools.losses(carried)[0] == tools.losses(blind)[0]
    assert tools.losses(carried)[1:] != tools.losses(blind)[1:]


@pytest.mark.parametrize("system", CONSTANT)
def test_activation_checkpointing_leaves_the_gradients_as_they_are(system):
    gradients = []
    for checkpointed in (False, True):
        task = build_task(carry_state=True)
        options = {"checkpoint_activations": checkpointed, **SYSTEMS.get(system, {})}
        model = build_model(task, **options).train()
        memory, tokens = RowMemory(), torch.arange(4, 15).unsqueeze(0)
        for step, part in enumerate(tokens.split(5, dim=1)):
            memory.announce([step], [step + 1])
            logits, _ = model(part, memory=memory)
            nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-10, rtol=1e-9)
