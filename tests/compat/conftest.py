"""Training of all three models, for what must hold for each."""

import pytest
import torch
from fairseq.trainer import Trainer

from fairseq_flash._compat import prepare_host
from support import tools


@pytest.fixture(scope="session", autouse=True)
def _ready_host():
    prepare_host()


@pytest.fixture(scope="session")
def trained(words_of_training, tmp_path_factory):
    """By model: a checkpoint after four updates."""
    checkpoints = {}
    for name, words in words_of_training.items():
        folder = tmp_path_factory.mktemp(name)
        tools.call("train", *words, "--save-dir", folder, "--max-update", 4)
        checkpoints[name] = folder / "checkpoint_last.pt"
    return checkpoints


@pytest.fixture
def poison(monkeypatch):
    """Gives a weight's first row this number before the update with so many updates before it."""

    def begin(updates, part="decoder.stack.blocks.1.uvz", number=float("inf")):
        step = Trainer.train_step

        def poisoned(self, *args, **kwargs):
            if self.get_num_updates() == updates:
                with torch.no_grad():
                    self.get_model().get_submodule(part).weight[0] = number
            return step(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "train_step", poisoned)

    return begin
