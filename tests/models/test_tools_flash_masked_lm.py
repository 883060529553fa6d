"""Proves that fairseq's own tools train, resume, fine-tune, validate and ask flash_masked_lm.

Words are tokens here; ``test_prepare_classification.py`` does the same with a sentencepiece model.
"""

import re
import shutil

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_flash.models.flash_masked_lm import FlashMaskedLM
from support import tools

SIZES = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16", "--chunk-size", "8")
MODEL = ("--user-dir", tools.USER_DIR, "--arch", "flash_masked_lm_tiny", *SIZES, *tools.QUICK, *tools.ADAM)
MASKED = ("--task", "masked_lm", "--criterion", "masked_lm", "--tokens-per-sample", "32")
CLASSES = (
    *("--task", "sentence_prediction", "--criterion", "sentence_prediction", "--num-classes", "2"),
    *("--init-token", "0", "--separator-token", "2", "--max-positions", "64"),
)
ANEW = ("--reset-optimizer", "--reset-dataloader", "--reset-meters")
QUADRATIC = ("--attention", "quadratic")
BAD_OPTIONS = {
    "a Transformer": (("--block", "transformer"), "block transformer .*causal; allowed: gau"),
    "n_ref without a table": ((*QUADRATIC, "--n-ref", "9"), "n-ref 9 has no effect.*toeplitz"),
    "n_ref of mixed_chunk": (("--n-ref", "9"), "n-ref 9 has no effect.*quadratic"),
    "odd embed dim": (("--embed-dim", "31"), "embed-dim 31 .*even numbers from 2"),
    "no layers": (("--layers", "0"), "layers 0 .*allowed: 1 or more"),
    "chunk size 0": (("--chunk-size", "0"), "chunk.size.0 .*allowed: 1 or more"),
    "dropout in a head": (("--pooler-dropout", "1"), "pooler-dropout 1.0 .*allowed: 0 to below 1"),
    "attention dropout": (("--attention-dropout", "0.1"), "attention-dropout 0.1 .*allowed: 0"),
}


def train(data, save_dir, *arguments, updates=4) -> str:
    return tools.call("train", data, *MODEL, "--save-dir", save_dir, "--max-update", updates, *arguments)


def fine_tune(data, save_dir, pretrained, *arguments, updates=4) -> str:
    return train(data, save_dir, *CLASSES, "--restore-file", pretrained, *ANEW, *arguments, updates=updates)


def validate(data, path, *arguments) -> str:
    plug_in = ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--num-workers", "0")
    return tools.call("validate", data, *plug_in, *arguments, "--valid-subset", "valid", "--batch-size", 4)


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint_last.pt")["model"]


@pytest.fixture(scope="module")
def pretrained(data_bin, tmp_path_factory):
    """A checkpoint after a few updates of masked_lm."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(data_bin, folder, *MASKED)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def labelled(data_bin, tmp_path_factory):
    """Data of sentence_prediction: whether "the" stands in a line; with an empty line and unknown words."""
    folder, lines = tmp_path_factory.mktemp("labelled"), tools.real_lines()
    splits = {"train": lines[:200], "valid": [*lines[400:440], "", "qwxz " * 40], "test": lines[440:460]}
    write_labelled(folder, data_bin, splits)
    return folder / "bin"


def write_labelled(folder, data_bin, splits):
    """Binarizes lines by split, each with its label."""
    labels = {split: [str("the" in line.split()) for line in lines] for split, lines in splits.items()}
    tools.binarize(folder, "input0", splits, "--srcdict", data_bin / "dict.txt")
    tools.binarize(folder, "label", labels)


@pytest.fixture(scope="module")
def ranked(data_bin, tmp_path_factory):
    """Data of sentence_ranking: a line, and two to choose from, of which the right one has a "the"."""
    folder, lines = tmp_path_factory.mktemp("ranked"), tools.real_lines()
    with_the, without = ([line for line in lines if ("the" in line.split()) is has] for has in (True, False))
    parts = {"input0": lines, "input1": with_the, "input2": without}
    (folder / "bin" / "label").mkdir(parents=True)
    for part, texts in parts.items():
        splits = {"train": texts[:200], "valid": texts[200:240]}
        tools.binarize(folder, part, splits, "--srcdict", data_bin / "dict.txt")
    for split in splits:
        (folder / "bin" / "label" / f"{split}.label").write_text("0\n" * len(splits[split]))
    return folder / "bin"


@pytest.fixture(scope="module")
def fine_tuned(labelled, pretrained, tmp_path_factory):
    """The folder of a fine-tuned checkpoint, and what fairseq-train printed."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    return folder, fine_tune(labelled, folder, pretrained, updates=100)


