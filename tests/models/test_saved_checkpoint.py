"""Proves that a checkpoint written by the first version still loads and still computes the same logits.

The model was trained by fairseq-train on real text. If its files must be written anew (only for a change that
breaks old checkpoints on purpose, and then beside the old ones), from the repository's root:

    PYTHONPATH=tests python -c "import tests.models.test_saved_checkpoint as t; t.write()"

Logits are compared in float64, relative to the largest. Measured: 0 where they were written, 2 epsilon
between the parallel pass and decoding; an order of magnitude is left to other processors.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from fairseq import checkpoint_utils

import fairseq_flash  # noqa: F401  (registers the model: a --user-dir would be kept in the checkpoint)
from support import tools

DATA = Path(__file__).resolve().parents[1] / "data"
CHECKPOINT = DATA / "flash_lm_v1.pt"
LOGITS = DATA / "flash_lm_v1_logits.npz"
TOLERANCE = 100 * torch.finfo(torch.float64).eps
SENTENCE = "the value of an object is the name of its class , if it is not the same as the other"
# Written out, because defaults may change.
OPTIONS = (
    *("--linear-norm", "chunk", "--norm", "layernorm", "--attention", "mixed_chunk"),
    *("--relative-bias", "toeplitz", "--expansion-factor", "2", "--scaled-sin"),
)


def write() -> None:
    """Trains the model and writes its checkpoint, its dictionary and its logits to ``tests/data``."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # Relative paths, because the checkpoint keeps them.
        tools.write_texts(Path("text"))
        tools.call("preprocess", *tools.preprocess_arguments(Path("text"), ["train", "valid"]))
        recipe = (*tools.TINY, *tools.CHUNKS, *tools.RECIPE, *tools.ADAM, *OPTIONS)
        saving = ("--save-dir", "saved", "--no-save-optimizer-state", "--max-update", "100")
        tools.call("train", "text/bin", *recipe, *saving)
        DATA.mkdir(exist_ok=True)
        shutil.copy("saved/checkpoint_last.pt", CHECKPOINT)
        shutil.copy("text/bin/dict.txt", DATA / "dict.txt")
    model, tokens = load(CHECKPOINT)
    with torch.no_grad():
        numpy.savez_compressed(LOGITS, logits=model(tokens)[0].numpy())


def load(path: Path):
    """The model in float64, and the tokens of the sentence."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(DATA)}
    )
    words = [task.source_dictionary.index(word) for word in SENTENCE.split()]
    return models[0].double().eval(), torch.tensor([[task.source_dictionary.eos(), *words]])


def assert_as_written(logits: torch.Tensor):
    expected = torch.from_numpy(numpy.load(LOGITS)["logits"])
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_it_loads_with_the_check_for_code_and_gives_the_logits_it_gave():
    torch.load(CHECKPOINT, weights_only=True)
    model, tokens = load(CHECKPOINT)
    with torch.no_grad():
        assert_as_written(model(tokens)[0])


def test_it_decodes_to_the_logits_it_gave():
    model, tokens = load(CHECKPOINT)
    state = {}
    with torch.no_grad():
        steps = [model(tokens[:, : end + 1], incremental_state=state)[0] for end in range(tokens.shape[1])]
    assert_as_written(torch.cat(steps, dim=1))


def test_it_has_learnt_something():
    model, tokens = load(CHECKPOINT)
    with torch.no_grad():
        scores = torch.log_softmax(model(tokens)[0][0], dim=1)
    loss = -scores[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean()
    assert loss < 0.9 * torch.tensor(float(scores.shape[1])).log()


@pytest.mark.parametrize("option", ["n_ref", "backend", "attention_dropout", "shift_keys"])
def test_an_option_that_a_checkpoint_does_not_know_yet_takes_its_default(tmp_path, option):
    state = torch.load(CHECKPOINT)
    state["cfg"]["model"].pop(option, None)
    torch.save(state, tmp_path / "older.pt")
    model, tokens = load(tmp_path / "older.pt")
    with torch.no_grad():
        assert_as_written(model(tokens)[0])


def test_it_resumes_and_its_loss_goes_down(tmp_path):
    tools.write_texts(tmp_path)
    words = tools.preprocess_arguments(tmp_path, ["train", "valid"])
    tools.call("preprocess", *words[: words.index("--nwordssrc")], "--srcdict", DATA / "dict.txt")
    output = tools.train(
        *(tmp_path / "bin", tmp_path / "saved", *OPTIONS, "--restore-file", CHECKPOINT),
        *("--reset-optimizer", "--reset-dataloader", "--reset-lr-scheduler", "--reset-meters"),
        updates=140,
    )
    losses = [float(loss) for _, loss in tools.losses(output)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_files_are_small_and_hold_no_path():
    assert CHECKPOINT.stat().st_size < 200_000
    assert LOGITS.stat().st_size < 100_000
    state = torch.load(CHECKPOINT)
    strings = [value for part in state["cfg"].values() if isinstance(part, dict) for value in part.values()]
    allowed = {state["cfg"]["common"]["plasma_path"]}
    assert not [
        text for text in strings if isinstance(text, str) and text.startswith("/") and text not in allowed
    ]
