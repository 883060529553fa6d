"""Proves that a trainer that runs ahead of its device trains the same, and loses no failure."""

import re
from unittest import mock

import pytest
import torch
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.trainer import Trainer

from fairseq_flash._compat import ahead
from support import tools

MODELS = ("flash_lm", "flash_masked_lm", "flash_seq2seq")
FUSED = ("--optimizer", "fused_adam", "--clip-norm", 0.5, "--log-interval", 2)


@pytest.fixture
def queued(monkeypatch):
    """Lets a CPU pass for a device that is not waited for; the updates that were not."""
    numbers, heal = [], ahead._Update.__new__

    def counted(cls, number, *rest):
        numbers.append(number)
        return heal(cls, number, *rest)

    monkeypatch.setattr(ahead, "_is_asynchronous", lambda trainer: True)
    monkeypatch.setattr(ahead._Update, "__new__", counted)
    return numbers


def train(words, folder, *arguments, updates=5) -> str:
    return tools.call("train", *words, *FUSED, "--save-dir", folder, "--max-update", updates, *arguments)


def logged(output) -> list[str]:
    return re.findall(r'"(?:train_)?(?:loss|nll_loss|ppl|gnorm|clip|num_updates)": "[^"]*"', output)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=str)
def test_losses_and_weights_are_the_same(words_of_training, tmp_path, queued, monkeypatch, model, precision):
    words = (*words_of_training[model], *precision, "--log-format", "json")
    fast = train(words, tmp_path / "fast")
    assert queued == [0, 1, 2, 3, 4]
    monkeypatch.setattr(ahead, "_is_asynchronous", lambda trainer: False)
    slow = train(words, tmp_path / "slow")
    assert len(queued) == 5
    assert len(logged(slow)) > 8
    assert logged(fast) == logged(slow)
    found, expected = (torch.load(tmp_path / x / "checkpoint_last.pt") for x in ("fast", "slow"))
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    states = (x["last_optimizer_state"]["state"] for x in (found, expected))
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=str)
@pytest.mark.parametrize("options", [("--save-interval-updates", 1), ("--no-save", "--disable-validation")])
def test_the_update_that_failed_is_named_and_has_changed_nothing(
    words_of_training, tmp_path, queued, poison, options, precision
):
    poison(2)
    with pytest.raises(FloatingPointError, match=r"^update 3: gradients are Nan/Inf; first: "):
        train(words_of_training["flash_lm"], tmp_path, *options, *precision)
    assert queued[:3] == [0, 1, 2]
    state = torch.load(tmp_path / "crash.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 2
    moments = state["last_optimizer_state"]["state"].values()
    assert all(x["exp_avg"].isfinite().all() and x["step"] == 2 for x in moments)


@pytest.mark.parametrize("end", [(), ("--max-epoch", 1, "--batch-size", 64)], ids=str)
def test_the_last_update_fails_too(words_of_training, tmp_path, queued, poison, end):
    words = (*words_of_training["flash_lm"], "--no-save", "--disable-validation", *end)
    updates = 0 if end else 5
    train(words, tmp_path, updates=updates)
    last = queued[-1]
    poison(last)
    with pytest.raises(FloatingPointError, match=rf"^update {last + 1}: gradients are Nan/Inf"):
        train(words, tmp_path, updates=updates)


@pytest.mark.parametrize("options", [(), ("--disable-validation",)], ids=str)
def test_no_checkpoint_is_written_behind_an_update_that_failed(
    words_of_training, tmp_path, queued, poison, options
):
    poison(2)
    with pytest.raises(FloatingPointError, match=r"^update 3: "):
        train(words_of_training["flash_lm"], tmp_path, "--save-interval-updates", 3, *options)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["crash.pt"]


def test_no_validation_is_made_behind_an_update_that_failed(
    words_of_training, tmp_path, queued, monkeypatch, poison
):
    poison(2)
    monkeypatch.setattr(Trainer, "valid_step", lambda *_, **__: pytest.fail("validated"))
    with pytest.raises(FloatingPointError, match=r"^update 3: "):
        train(words_of_training["flash_lm"], tmp_path, "--validate-interval-updates", 3, "--no-save")


def test_whether_an_update_was_finite_is_asked_behind_the_next_ones_passes(
    words_of_training, tmp_path, queued, monkeypatch
):
    asked, look = [], ahead._is_broken
    monkeypatch.setattr(
        ahead, "_is_broken", lambda update: asked.append((update.number, *queued)) or look(update)
    )
    clip = Trainer.clip_grad_norm

    def clipped(self, *args):
        asked.append("passes")
        return clip(self, *args)

    monkeypatch.setattr(Trainer, "clip_grad_norm", clipped)
    train(words_of_training["flash_lm"], tmp_path, "--no-save", "--disable-validation", updates=3)
    assert asked == ["passes", "passes", (0, 0), "passes", (1, 0, 1), (2, 0, 1, 2)]


def test_a_failure_is_told_first_and_once_where_the_next_pass_fails_as_well(
    words_of_training, tmp_path, queued, monkeypatch, poison
):
    step = FairseqTask.train_step

    def failing(self, *args, **kwargs):
        if kwargs.get("update_num") == 3:
            raise KeyError("of the user")
        return step(self, *args, **kwargs)

    poison(2)
    monkeypatch.setattr(FairseqTask, "train_step", failing)
    with pytest.raises(FloatingPointError, match=r"^update 3: gradients are Nan/Inf; first"):
        train(words_of_training["flash_lm"], tmp_path, "--no-save", "--disable-validation")


@pytest.mark.parametrize("options", [("--optimizer", "adam"), ("--store-ema",), ("--use-bmuf",)], ids=str)
def test_what_has_to_wait_waits(words_of_training, tmp_path, queued, options):
    train(words_of_training["flash_lm"], tmp_path, *options, updates=2)
    assert queued == []


@pytest.mark.parametrize("reason", ["processes", "scaler"])
def test_several_processes_and_scaled_losses_are_waited_for(
    words_of_training, tmp_path, queued, monkeypatch, reason
):
    adam, found = ahead._adam, []

    def asked(trainer):
        found.append(adam(trainer))
        changed = {"data_parallel_world_size": 2} if reason == "processes" else {}
        optimizer = mock.Mock(fp32_optimizer=trainer.optimizer, scaler=object())
        changed |= {"optimizer": optimizer} if reason == "scaler" else {"optimizer": trainer.optimizer}
        one = {"cfg": trainer.cfg, "cuda": True, "data_parallel_world_size": 1}
        found.append(adam(mock.Mock(**{**one, **changed})))
        return None

    monkeypatch.setattr(ahead, "_adam", asked)
    train(words_of_training["flash_lm"], tmp_path, updates=1)
    assert isinstance(found[0], torch.optim.AdamW)
    assert found[1] is None


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=str)
def test_a_failure_that_does_not_repeat_is_told_and_changes_nothing(
    words_of_training, tmp_path, queued, monkeypatch, precision
):
    """As a device may err, or draw other numbers."""
    clip, norms = Trainer.clip_grad_norm.__wrapped__, []

    def once(self, *args):
        norm = clip(self, *args)
        norms.append((self.get_num_updates(), float(norm)))
        return norm * float("nan") if len(norms) == 2 else norm

    monkeypatch.setattr(Trainer, "clip_grad_norm", ahead._heal_norm(once))
    with pytest.raises(FloatingPointError, match=r"^update 2: gradients are Nan/Inf, and were finite when"):
        train(words_of_training["flash_lm"], tmp_path, *precision)
    assert [number for number, _ in norms] == [0, 1, 2, 1]
    assert norms[3] == norms[1]


def test_an_update_is_forgotten_where_another_training_is_loaded(words_of_training, tmp_path, queued):
    train(words_of_training["flash_lm"], tmp_path, updates=2)
    trainer = mock.Mock()
    ahead._courses[trainer] = course = ahead._Course()
    course.open = "an update"
    ahead._forget_first(lambda *_: None)(trainer, "checkpoint")
    assert trainer not in ahead._courses
