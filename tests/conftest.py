"""Data and models that many tests share, made once for each process that runs tests."""

import os
import signal

import pytest

from support import tools
from support.robustness import TABLE, Tally

SIZES = ("--embed-dim", "32", "--attention-dim", "16", "--chunk-size", "8")
MASKED = (
    *("--arch", "flash_masked_lm_tiny", "--task", "masked_lm", "--criterion", "masked_lm"),
    *("--tokens-per-sample", "32", "--layers", "2", *SIZES),
)
TRANSLATION = (
    *("--arch", "flash_seq2seq_tiny", "--task", "translation", "--source-lang", "here"),
    *("--target-lang", "there", "--criterion", "label_smoothed_cross_entropy"),
    *("--encoder-layers", "2", "--decoder-layers", "2", *SIZES),
)

# A shell that starts the tests in the background has Ctrl-C ignored, by their children too, which are to end.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
def parallel(tmp_path_factory):
    """What fairseq-preprocess makes of lines, and of the same backwards."""
    folder = tmp_path_factory.mktemp("parallel")
    lines = tools.real_lines()
    words = []
    for name, split in {"train": lines[:200], "valid": lines[200:212], "test": lines[212:224]}.items():
        (folder / f"{name}.here").write_text("".join(f"{line}\n" for line in split))
        (folder / f"{name}.there").write_text("".join(" ".join(line.split()[::-1]) + "\n" for line in split))
        words += [f"--{name}pref", folder / name]
    languages = ("--source-lang", "here", "--target-lang", "there", "--joined-dictionary")
    limits = ("--nwordssrc", "200", "--workers", "1", "--destdir", folder / "bin")
    tools.call("preprocess", *languages, *words, *limits)
    return folder / "bin"


@pytest.fixture(scope="session")
def words_of_training(data_bin, parallel):
    """By model: the arguments of fairseq-train but for ``--save-dir`` and ``--max-update``."""
    plug_in = ("--user-dir", tools.USER_DIR, *tools.ADAM)
    return {
        "flash_lm": (data_bin, *plug_in, *tools.RECIPE, *tools.TINY, *tools.CHUNKS),
        "flash_masked_lm": (data_bin, *plug_in, *tools.QUICK, *MASKED),
        "flash_seq2seq": (parallel, *plug_in, *tools.QUICK, *TRANSLATION),
    }


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