def load(path, data):
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(data)}
    )
    return models[0].eval(), task


def test_training_lowers_the_loss_of_masked_words(data_bin, tmp_path):
    logged = tools.losses(train(data_bin, tmp_path, *MASKED, updates=80))
    first, last = (sum(float(loss) for _, loss in part) / 20 for part in (logged[:20], logged[-20:]))
    assert last < first - 0.4


def test_ranking_trains_from_a_pretrained_checkpoint(ranked, pretrained, tmp_path):
    words = ("--task", "sentence_ranking", "--criterion", "sentence_ranking", "--num-classes", 2)
    words = (*words, "--init-token", 0, "--separator-token", 2)
    start = ("--restore-file", pretrained, *ANEW)
    output = train(ranked, tmp_path, *words, *start, updates=60)
    assert float(re.findall(r'"valid_accuracy": "([\d.]+)"', output)[-1]) > 70
    assert len(tools.losses(train(ranked, tmp_path, *words, updates=62))) == 2
    head = "classification_heads.sentence_classification_head.out_proj.weight"
    assert weights(tmp_path)[head].shape == (1, 32)
    validate(ranked, tmp_path / "checkpoint_last.pt", *words)


@pytest.mark.parametrize(
    "options",
    [("--dropout", "0.1"), QUADRATIC, ("--untie-weights-roberta",), ("--checkpoint-activations",)],
    ids=" ".join,
)
def test_a_resumed_training_is_the_same_to_the_bit(data_bin, tmp_path, options):
    straight = train(data_bin, tmp_path / "straight", *MASKED, *options, updates=6)
    first = train(data_bin, tmp_path / "parts", *MASKED, *options, updates=3)
    rest = train(data_bin, tmp_path / "parts", *MASKED, *options, updates=6)
    assert tools.losses(first) + tools.losses(rest) == tools.losses(straight)
    one, other = (weights(tmp_path / run) for run in ("straight", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_validate_prints_the_loss_of_the_masked_words(data_bin, pretrained):
    output = validate(data_bin, pretrained, *MASKED)
    model, task = load(pretrained, data_bin)
    task.load_dataset("valid")
    task.datasets["valid"].set_epoch(1)  # on which the masks depend
    total = count = 0
    for sample in (task.datasets["valid"][i] for i in range(len(task.datasets["valid"]))):
        masked = sample["target"].ne(task.source_dictionary.pad())
        with torch.no_grad():
            output_of_row = model(sample["net_input.src_tokens"].unsqueeze(0))
        log_probs = model.get_normalized_probs(output_of_row, log_probs=True)[0]
        total -= log_probs[masked, sample["target"][masked]].sum().item()
        count += int(masked.sum())
    printed = float(re.search(r"valid on 'valid' subset \| loss ([\d.]+)", output)[1])
    assert printed == pytest.approx(total / count / 0.6931471805599453, abs=1e-3)


def test_fine_tuning_starts_from_the_encoder_of_the_checkpoint(labelled, pretrained, tmp_path):
    fine_tune(labelled, tmp_path, pretrained, "--lr", "0", updates=1)
    before, after = torch.load(pretrained)["model"], weights(tmp_path)
    heads = {name for name in after if name.startswith("classification_heads.sentence_classification_head.")}
    assert after.keys() - before.keys() == heads != set()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_fine_tuned_model_knows_the_classes_and_validate_says_so(fine_tuned, labelled):
    folder, printed = fine_tuned
    trained = re.findall(r'"valid_accuracy": "([\d.]+)"', printed)[-1]
    assert float(trained) > 75
    output = validate(labelled, folder / "checkpoint_last.pt", *CLASSES)
    assert float(re.search(r"accuracy ([\d.]+)", output)[1]) == float(trained)


def test_fine_tuning_resumes_to_the_bit(labelled, pretrained, tmp_path):
    fine_tune(labelled, tmp_path / "straight", pretrained, updates=6)
    fine_tune(labelled, tmp_path / "parts", pretrained, updates=3)
    train(labelled, tmp_path / "parts", *CLASSES, updates=6)
    one, other = (weights(tmp_path / run) for run in ("straight", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_rows_longer_than_in_pretraining_are_classified(labelled, data_bin, pretrained, tmp_path):
    lines = [" ".join(tools.real_lines()[i : i + 40]) for i in range(0, 320, 40)]
    assert min(len(line.split()) for line in lines) > 200
    write_labelled(tmp_path, data_bin, {"train": [*lines, "nothing"], "valid": [*lines, ""]})
    arguments = ("--max-positions", "2000", "--batch-size", "2")
    output = fine_tune(tmp_path / "bin", tmp_path / "saved", pretrained, *arguments, updates=5)
    assert len(tools.losses(output)) == 5
    assert "invalid sizes" not in output
    assert "nan" not in output.lower()


def test_a_table_of_positions_is_kept_at_its_length_and_refuses_longer_rows(labelled, data_bin, tmp_path):
    table = (*QUADRATIC, "--relative-bias", "toeplitz")
    train(data_bin, tmp_path / "first", *MASKED, *table, updates=1)
    path = tmp_path / "first" / "checkpoint_last.pt"
    with pytest.raises(ValueError, match=r"row of \d\d tokens is longer than the table .*limit is 32"):
        fine_tune(labelled, tmp_path / "second", path, *table, updates=60)


def test_dictionaries_of_unequal_size_are_named_with_both_sizes(data_bin, pretrained, tmp_path):
    tools.write_texts(tmp_path, train=["a b c"], valid=["a b"])
    (tmp_path / "dict.txt").write_text("a 1\nb 1\nc 1\n")
    splits = {"train": ["a b c", "the"], "valid": ["a", "the"]}
    write_labelled(tmp_path, tmp_path, splits)
    stored = len(torch.load(pretrained)["model"]["encoder.lm_head.bias"])
    message = rf"checkpoint_last.pt: .*dictionary has {stored} words, the data's 8, .*dict.txt"
    with pytest.raises(ValueError, match=message):
        fine_tune(tmp_path / "bin", tmp_path / "saved", pretrained)


def test_a_head_of_another_number_of_classes_is_refused_and_another_name_is_taken(
    labelled, fine_tuned, tmp_path
):
    checkpoint = fine_tuned[0] / "checkpoint_last.pt"
    with pytest.raises(ValueError, match=r"'sentence_classification_head' has 5 classes .*name 2 and 32"):
        fine_tune(labelled, tmp_path / "refused", checkpoint, "--num-classes", "5")
    other = ("--num-classes", "5", "--classification-head-name", "other")
    output = fine_tune(labelled, tmp_path / "taken", checkpoint, *other)
    assert "head 'sentence_classification_head' is not used here and left out" in output
    assert len(weights(tmp_path / "taken")["classification_heads.other.out_proj.bias"]) == 5


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_that_is_not_allowed_is_named(data_bin, tmp_path, name):
    arguments, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        train(data_bin, tmp_path, *MASKED, *arguments)


@pytest.fixture(scope="module")
def hub(pretrained, data_bin):
    return FlashMaskedLM.from_pretrained(str(pretrained.parent), pretrained.name, str(data_bin), bpe=None)


def test_the_interface_fills_a_mask_as_the_model_does(hub, pretrained, data_bin):
    model, task = load(pretrained, data_bin)
    dictionary = task.source_dictionary
    found = hub.fill_mask("if the <mask> is a class", topk=3)
    words = ["<s>", "if", "the", "<mask>", "is", "a", "class", "</s>"]
    tokens = torch.tensor([[dictionary.index(word) for word in words]])
    assert torch.equal(hub.encode("if the <mask> is a class"), tokens[0])
    with torch.no_grad():
        values, indices = model(tokens)[0][0, 3].softmax(0).topk(3)
    assert [word for _, _, word in found] == [dictionary[index] for index in indices]
    assert [value for _, value, _ in found] == pytest.approx(values.tolist())
    assert [text for text, _, _ in found] == [f"if the {word} is a class" for _, _, word in found]
    assert len(hub.fill_mask("<mask>", topk=len(dictionary))) == len(dictionary)


@pytest.mark.parametrize("text", ["no mask", "<mask> and <mask>"])
def test_the_interface_asks_for_one_mask(hub, text):
    with pytest.raises(ValueError, match=r"masked_input has [02] times <mask>; allowed: once"):
        hub.fill_mask(text)
    with pytest.raises(ValueError, match=r"topk=0 .*allowed: 1 to"):
        hub.fill_mask("a <mask>", topk=0)


def test_the_interface_reads_back_what_it_encodes(hub):
    assert hub.decode(hub.encode("if the value <mask> a")) == "if the value <mask> a"
    assert hub.decode(hub.encode("if the", "value of")) == ["if the", "value of"]
    assert hub.decode(hub.encode("if the", "value of", no_separator=True)) == "if the value of"
    assert hub.decode(hub.encode("")) == ""
    with pytest.raises(ValueError, match="one row at a time"):
        hub.decode(hub.encode("if").unsqueeze(0))


def test_the_interface_has_features_and_heads_without_dropout_and_at_any_length(hub):
    rows = torch.full((2, 700), hub.task.source_dictionary.pad())
    rows[0], rows[1, 690:] = 5, hub.encode("if the value of a class is the")
    hub.register_classification_head("new", num_classes=3)
    with torch.no_grad():
        features, classes = hub.extract_features(rows), hub.predict("new", rows)
        alone = hub.predict("new", rows[1, 690:])
        assert hub.predict("new", rows, return_logits=True).log_softmax(1).equal(classes)
    assert features.shape == (2, 700, 32)
    assert classes.exp().sum(1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(classes[1:], alone)
    with pytest.raises(ValueError, match=r"'neww' is unknown; allowed: new"):
        hub.predict("neww", rows)
    with pytest.raises(ValueError, match=r"return_all_hiddens=True is not allowed"):
        hub.extract_features(rows, return_all_hiddens=True)
    with pytest.raises(ValueError, match=r"num_classes=None .*allowed: 1 or more"):
        hub.register_classification_head("bad")


def test_a_fine_tuned_checkpoint_predicts_what_validation_counted(fine_tuned, labelled):
    folder, printed = fine_tuned
    hub = FlashMaskedLM.from_pretrained(str(folder), "checkpoint_last.pt", str(labelled), bpe=None)
    hub.task.load_dataset("valid")
    labels = hub.task.label_dictionary
    right = total = 0
    for number in range(len(hub.task.datasets["valid"])):
        sample = hub.task.datasets["valid"][number]
        with torch.no_grad():
            classes = hub.predict("sentence_classification_head", sample["net_input.src_tokens"])
        right, total = right + int(classes.argmax() == sample["target"]), total + 1
    trained = float(re.findall(r'"valid_accuracy": "([\d.]+)"', printed)[-1])
    assert 100 * right / total == pytest.approx(trained, abs=0.05)
    with torch.no_grad():
        classes = hub.predict("sentence_classification_head", hub.encode("the value of the class"))
    named = hub.predict_labels("sentence_classification_head", hub.encode("the value of the class"))
    assert set(named[0]) == {"True", "False"}
    assert next(iter(named[0])) == labels[int(classes.argmax()) + labels.nspecial]
    assert list(named[0].values()) == pytest.approx(classes.exp()[0].sort(descending=True).values.tolist())
    hub.register_classification_head("three", num_classes=300)
    with pytest.raises(ValueError, match=r"names \d+ labels, head 'three' has 300 classes; allowed"):
        hub.predict_labels("three", hub.encode("the value"))
    assert hub.fill_mask("the <mask> of")


def test_a_head_that_only_the_checkpoint_has_is_there_in_the_interface(hub, pretrained, data_bin, tmp_path):
    hub.register_classification_head("extra", num_classes=3, inner_dim=5)
    head = hub.model.classification_heads["extra"].state_dict()
    state = torch.load(pretrained)
    state["model"].update({f"classification_heads.extra.{name}": tensor for name, tensor in head.items()})
    torch.save(state, tmp_path / "with_head.pt")
    loaded = FlashMaskedLM.from_pretrained(str(tmp_path), "with_head.pt", str(data_bin), bpe=None)
    tokens = hub.encode("if the value")
    with torch.no_grad():
        assert torch.equal(loaded.predict("extra", tokens), hub.predict("extra", tokens))


def test_a_missing_sentencepiece_model_is_named(pretrained, data_bin):
    with pytest.raises(ValueError, match=r"no sentencepiece.bpe.model in .*bpe=None"):
        FlashMaskedLM.from_pretrained(str(pretrained.parent), pretrained.name, str(data_bin))


def test_a_checkpoint_that_is_moved_with_its_dictionary_is_enough(pretrained, data_bin, tmp_path):
    for path in (pretrained, data_bin / "dict.txt"):
        shutil.copy(path, tmp_path)
    hub = FlashMaskedLM.from_pretrained(str(tmp_path), pretrained.name, bpe=None)
    assert hub.fill_mask("the <mask> of")


ROBERTA = (
    *("--user-dir", tools.USER_DIR, *tools.QUICK, *tools.ADAM, "--encoder-layers", "1"),
    *("--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16", "--encoder-attention-heads", "2"),
)
PADDED = torch.tensor([[0, 9, 8, 7, 2], [0, 5, 2, 1, 1]])


@pytest.mark.parametrize("kind", ["mean", "attention"])
@pytest.mark.parametrize("family", ["flash", "roberta"])
def test_heads_of_every_pooling_are_fine_tuned_from_the_same_checkpoint(
    data_bin, labelled, pretrained, tmp_path, family, kind
):
    head = ("--pooling", kind, "--lr", "0.01")
    if family == "flash":
        fine_tune(labelled, tmp_path, pretrained, *head)
    else:
        common = ("train", data_bin, *ROBERTA, "--save-dir", tmp_path / "first", "--max-update", "2")
        tools.call(*common, "--arch", "roberta", *MASKED, "--max-positions", "64")
        start = ("--restore-file", tmp_path / "first" / "checkpoint_last.pt", *ANEW, "--max-update", "4")
        words = ("train", labelled, *ROBERTA, *CLASSES, "--arch", "pooled_roberta", *start, *head)
        tools.call(*words, "--save-dir", tmp_path)
    model, _ = load(tmp_path / "checkpoint_last.pt", labelled)
    (found,) = model.classification_heads.values()
    assert found.pooling.kind == kind
    with torch.no_grad():
        features, _ = model(PADDED, features_only=True)
        logits, _ = model(PADDED, classification_head_name="sentence_classification_head")
        scores = torch.zeros(2, 5)
        if kind == "attention":
            assert found.pooling.query.abs().max() > 0
            scores = features @ found.pooling.query / features.shape[-1] ** 0.5
        weights = scores.exp() * PADDED.ne(1)
        pooled = (weights.unsqueeze(-1) * features).sum(1) / weights.sum(1, keepdim=True)
        torch.testing.assert_close(logits, found(pooled.unsqueeze(1)))


def test_a_pooled_roberta_of_the_first_token_is_roberta(data_bin, labelled, tmp_path):
    words = ("train", labelled, *ROBERTA, *CLASSES, "--max-update", "2")
    for arch in ("roberta", "pooled_roberta"):
        tools.call(*words, "--arch", arch, "--save-dir", tmp_path / arch)
    one, other = (weights(tmp_path / arch) for arch in ("roberta", "pooled_roberta"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_trained_head_keeps_its_pooling(labelled, fine_tuned, tmp_path):
    folder, _ = fine_tuned
    path = folder / "checkpoint_last.pt"
    with pytest.raises(ValueError, match=r"--pooling mean \(trained with first\)"):
        fine_tune(labelled, tmp_path / "refused", path, "--pooling", "mean")
    # One of before there was a choice has no word of it.
    state = torch.load(path)
    record = bytes(state["model"]["_extra_state"].int().tolist()).replace(b'"pooling": "first", ', b"")
    assert b"pooling" not in record.replace(b"pooler", b"")
    state["model"]["_extra_state"] = torch.tensor(list(record), dtype=torch.float64)
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"--pooling mean \(trained with first\)"):
        fine_tune(labelled, tmp_path / "refused", tmp_path / "old.pt", "--pooling", "mean")
    fine_tune(labelled, tmp_path / "taken", tmp_path / "old.pt")
