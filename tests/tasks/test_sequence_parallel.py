"""Proves that fairseq-train with --sequence-parallel-size gives one process's losses, norms and weights."""

import argparse
import os
import sys

import pytest
import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from fairseq_flash.models.flash_lm import FlashLanguageModelConfig
from fairseq_flash.tasks.flash_language_modeling import FlashLanguageModelingConfig, FlashLanguageModelingTask
from support.ranks import run_ranks
from support.tiny_fairseq import DISTRIBUTED, arguments, run, write_data_bin

# Relative; of weights to the largest. Measured: 0.4 epsilons of float32 on losses, 0.3 on weights.
TOLERANCE = 8 * torch.finfo(torch.float32).eps
COMMON = ("--clip-norm", "0.5", "--log-format", "json", "--log-interval", "1", "--seed", "3")
LM = ("--task", "flash_language_modeling", *COMMON)
MASKED = (
    *("--task", "flash_masked_lm", "--arch", "flash_masked_lm_tiny", "--criterion", "masked_lm"),
    *("--chunk-size", "2", "--sample-break-mode", "eos", "--tokens-per-sample", "24", *COMMON),
)
TASKS = {"language model": LM, "masked model": MASKED}


@pytest.fixture(scope="module")
def data_bin(tmp_path_factory):
    return write_data_bin(tmp_path_factory.mktemp("data"))


def train(data_bin, folder, words, *, ranks=1, size=1, updates=4):
    """Trains in so many processes, ``size`` of which share a row."""
    words = [*arguments(data_bin, folder), *words, "--max-update", updates]
    words += ["--sequence-parallel-size", size] if size > 1 else []
    program = ["fairseq-train"] if ranks == 1 else [DISTRIBUTED, "--nproc", ranks]
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    result = run([*program, *words], VIRTUAL_ENV=sys.prefix, PATH=path)
    assert result.returncode == 0, result.stdout


def found(folder):
    """Everything that a training found, unrounded: losses, sizes of batches, norms, weights."""
    state = torch.load(folder / "checkpoint_last.pt")
    meters = {
        f"{part} {name}": float(meter["sum"]) / float(meter["count"])
        for part in ("train", "valid")
        for _, name, _, meter in state["extra_state"]["metrics"][part]
        if name in ("loss", "wpb", "bsz", "gnorm", "clip")
    }
    weights = {name: weight for name, weight in state["model"].items() if torch.is_tensor(weight)}
    return state["optimizer_history"][-1]["num_updates"], meters, weights


def assert_same(folder, expected, but=()):
    """``but`` for meters that begin so."""
    (updates, meters, weights), (of_one, meters_of_one, weights_of_one) = found(folder), found(expected)
    assert updates == of_one
    assert meters.keys() == meters_of_one.keys()
    assert {"train loss", "train gnorm", "train bsz", "valid loss"} <= meters.keys()
    for name, meter in meters.items():
        assert name.startswith(tuple(but)) or meter == pytest.approx(
            meters_of_one[name], rel=TOLERANCE, abs=0
        ), name
    for name, weight in weights.items():
        other = weights_of_one[name]
        assert (weight - other).abs().max() <= TOLERANCE * max(1, other.abs().max()), name


