"""Proves that options of fairseq's generation hold for any batch, or are refused by name."""

import re
import shutil

import pytest
import torch
from fairseq.search import DiverseBeamSearch
from fairseq_cli import eval_lm

from fairseq_flash.models.flash_lm import FlashLanguageModel
from support import tools

LANGUAGES = ("--source-lang", "here", "--target-lang", "there")


def generate(tool, data, path, *arguments) -> str:
    plug_in = ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--gen-subset", "test")
    return tools.call(tool, data, *plug_in, *arguments)


def test_diverse_groups_find_the_same_in_batches_of_any_size(parallel, trained):
    def found(size):
        groups = ("--diverse-beam-groups", "2", "--beam", "4", "--nbest", "4", "--max-len-b", "8")
        output = generate(
            "generate", parallel, trained["flash_seq2seq"], *LANGUAGES, *groups, "--batch-size", size
        )
        return tools.rows(output, "D")

    all_at_once = found(12)
    assert len(all_at_once) == 12
    for number, hypotheses in found(3).items():
        words = [words for _, words in all_at_once[number]]
        assert [words for _, words in hypotheses] == words


def test_the_overlap_of_groups_is_that_of_the_sentence_when_others_have_ended(parallel, trained):
    """A batch that shrinks: the sentence that is left is searched as it is alone."""
    steps = [torch.randn(2, 4, 30).log_softmax(2) for _ in range(3)]

    def search(rows, numbers):
        beam = DiverseBeamSearch(tools_dictionary(), 2, 0.5)
        for number, step in enumerate(steps):
            rows_now = rows if number < 2 else rows[-1:]
            scores = torch.zeros(len(rows_now), 4, number)
            ids = numbers if number < 2 else numbers[-1:]
            found = beam.step(number, step[rows_now], scores, None, ids)
        return [part[-1] for part in found]

    together = search([0, 1], torch.tensor([70, 4]))
    alone = search([1], torch.tensor([4]))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def tools_dictionary():
    from fairseq.data import Dictionary

    words = Dictionary()
    for number in range(26):
        words.add_symbol(f"word{number}")
    return words


@pytest.mark.parametrize("kind", ["ordered", "unordered"])
@pytest.mark.parametrize("tool", ["generate", "interactive"])
def test_constraints_are_refused_by_name_with_a_language_model(data_bin, trained, tool, kind):
    task = ("--task", "language_modeling", "--sample-break-mode", "eos")
    with pytest.raises(ValueError, match=f"--constraints {kind} is not allowed with a language model"):
        generate(tool, data_bin, trained["flash_lm"], *task, "--constraints", kind)


def test_constraints_are_refused_by_name_where_the_data_have_none(parallel, trained):
    with pytest.raises(ValueError, match="--constraints is not allowed with fairseq-generate"):
        generate("generate", parallel, trained["flash_seq2seq"], *LANGUAGES, "--constraints")


def test_constraints_are_kept_where_they_follow_the_sentence(parallel, trained, tmp_path):
    (tmp_path / "text").write_text("the class of\tmodule\n")
    arguments = (*LANGUAGES, "--constraints", "--input", tmp_path / "text", "--max-len-b", "12")
    output = generate("interactive", parallel, trained["flash_seq2seq"], *arguments)
    assert "module" in tools.rows(output, "D")["0"][0][1].split()


def test_batches_in_buckets_of_lengths_train(words_of_training, tmp_path):
    words = (*words_of_training["flash_seq2seq"], "--num-batch-buckets", "3", "--max-tokens", "400")
    output = tools.call("train", *words, "--save-dir", tmp_path, "--max-update", 2)
    assert "bucketing source lengths" in output
    assert (tmp_path / "checkpoint_last.pt").exists()


def validate(data_bin, path, *arguments):
    plug_in = ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--valid-subset", "valid")
    return tools.call("validate", data_bin, *plug_in, "--batch-size", 2, *arguments)


@pytest.mark.parametrize("arguments", [(), ("--carry-state",)])
def test_validation_with_another_task_is_refused_by_name(data_bin, trained, arguments):
    told = "--task flash_language_modeling is not allowed with .*--task language_modeling, which fairseq"
    with pytest.raises(ValueError, match=told):
        validate(data_bin, trained["flash_lm"], "--task", "flash_language_modeling", *arguments)


def test_validation_carries_the_state_where_the_task_can(data_bin, words_of_training, tmp_path):
    task = ("--task", "flash_language_modeling")
    tools.call("train", *words_of_training["flash_lm"], *task, "--save-dir", tmp_path, "--max-update", 2)
    path, blocks = tmp_path / "checkpoint_last.pt", ("--tokens-per-sample", "8")
    plain, carried = (
        float(re.search(r"ppl ([\d.]+)", validate(data_bin, path, *task, *blocks, *carry))[1])
        for carry in ((), ("--carry-state",))
    )
    test = ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--gen-subset", "valid", "--batch-size", 2)
    evaluated = tools.perplexity(tools.call("eval-lm", data_bin, *test, *task, *blocks, "--carry-state"))
    assert carried == pytest.approx(evaluated, rel=1e-3)
    assert carried != plain


