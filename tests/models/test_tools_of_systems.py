"""Proves that fairseq's tools, prompts read at once, and saved states work with every system of the paper.

What does not depend on the system is proven for flash_lm in test_tools.py and test_generate.py;
transformer_plus_lm differs from transformer_pp_lm in its feed-forward network alone.
"""

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_flash.modules import RowMemory
from support import tools

TRANSFORMER = ("--ffn-embed-dim", "48")
SYSTEMS = {
    "flash_quad_lm": (),
    "flash_local_lm": tools.CHUNKS,
    "flash_global_lm": tools.CHUNKS,
    "transformer_pp_lm": TRANSFORMER,
    "mc_transformer_pp_lm": (*TRANSFORMER, *tools.CHUNKS),
}
LOADED = ("--user-dir", tools.USER_DIR, "--cpu", "--num-workers", "0", "--gen-subset", "test")
PRINTED = 1e-4  # four digits of a loss or a score, whose sums are ordered differently


def train(data_bin, folder, system, updates, *arguments):
    words = ("--arch", f"{system}_tiny", *tools.SMALL, *SYSTEMS[system], *arguments)
    return tools.train(data_bin, folder, *words, updates=updates)


def weights(folder):
    """Of the last checkpoint."""
    return checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))["model"]


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    return request.param


@pytest.fixture(scope="module")
def folder(system, data_bin, tmp_path_factory):
    """Holds a checkpoint after a few updates, and one with noise on it, which writes more than one word."""
    folder = tmp_path_factory.mktemp(system)
    train(data_bin, folder, system, 3)
    return tools.perturbed(folder / "checkpoint_last.pt", 1).parent


def test_a_resumed_training_is_the_same_to_the_bit(system, data_bin, tmp_path):
    straight = train(data_bin, tmp_path / "a", system, 5)
    train(data_bin, tmp_path / "b", system, 3)
    resumed = train(data_bin, tmp_path / "b", system, 5)
    assert tools.losses(resumed) == tools.losses(straight)[3:]
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_trains_in_bfloat16_and_recomputes_its_layers(system, data_bin, tmp_path):
    options = ("--bf16", "--checkpoint-activations", "--dropout", "0.1")
    losses = tools.losses(train(data_bin, tmp_path, system, 4, *options))
    assert len(losses) == 4
    assert all(0 < float(loss) < 20 for _, loss in losses)


def test_eval_lm_is_the_same_in_any_batch(data_bin, folder):
    base = ("eval-lm", data_bin, *LOADED, "--path", folder / "perturbed_1.pt", "--sample-break-mode", "eos")
    base += ("--tokens-per-sample", "32", "--max-tokens", "4096")
    one, many = (tools.perplexity(tools.call(*base, "--batch-size", rows)) for rows in ("1", "7"))
    assert one == pytest.approx(many, rel=PRINTED)
    assert one > 1


def test_a_prompt_read_at_once_gives_the_text_of_one_read_token_by_token(data_bin, folder):
    base = ("generate", data_bin, *LOADED, "--path", folder / "perturbed_1.pt", "--sample-break-mode", "eos")
    base += ("--beam", "3", "--max-len-b", "40", "--batch-size", "5")
    theirs, ours = (
        tools.rows(tools.call(*base, "--task", task), "H")
        for task in ("language_modeling", "flash_language_modeling")
    )
    assert len(ours) >= 10
    assert ours.keys() == theirs.keys()
    for number, hypotheses in theirs.items():
        for (score, text), (our_score, our_text) in zip(hypotheses, ours[number], strict=True):
            assert our_text == text
            assert float(our_score) == pytest.approx(float(score), abs=PRINTED)


def test_a_saved_state_stands_for_its_prompt(data_bin, folder, tmp_path, capsys):
    generate = tools.load_script("generate")

    def stream(prompt, *arguments):
        words = [folder / "perturbed_1.pt", "--data", data_bin, "--cpu", "--prompt", prompt, *arguments]
        assert generate.main([str(word) for word in words]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    prompt, more = "the value of the object is not a class , and " * 6, "the name of it"
    options = ("--greedy", "--tokens", "20", "--stop", "never")
    whole = stream(prompt + more, *options)
    assert len(set(whole.split())) > 2, "a text of one word would prove little"
    stream(prompt, "--save-state", tmp_path / "state.pt", "--tokens", "0")
    for _ in range(2):  # reading from a file does not use it up
        assert stream(more, "--load-state", tmp_path / "state.pt", *options) == whole


#: Segments end within a chunk, where local attention needs a state too.
CARRY = ("--task", "flash_language_modeling", "--carry-state", "--tokens-per-sample", "20")
GROWING = ("flash_quad_lm", "transformer_pp_lm")


def test_a_book_in_segments_costs_what_one_pass_costs_where_the_state_is_constant(system, data_bin, folder):
    base = ("eval-lm", data_bin, *LOADED, "--path", folder / "perturbed_1.pt", "--batch-size", "1")
    if system in GROWING:
        with pytest.raises(ValueError, match="allowed: models with a state of constant size"):
            tools.call(*base, *CARRY)
        return
    whole = tools.perplexity(tools.call(*base, "--tokens-per-sample", "10000"))
    assert tools.perplexity(tools.call(*base, *CARRY)) == pytest.approx(whole, rel=PRINTED)


def test_a_training_carries_a_constant_state_and_goes_on(system, data_bin, tmp_path, monkeypatch):
    options = (*CARRY, "--batch-size", "1")
    if system in GROWING:
        with pytest.raises(ValueError, match="allowed: models with a state of constant size"):
            train(data_bin, tmp_path, system, 3, *options)
        return
    losses = tools.losses(train(data_bin, tmp_path / "a", system, 3, *options))
    carried = weights(tmp_path / "a")
    resumed = tools.losses(train(data_bin, tmp_path / "a", system, 5, *options))
    assert [update for update, _ in (*losses, *resumed)] == ["1", "2", "3", "4", "5"]
    monkeypatch.setattr(RowMemory, "recall", lambda self, stack, like: stack.empty_state(like))
    blind = tools.losses(train(data_bin, tmp_path / "b", system, 3, *options))
    assert blind[0] == losses[0]
    assert any(not torch.equal(carried[name], weight) for name, weight in weights(tmp_path / "b").items())
