"""Proves that flash_lm passes what fairseq's own tests ask of an architecture: dummy data through every tool.

Sentences of random letters, the defaults of each tool, an epoch: training with validation, evaluation with
and without a window, generation, interactive use, and the options of the task. There a run passes if it ends;
here what it printed is looked at too.
"""

import math
import random
import string

import pytest

from support import tools

LETTERS = string.ascii_lowercase[:16]
SIZES = ("--embed-dim", "64", "--layers", "2", "--attention-dim", "32")
OPTIMIZATION = (
    *("--optimizer", "adam", "--lr", "0.0001", "--max-tokens", "500", "--tokens-per-sample", "500"),
    *("--save-interval", "1", "--max-epoch", "1", "--no-progress-bar", "--distributed-world-size", "1"),
    *("--num-workers", "0", "--ddp-backend", "no_c10d", "--log-format", "json", "--log-interval", "1"),
)


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """A data-bin of 300 train, 100 valid and 40 test sentences of 1 to 50 random letters."""
    source, folder = random.Random(0), tmp_path_factory.mktemp("dummy")
    splits = {
        name: [" ".join(source.choices(LETTERS, k=source.randint(1, 50))) for _ in range(count)]
        for name, count in (("train", 300), ("valid", 100), ("test", 40))
    }
    tools.write_texts(folder, **splits)
    tools.call("preprocess", *tools.preprocess_arguments(folder, list(splits)))
    return folder / "bin"


@pytest.fixture(scope="module", params=["flash_lm", "flash_lm_tiny"])
def trained(request, dummy, tmp_path_factory):
    """What fairseq-train printed, and its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    output = train(dummy, folder, "--arch", request.param)
    return output, folder / "checkpoint_last.pt"


def train(dummy, folder, *arguments) -> str:
    plug_in = ("--user-dir", tools.USER_DIR, "--task", "language_modeling", "--cpu")
    return tools.call("train", dummy, *plug_in, *SIZES, *OPTIMIZATION, "--save-dir", folder, *arguments)


def use(tool, dummy, path, *arguments) -> str:
    plug_in = ("--user-dir", tools.USER_DIR, "--path", path, "--cpu", "--num-workers", "0")
    return tools.call(tool, dummy, *plug_in, "--no-progress-bar", *arguments)


def test_it_trains_an_epoch_and_validates(trained):
    output, path = trained
    losses = [float(loss) for _, loss in tools.losses(output)]
    assert len(losses) > 10
    assert losses[-1] < losses[0] < 1.5 * math.log2(len(LETTERS) + 8)
    assert '"valid_loss"' in output
    assert {"checkpoint1.pt", "checkpoint_best.pt", "checkpoint_last.pt"} <= {
        p.name for p in path.parent.iterdir()
    }


@pytest.mark.parametrize("window", [(), ("--context-window", "25")])
def test_it_evaluates(trained, dummy, window):
    # Random letters: no model does better than their number.
    assert len(LETTERS) - 1 < tools.perplexity(use("eval-lm", dummy, trained[1], *window)) < 60


@pytest.mark.parametrize(
    "options", [(), ("--sampling", "--sampling-topk", "3", "--nbest", "5"), ("--beam", "1")]
)
def test_it_generates(trained, dummy, options):
    arguments = ("--task", "language_modeling", "--sample-break-mode", "eos", "--gen-subset", "test")
    output = use(
        "generate", dummy, trained[1], *arguments, *options, "--max-len-b", "60", "--max-tokens", "500"
    )
    assert "Generate test with beam=" in output
    assert len(tools.rows(output, "H")) > 30


def test_it_answers_interactively(trained, dummy, tmp_path):
    (tmp_path / "input").write_text("a b c\n\nd\n")
    output = use(
        "interactive", dummy, trained[1], "--task", "language_modeling", "--input", tmp_path / "input"
    )
    assert set(tools.rows(output, "H")) == {"0", "1", "2"}


def test_it_validates_on_its_own(trained, dummy):
    arguments = ("--task", "language_modeling", "--valid-subset", "valid", "--max-tokens", "500")
    assert "valid on 'valid' subset | loss" in use("validate", dummy, trained[1], *arguments)


@pytest.mark.parametrize(
    "options",
    [
        ("--valid-subset", "valid,test"),
        ("--sample-break-mode", "complete"),
        ("--sample-break-mode", "eos"),
        ("--add-bos-token",),
        ("--pad-to-fixed-length",),
        ("--shorten-method", "truncate", "--sample-break-mode", "eos"),
        ("--share-decoder-input-output-embed", "--attention", "quadratic"),
        ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    ],
    ids=" ".join,
)
def test_it_trains_with_the_options_of_the_task(dummy, tmp_path, options):
    output = train(dummy, tmp_path, "--arch", "flash_lm_tiny", *options, "--max-update", "4")
    assert len(tools.losses(output)) == 4
    assert (tmp_path / "checkpoint_last.pt").exists()
