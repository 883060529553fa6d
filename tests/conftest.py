"""Data and models that many tests share, made once for each process that runs tests."""

import os

import pytest

from support import tools
from support.robustness import TABLE, Tally


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder with train, valid and test: real text, one sentence a line."""
    folder = tmp_path_factory.mktemp("text")
    tools.write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def data_bin(text_folder):
    """What fairseq-preprocess makes of the real text: about 200 words."""
    tools.call("preprocess", *tools.preprocess_arguments(text_folder, ["train", "valid", "test"]))
    return text_folder / "bin"


@pytest.fixture(scope="session")
def checkpoint(data_bin, tmp_path_factory):
    """A tiny flash_lm after a few updates."""
    folder = tmp_path_factory.mktemp("trained")
    tools.train(data_bin, folder, updates=4)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def second_checkpoint(data_bin, tmp_path_factory):
    """As ``checkpoint``, from another seed."""
    folder = tmp_path_factory.mktemp("trained_again")
    tools.train(data_bin, folder, "--seed", "2", updates=4)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def robustness():
    """Counts attacks; with FAIRSEQ_FLASH_ROBUSTNESS set, writes the counts to the table in docs/."""
    tally = Tally()
    yield tally
    if os.environ.get("FAIRSEQ_FLASH_ROBUSTNESS"):
        TABLE.write_text(tally.fill(TABLE.read_text()))
