"""Proves that the losses which fairseq logs are those of a token, and of nothing else."""

import json

import pytest

from support import tools

SMOOTHED = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
RDROP = ("--criterion", "label_smoothed_cross_entropy_with_rdrop", "--label-smoothing", "0.1")
FAIRSEQ = (
    *("--arch", "transformer_lm", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "32"),
    *("--decoder-layers", "1", "--decoder-attention-heads", "2"),
)


def logged(words, folder, *more):
    """The last line of training and of validation, after one update without dropout."""
    limits = ("--save-dir", folder, "--max-update", 1, "--report-accuracy", "--dropout", 0)
    output = tools.call("train", *words, *more, *limits)
    found = [json.loads(line[line.index("{") :]) for line in output.splitlines() if '_updates": "1"' in line]
    train, valid = (next(line for line in found if name in line) for name in ("loss", "valid_loss"))
    names = ("loss", "nll_loss", "ppl", "accuracy")
    told = [float(train[name]) for name in names] + [float(valid[f"valid_{name}"]) for name in names]
    return told, float(train["gnorm"])


@pytest.mark.parametrize("model", ["flash_lm", "flash_seq2seq", "transformer_lm"])
def test_two_passes_without_dropout_are_logged_as_one(words_of_training, tmp_path, model):
    words = words_of_training.get(model, (*words_of_training["flash_lm"][:-10], *FAIRSEQ))
    one, norm = logged(words, tmp_path / "one", *SMOOTHED)
    two, doubled = logged(words, tmp_path / "two", *RDROP, "--rdrop-alpha", "3")
    # The first update is clipped, and Adam feels no factor: the same weights, but for rounding.
    assert two == pytest.approx(one, rel=3e-3)
    assert doubled == pytest.approx(2 * norm, rel=3e-3), "the gradient is that of the sum, as ever"


def test_two_passes_are_refused_where_they_cannot_be(words_of_training, tmp_path):
    words = (*words_of_training["flash_lm"], "--save-dir", tmp_path, *RDROP, "--rdrop-alpha", "3")
    with pytest.raises(ValueError, match=r"--rdrop-alpha 3.* is not allowed with --ignore-prefix-size 2"):
        tools.call("train", *words, "--ignore-prefix-size", 2)
    with pytest.raises(ValueError, match=r"--rdrop-alpha 3.* is not allowed with --carry-state"):
        tools.call("train", *words, "--task", "flash_language_modeling", "--carry-state")
