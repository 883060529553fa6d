"""Proves the main job: flash_lm_tiny learns real text within 90 updates, by fairseq's commands."""

import math

import numpy
import pytest
from fairseq.data import Dictionary, data_utils

from support import tools

UPDATE = ("--tokens-per-sample", "512", "--max-tokens", "2048", "--num-workers", "0", "--seed", "1")
RECIPE = (
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0", "--lr", "4e-3"),
    *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20", "--share-decoder-input-output-embed"),
    *("--no-epoch-checkpoints", "--log-format", "json", "--cpu"),
)


def unigram_perplexity(data, dictionary):
    """Of the validation split, by the frequencies of the training split, each counted once more."""
    counts = []
    for split in ("train", "valid"):
        lines = data_utils.load_indexed_dataset(str(data / split), dictionary)
        tokens = numpy.concatenate([lines[index].numpy() for index in range(len(lines))])
        counts.append(numpy.bincount(tokens, minlength=len(dictionary)))
    train, valid = counts[0] + 1, counts[1]
    return math.exp(-(valid * numpy.log(train / train.sum())).sum() / valid.sum())


@pytest.mark.long
def test_ninety_updates_more_than_halve_the_unigram_perplexity(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(tools.real_lines()), encoding="utf-8")
    prepare = tools.REPOSITORY / "scripts" / "prepare_lm.py"
    words = ("--text", tmp_path / "text.txt", "--output", tmp_path / "bin", "--vocab-size", "2000")
    prepared = tools.run("python", prepare, *words)
    assert prepared.returncode == 0, prepared.stdout
    data, save_dir = tmp_path / "bin", tmp_path / "checkpoints"
    common = (data, "--user-dir", tools.USER_DIR, "--task", "language_modeling", *UPDATE)
    perplexities = []
    for updates in ("45", "90"):  # the second goes on from the first
        words = (*common, "--arch", "flash_lm_tiny", *RECIPE, "--save-dir", save_dir, "--max-update", updates)
        trained = tools.run("fairseq-train", *words)
        assert trained.returncode == 0, trained.stdout
        evaluated = tools.run(
            "fairseq-eval-lm", *common, "--path", save_dir / "checkpoint_last.pt", "--gen-subset", "valid"
        )
        perplexities.append(tools.perplexity(evaluated.stdout))
    assert perplexities[1] < perplexities[0]
    assert perplexities[1] < unigram_perplexity(data, Dictionary.load(str(data / "dict.txt"))) / 2
