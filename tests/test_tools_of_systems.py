"""Proves that fairseq's tools, prompts read at once, and saved states work with every system of the paper.

What does not depend on the system is proven for flash_lm in test_tools.py and test_generate.py.
"""

import pytest
import tools
import torch
from fairseq import checkpoint_utils

TRANSFORMER = ("--ffn-embed-dim", "48")
SYSTEMS = {
    "flash_quad_lm": (),
    "flash_local_lm": tools.CHUNKS,
    "flash_global_lm": tools.CHUNKS,
    "transformer_plus_lm": TRANSFORMER,
    "transformer_pp_lm": TRANSFORMER,
    "mc_transformer_pp_lm": (*TRANSFORMER, *tools.CHUNKS),
}
LOADED = ("--user-dir", tools.USER_DIR, "--cpu", "--num-workers", "0", "--gen-subset", "test")
PRINTED = 1e-4  # four digits of a loss or a score, whose sums are ordered differently


def train(data_bin, folder, system, updates, *arguments):
    words = ("--arch", f"{system}_tiny", *tools.SMALL, *SYSTEMS[system], *arguments)
    return tools.train(data_bin, folder, *words, updates=updates)


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
    weights = [
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / name / "checkpoint_last.pt"))["model"]
        for name in ("a", "b")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


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


def test_a_book_in_segments_costs_what_one_pass_costs_where_the_state_is_constant(system, data_bin, folder):
    base = ("eval-lm", data_bin, *LOADED, "--path", folder / "perturbed_1.pt", "--batch-size", "1")
    carry = ("--task", "flash_language_modeling", "--carry-state", "--tokens-per-sample", "16")
    if system in ("flash_quad_lm", "transformer_plus_lm", "transformer_pp_lm"):
        with pytest.raises(ValueError, match="allowed: models with a state of constant size"):
            tools.call(*base, *carry)
        return
    whole = tools.perplexity(tools.call(*base, "--tokens-per-sample", "10000"))
    assert tools.perplexity(tools.call(*base, *carry)) == pytest.approx(whole, rel=PRINTED)
