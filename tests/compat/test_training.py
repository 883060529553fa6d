"""Proves that a training that is complete does nothing more, goes on as it was, and ends with status 0."""

import re
import shutil
import threading
import time

import pytest
import torch
from fairseq.data.iterators import BufferedIterator

from support import tools

MODELS = ("flash_lm", "flash_masked_lm", "flash_seq2seq")


def train(words, folder, *arguments, updates=4) -> str:
    return tools.call("train", *words, "--save-dir", folder, "--max-update", updates, *arguments)


def updates_of(folder) -> int:
    return torch.load(folder / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]


@pytest.mark.parametrize("model", MODELS)
def test_a_complete_training_started_again_makes_no_update(words_of_training, trained, tmp_path, model):
    shutil.copytree(trained[model].parent, tmp_path / "save")
    before = (tmp_path / "save" / "checkpoint_last.pt").read_bytes()
    for _ in range(2):
        output = train(words_of_training[model], tmp_path / "save")
        assert "training is complete, nothing is left to do: 4 updates of --max-update 4" in output
    assert (tmp_path / "save" / "checkpoint_last.pt").read_bytes() == before
    train(words_of_training[model], tmp_path / "save", updates=5)
    assert updates_of(tmp_path / "save") == 5


def test_a_training_that_is_complete_with_its_epochs_makes_no_update(words_of_training, tmp_path):
    words = words_of_training["flash_lm"]
    train(words, tmp_path, "--max-epoch", 1, "--batch-size", 64, updates=0)
    before = updates_of(tmp_path)
    train(words, tmp_path, "--max-epoch", 1, "--batch-size", 64, updates=0)
    assert updates_of(tmp_path) == before


def test_a_training_that_has_run_out_of_patience_makes_no_update(words_of_training, tmp_path):
    words = (*words_of_training["flash_lm"], "--validate-interval-updates", 1, "--save-interval-updates", 1)
    hopeless = ("--lr", "1e-12", "--best-checkpoint-metric", "ppl", "--maximize-best-checkpoint-metric")
    train(words, tmp_path, *hopeless, "--patience", 3, updates=50)
    ended = updates_of(tmp_path)
    assert ended < 50
    output = train(words, tmp_path, *hopeless, "--patience", 3, updates=50)
    assert "validations without a better one, with --patience 3" in output
    assert updates_of(tmp_path) == ended
    train(words, tmp_path, *hopeless, "--patience", 5, updates=50)
    assert updates_of(tmp_path) == ended + 2


def test_a_training_whose_time_is_over_makes_no_update(words_of_training, trained, tmp_path):
    shutil.copytree(trained["flash_lm"].parent, tmp_path / "save")
    output = train(words_of_training["flash_lm"], tmp_path / "save", "--stop-time-hours", 1e-9, updates=9)
    assert "--stop-time-hours" in output
    assert updates_of(tmp_path / "save") == 4


def test_fine_tuning_from_a_complete_training_begins(words_of_training, trained, tmp_path):
    pretrained = ("--finetune-from-model", trained["flash_lm"])
    train(words_of_training["flash_lm"], tmp_path, *pretrained)
    assert updates_of(tmp_path) == 4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precise", [(), ("--ema-fp32",)])
def test_an_average_begins_with_the_weights_of_a_run_without(
    words_of_training, trained, tmp_path, model, precise, caplog
):
    shutil.copytree(trained[model].parent, tmp_path / "resumed")
    average = ("--store-ema", "--ema-decay", "1", *precise)
    train(words_of_training[model], tmp_path / "resumed", *average, updates=6)
    train(words_of_training[model], tmp_path / "tuned", *average, "--finetune-from-model", trained[model])
    weights = torch.load(trained[model])["model"]
    for folder in ("resumed", "tuned"):
        state = torch.load(tmp_path / folder / "checkpoint_last.pt")
        average = state["extra_state"]["ema"]
        assert all(torch.equal(average[name], weight) for name, weight in weights.items())
        assert not all(torch.equal(state["model"][name], weight) for name, weight in weights.items())
    assert "holds no average: --store-ema begins with its weights" in caplog.text


def test_a_run_with_an_average_goes_on_with_it(words_of_training, tmp_path):
    words = (*words_of_training["flash_lm"], "--store-ema", "--ema-decay", "0.5", "--ema-fp32")
    train(words, tmp_path / "straight", updates=6)
    train(words, tmp_path / "parts", updates=3)
    train(words, tmp_path / "parts", updates=6)
    one, other = (
        torch.load(tmp_path / run / "checkpoint_last.pt")["extra_state"] for run in ("straight", "parts")
    )
    for name in ("ema", "ema_fp32_params"):
        assert all(torch.equal(weight, other[name][key]) for key, weight in one[name].items())


class Slow:
    """Batches that never end."""

    def __iter__(self):
        while True:
            time.sleep(0.01)
            yield 1

    def __len__(self):
        return 10**6


def test_the_thread_that_loads_ends_with_its_iterator():
    before = threading.active_count()
    batches = BufferedIterator(3, Slow())
    assert next(batches) == 1
    assert threading.active_count() == before + 1
    del batches
    assert threading.active_count() == before


