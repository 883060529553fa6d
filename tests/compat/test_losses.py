"""Proves that the losses which fairseq logs are those of a token, and what R-Drop adds to them."""

import json

import pytest
import torch
from fairseq import tasks

from support import contract, tools

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


@pytest.mark.parametrize("trains", [True, False])
def test_the_divergence_of_dropout_is_in_the_loss_and_each_row_is_evaluated_once(tmp_path, trains):
    contract.write_dictionary(tmp_path / "dict.txt")
    sizes = ("--embed-dim", 16, "--layers", 1, "--attention-dim", 8, "--chunk-size", 4, "--dropout", 0.4)
    words = ("--arch", "flash_lm", *sizes, *RDROP, "--rdrop-alpha", 3)
    cfg = contract.configure(tmp_path, "language_modeling", *words)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    contract.make_telling(model).train(trains)
    source, target = contract.draw(3, 7), contract.draw(3, 7, seed=1)
    source[0, 5:] = target[0, 5:] = 1
    copies, read = 2 if trains else 1, []
    torch.manual_seed(1)
    logs = model(source.repeat(copies, 1))[0].log_softmax(-1)
    first, second = logs[:3], logs[-3:]
    real = target != 1
    divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1)[real].sum().item() / 2
    nll, smoothed = 0, 0
    for one in (first, second):
        right = -one.gather(-1, target[..., None])[..., 0][real].sum().item() / 2
        share = 0.1 / (one.shape[-1] - 1)
        nll, smoothed = nll + right, smoothed + (0.9 - share) * right - share * one[real].sum().item() / 2
    sample = {"net_input": {"src_tokens": source}, "target": target, "ntokens": 19}
    model.register_forward_pre_hook(
        lambda _, given, named: read.append(len(named["src_tokens"])), with_kwargs=True
    )
    torch.manual_seed(1)
    loss, size, log = criterion(model, sample)
    assert (read, size) == ([3 * copies], 19)
    assert log["nll_loss"].item() == pytest.approx(nll, rel=1e-9)
    assert log["loss"].item() == pytest.approx(smoothed + 3 * divergence / 2, rel=1e-9)
    assert loss.item() == pytest.approx(copies * log["loss"].item(), rel=1e-12), "what is trained is the sum"
    if trains:
        assert divergence > 0.1
        assert log["rdrop_kl_loss"] == pytest.approx(divergence, rel=1e-9)
    else:
        assert "rdrop_kl_loss" not in log


def test_two_passes_are_refused_where_they_cannot_be(words_of_training, tmp_path):
    words = (*words_of_training["flash_lm"], "--save-dir", tmp_path, *RDROP, "--rdrop-alpha", "3")
    with pytest.raises(ValueError, match=r"--rdrop-alpha 3.* is not allowed with --ignore-prefix-size 2"):
        tools.call("train", *words, "--ignore-prefix-size", 2)
    with pytest.raises(ValueError, match=r"--rdrop-alpha 3.* is not allowed with --carry-state"):
        tools.call("train", *words, "--task", "flash_language_modeling", "--carry-state")
