"""Proves that a killed training goes on to the bit, wherever it is killed while it saves or ends."""

import random
import re
import shutil
import signal

import pytest
import torch

from support import tools

KILLS = 20
KILLS_IN_A_ROW = 15
PROGRAM = tools.REPOSITORY / "tests" / "support" / "killed.py"


def train_until(moment, words, folder, processes=1):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    program = (PROGRAM,) if processes == 1 else (*torchrun, PROGRAM)
    return tools.run("python", *program, moment, folder, *words, PYTHONPATH=str(tools.REPOSITORY))


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        for value, counterpart in zip(one, other, strict=True):
            assert_same(value, counterpart)
    else:
        assert one == other


@pytest.mark.long
def test_a_killed_training_goes_on_as_if_it_had_not_been(words_of_training, tmp_path, robustness):
    saving = ("--save-interval-updates", 2, "--keep-interval-updates", 1, "--dropout", "0.1")
    words = (*words_of_training["flash_lm"], *saving, "--max-update", 8)
    whole = train_until(0, words, tmp_path / "straight")
    assert whole.returncode == 0, whole.stdout
    moments = int(re.search(r"moments: (\d+)", whole.stdout)[1])
    assert moments >= 2 * KILLS
    straight = torch.load(tmp_path / "straight" / "checkpoint_last.pt")
    files = sorted(path.name for path in (tmp_path / "straight").iterdir())
    # Spread over all moments, the last ones among them.
    for number in range(KILLS):
        moment, folder = moments - number * (moments - 1) // (KILLS - 1), tmp_path / "killed"
        with robustness.attempt("kills while saving and at the end"):
            killed = train_until(moment, words, folder)
            assert killed.returncode == -signal.SIGKILL, (moment, killed.stdout)
            again = tools.call("train", *words, "--save-dir", folder)
            found = torch.load(folder / "checkpoint_last.pt")
            for part in ("model", "last_optimizer_state"):
                assert_same(found[part], straight[part])
            # What is before the last entry says where the training was interrupted.
            assert_same(found["optimizer_history"][-1], straight["optimizer_history"][-1])
            for part in ("train_iterator", "val_loss", "best"):
                assert_same(found["extra_state"][part], straight["extra_state"][part])
            assert sorted(path.name for path in folder.iterdir()) == files, (moment, again)
            assert (number > 0) or "training is complete" in again
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_killed_again_and_again_goes_on(words_of_training, tmp_path, robustness, processes):
    """One training, killed at random moments of its updates and of its saving, that of two in the first."""
    saving = ("--save-interval-updates", 1, "--keep-interval-updates", 1, "--disable-validation")
    words = (*words_of_training["flash_lm"], *saving, "--dropout", "0.1", "--max-update", 60)
    whole = train_until(0, words, tmp_path / "straight", processes)
    assert whole.returncode == 0, whole.stdout
    straight, drawn = torch.load(tmp_path / "straight" / "checkpoint_last.pt"), random.Random(processes)
    for _ in range(KILLS_IN_A_ROW):
        with robustness.attempt("kills again and again, of one process and of two"):
            killed = train_until(drawn.randint(1, 30), words, tmp_path / "killed", processes)
            assert killed.returncode != 0, killed.stdout
    again = train_until(0, words, tmp_path / "killed", processes)
    assert again.returncode == 0, again.stdout
    found = torch.load(tmp_path / "killed" / "checkpoint_last.pt")
    for part in ("model", "last_optimizer_state"):
        assert_same(found[part], straight[part])
    assert_same(found["optimizer_history"][-1], straight["optimizer_history"][-1])
