"""Proves that no door lets a hostile checkpoint in: it runs no code, takes no gigabytes, and is named."""

import contextlib
import importlib
import shutil
import sys

import pytest

from fairseq_flash.models.flash_lm import FlashLanguageModel
from fairseq_flash.models.flash_masked_lm import FlashMaskedLM
from fairseq_flash.models.flash_seq2seq import FlashSeq2Seq
from support import hostile, tools

LANGUAGES = ("--source-lang", "here", "--target-lang", "there")
TOOL = ("--user-dir", tools.USER_DIR, "--cpu", "--num-workers", "0", "--batch-size", "2")
LM = ("--task", "language_modeling")


@pytest.fixture(scope="module")
def doors(words_of_training, data_bin, parallel, tmp_path_factory):
    """By name: what opens a checkpoint, and the model that the checkpoint is of."""

    def train(option, model):
        def door(path):
            folder = tmp_path_factory.mktemp("save")
            words = (*words_of_training[model], "--save-dir", folder, "--max-update", 9)
            tools.call("train", *words, option, path)

        return door

    def tool(name, data, *arguments):
        def door(path):
            if name == "interactive":
                arguments_here = (*arguments, "--input", data_bin.parent / "test")
            else:
                arguments_here = arguments
            tools.call(name, data, *TOOL, "--path", path, *arguments_here)

        return door

    def hub(cls, data, **options):
        return lambda path: cls.from_pretrained(str(path.parent), path.name, str(data), **options)

    def load_state(path):
        main = importlib.import_module("fairseq_flash.generation.command").main
        words = [
            str(trained_lm(path)),
            "--data",
            str(data_bin),
            "--load-state",
            str(path),
            "--prompt",
            "",
            "--cpu",
        ]
        with contextlib.redirect_stderr(sys.stdout):
            status = main(words)
        if status:
            raise ValueError(f"{path.name}: status {status}")

    def trained_lm(path):
        return path.parent / "good_lm.pt"

    return {
        "train, resume": (train("--restore-file", "flash_lm"), "flash_lm"),
        "train, fine-tune": (train("--finetune-from-model", "flash_lm"), "flash_lm"),
        "train seq2seq": (train("--restore-file", "flash_seq2seq"), "flash_seq2seq"),
        "train masked": (train("--restore-file", "flash_masked_lm"), "flash_masked_lm"),
        "eval-lm": (tool("eval-lm", data_bin, *LM, "--gen-subset", "valid"), "flash_lm"),
        "generate": (tool("generate", parallel, *LANGUAGES, "--gen-subset", "test"), "flash_seq2seq"),
        "interactive": (tool("interactive", parallel, *LANGUAGES, "--buffer-size", "2"), "flash_seq2seq"),
        "validate": (tool("validate", data_bin, *LM, "--valid-subset", "valid"), "flash_lm"),
        "hub lm": (hub(FlashLanguageModel, data_bin), "flash_lm"),
        "hub masked": (hub(FlashMaskedLM, data_bin, bpe=None), "flash_masked_lm"),
        "hub seq2seq": (hub(FlashSeq2Seq, parallel), "flash_seq2seq"),
        "load-state": (load_state, "flash_lm"),
    }


DOORS = (
    *("train, resume", "train, fine-tune", "train seq2seq", "train masked", "eval-lm", "generate"),
    *("interactive", "validate", "hub lm", "hub masked", "hub seq2seq", "load-state"),
)


@pytest.mark.long
@pytest.mark.parametrize("name", DOORS)
def test_no_door_lets_a_hostile_file_in(doors, trained, tmp_path, name):
    door, model = doors[name]
    shutil.copy(trained[model], tmp_path / "good_lm.pt")
    marker = tmp_path / "ran"
    files = {
        **hostile.malformed(trained[model], tmp_path),
        **hostile.damaged(trained[model], tmp_path),
        **hostile.hungry(trained[model], tmp_path),
        **hostile.coded(trained[model], tmp_path, marker),
    }
    if name != "load-state":
        door(trained[model])
    wrong = {}
    for kind, path in files.items():
        try:
            with hostile.little_memory():
                door(path)
            wrong[kind] = "let in"
        except Exception as error:
            said = str(error)
            if path.name not in said or "weights_only" in said or len(said) > 700:
                wrong[kind] = repr(error)
    assert wrong == {}
    assert not marker.exists()