def test_two_processes_that_share_rows_train_as_one(data_bin, tmp_path):
    train(data_bin, tmp_path / "one", LM)
    train(data_bin, tmp_path / "two", LM, ranks=2, size=2)
    assert_same(tmp_path / "two", tmp_path / "one")
    # A row over two processes is another than a row for each.
    train(data_bin, tmp_path / "apart", LM, ranks=2)
    assert found(tmp_path / "apart")[1] != pytest.approx(found(tmp_path / "one")[1], rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_that_share_rows_train_as_one(data_bin, tmp_path, task, ranks):
    """Rows of 5 to 24 tokens, in chunks of 2 and 4: some ranks have no token."""
    words = (*TASKS[task], "--checkpoint-activations")
    train(data_bin, tmp_path / "one", words)
    train(data_bin, tmp_path / "more", words, ranks=ranks, size=ranks)
    assert_same(tmp_path / "more", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_groups_that_share_rows_train_as_so_many_processes(data_bin, tmp_path, task):
    train(data_bin, tmp_path / "one", (*TASKS[task], "--update-freq", "2"))
    train(data_bin, tmp_path / "four", TASKS[task], ranks=4, size=2)
    # Two batches at a time are validated on, which tells sizes, not losses, otherwise.
    assert_same(tmp_path / "four", tmp_path / "one", but=("valid wpb", "valid bsz"))


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_goes_on_with_any_number_of_processes_a_row(data_bin, tmp_path, task):
    """Two, four, then one, within an epoch."""
    train(data_bin, tmp_path / "one", TASKS[task], updates=6)
    for updates, ranks in ((2, 2), (4, 4), (6, 1)):
        train(data_bin, tmp_path / "parts", TASKS[task], ranks=ranks, size=ranks, updates=updates)
    # fairseq goes on with the meters of the validations before.
    assert_same(tmp_path / "parts", tmp_path / "one", but=("valid",))


class _Drawn(torch.nn.Module):
    """Stands for a criterion: notes the random numbers and the part that a step sees."""

    def forward(self, model, sample):
        drawn = (torch.rand(()).item(), sample["net_input"]["src_tokens"].tolist(), sample["ntokens"])
        return model.weight.sum(), 1, {"nsentences": 2, "drawn": drawn}


class _Optimizer:
    def backward(self, loss):
        loss.backward()


def steps(group):
    """Two micro-batches of an update, as a process sees them."""
    task = build_task(sequence_parallel_size=2)
    task._group, task._chunk_size = group, 2
    model = torch.nn.Linear(1, 1)
    model.set_num_updates = lambda updates: None
    pad = task.source_dictionary.pad()
    tokens = torch.tensor([[5, 6, 7, pad, 8], [pad, 5, 6, pad, pad]])
    sample = {"net_input": {"src_tokens": tokens}, "target": tokens, "ntokens": 6}
    torch.manual_seed(1)
    return [task.train_step(sample, model, _Drawn(), _Optimizer(), 0)[2] for _ in range(2)]


def build_task(**options):
    words = Dictionary()
    for word in range(10):
        words.add_symbol(f"w{word}")
    return FlashLanguageModelingTask(FlashLanguageModelingConfig(**options), words)


def test_parts_differ_in_their_random_numbers_and_rows_are_counted_once():
    first, second = run_ranks(steps, 2)
    draws = [step["drawn"][0] for step in (*first, *second)]
    assert len(set(draws)) == 4
    assert [step["nsentences"] for step in (*first, *second)] == [2, 2, 0, 0]
    unk, pad = 3, 1
    # Padding inside a row is a word, padding before it is moved behind it.
    assert first[0]["drawn"][1:] == ([[5, 6, 7, unk], [5, 6, pad, pad]], 6)
    assert second[0]["drawn"][1:] == ([[8, pad, pad, pad], [pad] * 4], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel_size": 0}, "--sequence-parallel-size 0 is not allowed; allowed: 1 or more"),
        (
            {"carry_state": True},
            "--carry-state True is not allowed with --sequence-parallel-size 2; allowed: F",
        ),
        (
            {"self_target": True},
            "--self-target True is not allowed with --sequence-parallel-size 2; allowed: F",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_task(**{"sequence_parallel_size": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "quadratic"}, "is not allowed with --attention quadratic; allowed: models of this"),
        ({"compile": True}, "--sequence-parallel-size 2 is not allowed with --compile; allowed: without"),
    ],
)
def test_models_that_cannot_share_rows_are_refused(options, message):
    sizes = dict(_name="flash_lm", embed_dim=8, layers=1, attention_dim=4, chunk_size=2)
    with pytest.raises(ValueError, match=message):
        build_task(sequence_parallel_size=2).build_model(
            OmegaConf.structured(FlashLanguageModelConfig(**sizes, **options))
        )


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (
            {"_name": "label_smoothed_cross_entropy"},
            "--criterion label_smoothed_cross_entropy; allowed: cross_e",
        ),
        ({"_name": "cross_entropy", "sentence_avg": True}, "--sentence-avg, as no process has whole rows"),
    ],
)
def test_criterions_that_count_otherwise_are_refused(criterion, message):
    options = argparse.Namespace(sentence_avg=False, label_smoothing=0.1, ignore_prefix_size=0)
    options.report_accuracy = False
    vars(options).update(criterion, criterion=criterion["_name"])
    with pytest.raises(ValueError, match=message):
        build_task(sequence_parallel_size=2).build_criterion(options)


def test_one_process_cannot_share_rows_in_training_but_may_have_the_option():
    task = build_task(sequence_parallel_size=2)
    assert task._group is None
    with pytest.raises(
        ValueError, match="--sequence-parallel-size 2 is not allowed with 1 process; allowed: 1"
    ):
        task.begin_epoch(1, None)
