"""Proves that compared systems have the parameters of fairseq's Transformer, and that others are refused."""

import pytest

from runs import systems
from support import tools


@pytest.fixture(scope="module")
def health():
    return tools.load_script("health")


@pytest.mark.parametrize("size", ["tiny", pytest.param("base", marks=pytest.mark.long)])
def test_all_systems_have_the_parameters_of_the_baseline(health, size):
    counts = {}
    for system in systems.systems_of(size):
        model = health.build(systems.architecture(system, size), 8000)
        counts[system] = sum(parameter.numel() for parameter in model.parameters())
    assert {systems.BASELINE, "flash_lm", "flash_quad_lm", "transformer_pp_lm"} < set(counts)
    for system, count in counts.items():
        assert count == pytest.approx(counts[systems.BASELINE], rel=0.05), system


@pytest.mark.parametrize(
    ("names", "size", "message"),
    [
        (
            ["flash_lm", "lstm_lm"],
            "tiny",
            "--systems lstm_lm is unknown in --size tiny; allowed: flash2_lm, flash_global_lm",
        ),
        (["flash_lm_tiny"], "tiny", "--systems flash_lm_tiny is unknown"),
        (["flash_lm"], "huge", "--size huge is unknown; allowed: tiny, base, gpt, big"),
        (["flash_lm", "flash_lm"], "base", "--systems names flash_lm twice"),
    ],
)
def test_others_are_refused(names, size, message):
    with pytest.raises(ValueError, match=message):
        systems.check_systems(names, size)
