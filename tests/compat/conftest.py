"""Training of all three models, for what must hold for each."""

import pytest

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