def test_no_thread_loads_when_the_interpreter_ends():
    script = (
        "import atexit, threading, time\n"
        "atexit.register(lambda: print([t.name for t in threading.enumerate() if t.daemon]))\n"
        "import fairseq_flash\n"
        "from fairseq.data.iterators import BufferedIterator\n"
        "from compat.test_training import Slow\n"
        "batches = BufferedIterator(3, Slow())\n"
        "next(batches)\n"
    )
    found = tools.run("python", "-c", script, PYTHONPATH=f"{tools.REPOSITORY}:{tools.REPOSITORY / 'tests'}")
    assert found.returncode == 0, found.stdout
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["missing.pt", "folder"])
def test_a_file_to_begin_with_that_is_none_is_warned_of(words_of_training, tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    output = train(words_of_training["flash_lm"], tmp_path / "save", "--restore-file", path, updates=1)
    assert f"--restore-file {path} is no file: training begins anew" in output
    output = train(words_of_training["flash_lm"], tmp_path / "save", updates=2)
    assert "begins anew" not in output


@pytest.mark.parametrize("criterion", ["adaptive_loss", "masked_lm", "ctc", "wav2vec"])
def test_a_criterion_of_another_model_is_refused_by_name(words_of_training, tmp_path, criterion):
    words = ("--criterion", criterion, "--ddp-backend", "legacy_ddp")
    with pytest.raises(ValueError, match=f"--criterion {criterion} is not allowed .*allowed: cross_entropy"):
        train(words_of_training["flash_lm"], tmp_path, *words)


def test_a_loss_that_the_criterion_does_not_take_is_refused_by_name(words_of_training, tmp_path):
    words = ("--criterion", "label_smoothed_cross_entropy", "--vocabulary-loss", "compiled")
    with pytest.raises(ValueError, match=r"--vocabulary-loss compiled has no effect with --criterion label_"):
        train(words_of_training["flash_lm"], tmp_path, *words)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_short_trainings_end_with_status_0(words_of_training, tmp_path, model, workers):
    for number in range(4):
        words = (*words_of_training[model], "--num-workers", workers, "--seed", number)
        done = tools.run("fairseq-train", *words, "--save-dir", tmp_path / str(number), "--max-update", 3)
        assert done.returncode == 0, done.stdout
        assert re.search(r"done training in", done.stdout)


#: A module of each model, whose weight becomes infinite or no number.
PARTS = {
    "flash_lm": "decoder.stack.blocks.1.uvz",
    "flash_masked_lm": "encoder.stack.blocks.0.out",
    "flash_seq2seq": "decoder.stack.blocks.1.cross_attention.vz",
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_update_and_the_layer_that_are_not_finite_are_named(
    words_of_training, tmp_path, poison, model, number
):
    poison(2, PARTS[model], number)
    told = (
        rf"^update 3: gradients are Nan/Inf; first: (NaN|Inf) detected in output of {PARTS[model]}, .*forward"
    )
    with pytest.raises(FloatingPointError, match=told):
        train(words_of_training[model], tmp_path, "--save-interval-updates", 1)
    assert updates_of(tmp_path) == 2


@pytest.mark.parametrize("model", MODELS)
def test_sharded_weights_are_refused_by_name(words_of_training, tmp_path, model):
    told = "--ddp-backend fully_sharded is not allowed: .*; allowed: pytorch_ddp, .* and --zero-sharding os"
    with pytest.raises(ValueError, match=told):
        train(words_of_training[model], tmp_path / "save", "--ddp-backend", "fully_sharded")
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("model", MODELS)
def test_what_is_not_measured_is_named_and_the_work_is_kept(words_of_training, tmp_path, model):
    words = (*words_of_training[model], "--batch-size", 40)
    told = r"--best-checkpoint-metric bleuu is not allowed: .* measure it; allowed: .*loss.*ppl"
    with pytest.raises(ValueError, match=told):
        train(words, tmp_path, "--best-checkpoint-metric", "bleuu", updates=200)
    before = updates_of(tmp_path)
    assert before >= 1
    train(words, tmp_path, "--best-checkpoint-metric", "ppl", updates=before + 1)
    assert updates_of(tmp_path) == before + 1


def test_a_schedule_of_another_kind_is_named(words_of_training, trained, tmp_path):
    words = (
        *words_of_training["flash_lm"],
        "--restore-file",
        trained["flash_lm"],
        "--lr-scheduler",
        "cosine",
    )
    with pytest.raises(ValueError, match=r"--lr-scheduler is not Cosine\w+; allowed: .*--reset-lr-scheduler"):
        train(words, tmp_path, updates=6)
    train(words, tmp_path, "--reset-lr-scheduler", updates=6)
    assert updates_of(tmp_path) == 6


def test_an_override_that_the_optimizer_lacks_is_named(words_of_training, trained, tmp_path):
    words = (*words_of_training["flash_lm"], "--restore-file", trained["flash_lm"])
    with pytest.raises(
        ValueError, match=r"--optimizer-overrides: .* no 'weight_decai'; allowed: .*weight_decay"
    ):
        train(words, tmp_path, "--optimizer-overrides", "{'weight_decai': 0.1}", updates=6)
    train(words, tmp_path, "--optimizer-overrides", "{'weight_decay': 0.1}", updates=6)
    assert updates_of(tmp_path) == 6


def test_a_file_to_continue_once_that_is_none_is_warned_of(words_of_training, tmp_path):
    output = train(words_of_training["flash_lm"], tmp_path, "--continue-once", "/none.pt", updates=1)
    assert "--continue-once /none.pt is no file" in output
