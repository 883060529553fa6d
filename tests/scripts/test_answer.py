"""Proves that the answer tells who is better, by how much, what that is worth, and on what."""

import math

import pytest

from report.answer import Measure, answer, interval

RATES = {"flash_lm": "4e-3", "transformer_lm": "2e-3"}


def records(losses, n=512):
    return [
        {"name": name, "n": str(n), "seed": str(seed), "lr": RATES.get(name), "valid_loss": str(loss)}
        for name, found in losses.items()
        for seed, loss in enumerate(found, start=1)
    ]


def rates(name, losses):
    return [
        {"name": name, "lr": lr, "status": "ok", "valid_loss": str(loss)}
        for lr, loss in zip(("1e-3", "2e-3", "4e-3"), losses, strict=True)
    ]


def test_it_compares_flash_with_both_transformers():
    losses = {"transformer_pp_lm": [4.4], "flash_lm": [4.5], "transformer_lm": [4.8], "flash_quad_lm": [9.0]}
    assert answer(records(losses), [], "the whole split valid") == (
        "In rows of 512 tokens flash_lm is better than transformer_lm by 0.300 nats a token (perplexity "
        "25.9 % lower; one seed, which proves nothing) and worse than transformer_pp_lm by 0.100 nats a "
        "token (perplexity 10.5 % higher; one seed, which proves nothing); all this on the whole split valid."
    )


@pytest.mark.parametrize(
    ("own", "worth"),
    [
        ([4.5, 4.49, 4.51], "proven by 3 seeds, 95 % interval +0.263 to +0.337"),
        ([4.5, 4.2, 4.9], "not proven by 3 seeds, 95 % interval -0.618 to +1.152"),
    ],
)
def test_seeds_prove_what_their_interval_says(own, worth):
    """Of differences with the same seed, so that what seeds share is no doubt."""
    other = [loss + 0.3 + step for loss, step in zip((4.5, 4.5, 4.5), (0, 0.005, -0.005), strict=True)]
    said = answer(records({"transformer_lm": other, "flash_lm": own}), [], "it")
    assert worth in said


def test_the_interval_is_students():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert high - 2.0 == pytest.approx(4.303 / math.sqrt(3))


def test_a_best_rate_at_the_edge_is_said_of_whom_the_answer_is_about():
    tried = rates("flash_lm", (5, 4, 3)) + rates("transformer_lm", (5, 4, 4.5)) + rates("my_lm", (1, 2, 3))
    said = answer(records({"flash_lm": [4.5], "transformer_lm": [4.8]}), tried, "it")
    assert said.endswith(
        "the best rate of flash_lm, 4e-3, is at the edge of what was tried: another may be better."
    )
    assert "rate of transformer_lm" not in said
    assert "my_lm" not in said


def test_what_is_missing_is_said():
    assert answer([], [], "it") == "No run succeeded, so nothing can be said."
    alone = answer(records({"flash_lm": [4.5]}), [], "it")
    assert (
        alone
        == "In rows of 512 tokens flash_lm has a loss of 4.500 and nobody to compare it with; all this on it."
    )
    found = records({"flash_lm": [4.5], "transformer_lm": [4.8]}) + records({"transformer_lm": [4.8]}, 1024)
    assert "in rows of 1024 tokens flash_lm has no finished run" in answer(found, [], "it")
    others = answer(records({"my_lm": [4.5], "your_lm": [4.8]}), [], "it")
    assert "my_lm is better than your_lm by 0.300" in others


def test_more_can_be_better_and_rows_need_no_length():
    bleu = Measure("bleu", "BLEU", "BLEU", 2, higher=True)
    scores = {"transformer": [30.0, 31.0], "flash_seq2seq_tiny": [32.0, 32.5]}
    found = [
        {"name": name, "seed": str(seed), "lr": "1e-3", "valid_loss": "3", "bleu": str(score)}
        for name, own in scores.items()
        for seed, score in enumerate(own)
    ]
    assert answer(found, [], "the whole split test", bleu) == (
        "flash_seq2seq_tiny is better than transformer by 1.75 BLEU (not proven by 2 seeds, 95 % interval "
        "-1.43 to +4.93); all this on the whole split test."
    )
    assert "flash_seq2seq_tiny has a BLEU of 32.25 and nobody" in answer(found[2:], [], "it", bleu)


def test_each_system_has_its_own_edges():
    tried = rates("flash_lm", (5, 4, 3)) + rates("transformer_lm", (5, 4, 4.5))
    tried.append({"name": "transformer_lm", "lr": "8e-3", "status": "ok", "valid_loss": "6"})
    said = answer(records({"flash_lm": [4.5], "transformer_lm": [4.8]}), tried, "it")
    assert "the best rate of flash_lm, 4e-3, is at the edge" in said