@pytest.mark.parametrize("option", ["--print-step", "--retain-iter-history"])
def test_steps_of_what_has_none_are_refused_by_name(parallel, data_bin, trained, option):
    for model, words in {
        "flash_seq2seq": (parallel, *LANGUAGES),
        "flash_lm": (data_bin, "--task", "language_modeling"),
    }.items():
        with pytest.raises(
            ValueError, match=f"{option} is not allowed; allowed: with --task translation_lev"
        ):
            generate("generate", words[0], trained[model], *words[1:], option)


def test_validation_without_a_task_says_which_is_meant(data_bin, trained, capsys):
    with pytest.raises(SystemExit):
        tools.call("validate", data_bin, "--user-dir", tools.USER_DIR, "--path", trained["flash_lm"])
    assert "--task is missing; allowed: the task that the checkpoint was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("beam", 0, "1 or more"),
        ("beam", -1, "1 or more"),
        ("sampling_topk", 0, "1 or more, or -1"),
        ("sampling_topk", -2, "1 or more, or -1"),
        ("sampling_topp", 1.5, "above 0 to 1"),
        ("sampling_topp", 0.0, "above 0 to 1"),
        ("sampling_topp", float("nan"), "above 0 to 1"),
    ],
)
def test_a_choice_of_words_that_cannot_be_is_refused_by_name(trained, data_bin, option, value, allowed):
    path = trained["flash_lm"]
    interface = FlashLanguageModel.from_pretrained(str(path.parent), path.name, str(data_bin))
    own = f"--{option.replace('_', '-')} {value} is not allowed; allowed: {allowed}"
    with pytest.raises(ValueError, match=own):
        interface.sample("the", **{"beam": 1, "sampling": True, option: value})
    for some in ({"sampling_topk": 3}, {"sampling_topp": 1.0}):
        interface.sample("the", beam=1, sampling=True, max_len_b=3, **some)


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"nbest": 3, "beam": 2}, "--nbest 3 is not allowed with --beam 2; allowed: 1 to 2"),
        ({"sampling_topk": 5}, "--sampling-topk 5 has no effect without --sampling"),
        ({"sampling_topp": 0.5}, "--sampling-topp 0.5 has no effect without --sampling"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_by_name(trained, data_bin, options, own):
    path = trained["flash_lm"]
    interface = FlashLanguageModel.from_pretrained(str(path.parent), path.name, str(data_bin))
    with pytest.raises(ValueError, match=own):
        interface.sample("the", **{"beam": 5, **options})


@pytest.mark.parametrize("tool", ["eval-lm", "generate"])
@pytest.mark.parametrize("model", ["flash_masked_lm", "flash_seq2seq"])
def test_a_model_of_no_next_word_is_named(data_bin, parallel, trained, tmp_path, tool, model):
    # With a dictionary of its own size, whatever it is.
    data = parallel if model == "flash_seq2seq" else data_bin
    shutil.copytree(data_bin, tmp_path / "bin")
    if model == "flash_seq2seq":
        shutil.copy(data / "dict.here.txt", tmp_path / "bin" / "dict.txt")
    with pytest.raises(
        ValueError, match=rf"--task language_modeling is not allowed with .*{model}.*allowed: "
    ):
        generate(tool, tmp_path / "bin", trained[model], "--task", "language_modeling")


def test_an_evaluation_of_nothing_is_no_result(data_bin, trained, monkeypatch):
    monkeypatch.setattr(eval_lm, "eval_lm", lambda *models, **options: {"loss": 0, "perplexity": 1})
    with pytest.raises(ValueError, match="no token was evaluated; allowed: "):
        generate("eval-lm", data_bin, trained["flash_lm"], "--task", "language_modeling")


def test_an_empty_shard_of_an_evaluation_is_told(data_bin, trained):
    words = ("--task", "language_modeling", "--tokens-per-sample", 512, "--num-shards", 3, "--shard-id", 2)
    output = generate("eval-lm", data_bin, trained["flash_lm"], *words)
    assert "no token was evaluated: this one of 3 shards has none" in output


def test_a_loss_of_zero_is_a_result(data_bin, trained, monkeypatch):
    found = {"loss": torch.tensor(0.0), "perplexity": torch.tensor(1.0)}
    monkeypatch.setattr(eval_lm, "eval_lm", lambda *models, **options: found)
    output = generate("eval-lm", data_bin, trained["flash_lm"], "--task", "language_modeling")
    assert "Perplexity: 1.00" in output
