"""Training of all three models, for what must hold for each."""

import pytest

from fairseq_flash._compat import prepare_host
from support import tools

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


@pytest.fixture(scope="session", autouse=True)
def _ready_host():
    prepare_host()


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
def trained(words_of_training, tmp_path_factory):
    """By model: a checkpoint after four updates."""
    checkpoints = {}
    for name, words in words_of_training.items():
        folder = tmp_path_factory.mktemp(name)
        tools.call("train", *words, "--save-dir", folder, "--max-update", 4)
        checkpoints[name] = folder / "checkpoint_last.pt"
    return checkpoints
