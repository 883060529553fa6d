"""Proves that flash_recall asks for exactly what it told, and that every system trains on its rows."""

import json
import re

import pytest
import torch

from fairseq_flash.tasks.recall import RecallConfig, RecallTask
from support import tools

SMALL = ("--pairs", "3", "--tokens-per-sample", "24", "--recall-words", "8", "--train-rows", "64")
SYSTEMS = ("flash_lm", "flash_local_lm", "flash_global_lm", "flash_quad_lm", "transformer_plus_lm")
SYSTEMS = (*SYSTEMS, "transformer_pp_lm", "mc_transformer_pp_lm", "transformer_lm")
TINY_TRANSFORMER = ("--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-attention-heads", "2")


def rows_of(split="train", **options):
    task = RecallTask(RecallConfig(**{**dict(train_rows=40, held_out_rows=40), **options}))
    task.load_dataset(split)
    return task, task.dataset(split)


@pytest.mark.parametrize(("n", "pairs", "gap"), [(3, 1, 0), (12, 4, 0), (40, 7, 13), (41, 7, 20)])
def test_every_question_is_a_key_and_its_answer_the_value_that_followed_it(n, pairs, gap):
    task, rows = rows_of(tokens_per_sample=n, pairs=pairs, recall_gap=gap, recall_words=9)
    words = task.dictionary
    for row in map(rows.__getitem__, range(40)):
        source, target = row["source"].tolist(), row["target"].tolist()
        assert len(source) == len(target) == n
        told = dict(zip(source[: 2 * pairs : 2], source[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        asked = [place for place in range(n) if target[place] != words.pad()]
        assert sorted(source[place] for place in asked) == sorted(told)
        assert all(target[place] == told[source[place]] for place in asked)
        assert min(asked) >= 2 * pairs + gap
        rest = [token for place, token in enumerate(source) if place not in asked and token not in told]
        assert all(words[token].startswith("value") for token in rest)
        assert all(words[key].startswith("key") for key in told)
        assert len(rest) == n - 2 * pairs


def test_rows_depend_on_their_number_split_and_seed_alone():
    def sources(split, **options):
        _, rows = rows_of(split, tokens_per_sample=64, **options)
        return torch.stack([rows[index]["source"] for index in range(len(rows))])

    whole = sources("train")
    assert torch.equal(whole, sources("train"))
    assert torch.equal(whole[:10], sources("train", train_rows=10))
    assert len(whole.unique(dim=0)) == 40
    for other in (sources("valid"), sources("train", recall_seed=2)):
        assert not (other == whole).all(dim=1).any()
    _, rows = rows_of(tokens_per_sample=64)
    batch = rows.collater([rows[3], rows[5]])
    assert torch.equal(batch["net_input"]["src_tokens"], whole[[3, 5]])
    assert batch["ntokens"] == 32 == int(batch["target"].ne(1).sum())
    assert rows.collater([]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pairs=0), "--pairs 0 is not allowed; allowed: 1 or more"),
        (dict(recall_gap=-1), "--recall-gap -1 is not allowed; allowed: 0 or more"),
        (dict(recall_words=15), "--recall-words 15 is not allowed; allowed: 16 or more"),
        (dict(tokens_per_sample=67, recall_gap=20), "--tokens-per-sample 67 is not allowed; allowed: 68"),
    ],
)
def test_rows_without_room_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        rows_of(**options)


def train(folder, *words):
    usual = (
        *("--user-dir", tools.USER_DIR, "--task", "flash_recall", "--save-dir", folder, *tools.ADAM),
        *("--criterion", "label_smoothed_cross_entropy", "--report-accuracy", "--num-workers", "0", "--cpu"),
        *("--no-epoch-checkpoints", "--log-format", "json", "--dropout", "0", "--clip-norm", "1"),
    )
    return tools.call("train", *usual, *words)


def accuracy(output):
    return [float(found) for found in re.findall(r'"valid_accuracy": "([\d.]+)"', output)][-1]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_and_its_accuracy_is_logged(system, tmp_path):
    size = ("--embed-dim", "32", "--layers", "2", "--attention-dim", "16")
    arch = ("--arch", f"{system}_tiny", *size)
    if system == "transformer_lm":
        arch = ("--arch", system, *TINY_TRANSFORMER)
    words = ("--held-out-rows", "20", "--batch-size", "16", "--max-update", "4", "--lr", "1e-3")
    output = train(tmp_path, *SMALL, *words, *arch)
    assert 0 <= accuracy(output) <= 100
    assert json.loads(re.findall(r"\{.*valid_loss.*\}", output)[-1])["valid_num_updates"] == "4"
    assert (tmp_path / "checkpoint_best.pt").exists()


@pytest.mark.long
def test_a_transformer_learns_to_recall(tmp_path):
    words = ("--pairs", "4", "--tokens-per-sample", "32", "--recall-words", "32", "--train-rows", "64000")
    words += (
        "--arch",
        "transformer_pp_lm_tiny",
        "--embed-dim",
        "64",
        "--layers",
        "2",
        "--attention-dim",
        "32",
    )
    words += ("--batch-size", "64", "--max-update", "1000", "--held-out-rows", "250", "--lr", "3e-3")
    # One of the four values that stand there would be 25, one of all 3.
    assert accuracy(train(tmp_path, *words)) > 80
