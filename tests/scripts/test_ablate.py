"""Proves that the ablation plans from what it measured, and that its model changes what its options say."""

import csv
import importlib.util
import sys

import pytest
import torch

import ablate
from fairseq_flash.ops import shifted
from runs import ablation as plans
from runs.provenance import data_name
from support import tools

spec = importlib.util.spec_from_file_location(
    "ablation_plugin", tools.REPOSITORY / "scripts" / "ablation" / "__init__.py"
)
ablation = importlib.util.module_from_spec(spec)
sys.modules["ablation_plugin"] = ablation
spec.loader.exec_module(ablation)

SMALL = ("--arch", "flash_ablation_lm", "--embed-dim", "32", "--layers", "1", "--attention-dim", "16")


@pytest.fixture
def plan(tmp_path):
    """A plan on a file of results, in which 2e-3 is the best rate of every system."""
    (tmp_path / "dict.txt").touch()
    path = tmp_path / "ablation.csv"
    for name in plans.SYSTEMS:
        rates = plans.LOW_RATES if name == "transformer_lm" else plans.RATES
        for rate in rates:
            loss = 5 + abs(rate - (2.5e-4 if name == "transformer_lm" else 2e-3))
            write(path, name=name, stage="learning rate", lr=rate, seed=1, valid_loss=loss)
    options = ("--data", str(tmp_path), "--output", str(path), "--device", "cpu", "--tokens", "40960")
    return plans.Plan(ablate.parse(list(options)))


def write(path, **row):
    new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, ablate.COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({"status": "ok", "data": data_name(path.parent), **row})


def test_a_factor_is_measured_at_the_best_rate_of_its_system_with_one_choice_changed(plan):
    plan.options.bases = ["flash_lm_paper"]
    runs = list(plan.factors())
    base = runs[0].words
    assert {run.record["lr"] for run in runs} == {2e-3}
    assert (runs[0].record["factor"], runs[0].updates) == ("", 10)
    no_positions = next(run for run in runs if run.record["value"] == "none")
    assert [word for word in base if word not in no_positions.words] == ["--scaled-sin"]
    assert len({run.folder_name for run in runs}) == len(runs)
    assert all(str(plan.options.data) == run.words[0] and "--cpu" in run.words for run in runs)


def test_a_rate_that_diverged_is_never_the_best(plan):
    write(plan.options.output, name="flash_lm", stage="learning rate", lr=1, seed=1, valid_loss="nan")
    write(
        plan.options.output,
        name="flash_lm",
        stage="learning rate",
        lr=2,
        seed=1,
        valid_loss=1,
        status="error",
    )
    assert plan.best_rate("flash_lm") == 2e-3


def test_a_missing_rate_is_named(plan):
    plan.options.output.unlink()
    write(plan.options.output, name="flash_lm", stage="winner", lr=1, seed=1, valid_loss=1)
    with pytest.raises(ValueError, match="has no learning rate of flash_lm; run that stage first"):
        plan.best_rate("flash_lm")


def test_more_seeds_go_to_values_near_the_best_alone(plan):
    plan.options.bases = ["transformer_pp_lm"]
    losses = {("", ""): 5.2, ("norm", "rmsnorm"): 5.21, ("start", "paper"): 5.5, ("start", "out 0.02"): 5.15}
    for (factor, value), loss in losses.items():
        row = dict(stage="factor", base="transformer_pp_lm", factor=factor, value=value, seed=1)
        write(plan.options.output, name="transformer_pp_lm", valid_loss=loss, **row)
    again = {(run.record["factor"], run.record["value"], run.record["seed"]) for run in plan.close_seeds()}
    assert again == {(*key, seed) for key in (("", ""), ("norm", "rmsnorm")) for seed in (2, 3)}


def test_the_table_shows_the_difference_from_the_base_over_the_same_seeds(plan, capsys):
    for value, seed, loss in (("", 1, 5.0), ("", 2, 5.2), ("rmsnorm", 2, 5.1)):
        row = dict(stage="factor", base="flash_lm", factor=value and "norm", value=value, seed=seed)
        write(plan.options.output, name="flash_lm", valid_loss=loss, **row)
    ablate.main(["--data", str(plan.options.data), "--output", str(plan.options.output), "--table"])
    printed = capsys.readouterr().out
    assert "| norm | rmsnorm | 5.100 | -0.100 |" in printed
    assert "| | | 5.000, 5.200 | |" in printed


@pytest.fixture(scope="module")
def build():
    """Builds the ablation model from its options, always from the same seed."""
    health = tools.load_script("health")

    def make(*words):
        torch.manual_seed(1)
        return health.build([*SMALL, *words], 300).decoder.stack

    return make


@pytest.mark.parametrize(
    ("words", "weight", "std"),
    [
        (("--embed-std", "0.5"), lambda stack: stack.embed_tokens.weight[4:], 0.5),
        (("--dense-std", "0.9"), lambda stack: stack.blocks[0].uvz.weight, 0.9),
        (("--out-std", "0.9"), lambda stack: stack.blocks[0].out.weight, 0.9),
        (("--gamma-quad", "3"), lambda stack: stack.blocks[0].offset_scale.gamma[:2], 3),
        (("--gamma-lin", "3"), lambda stack: stack.blocks[0].offset_scale.gamma[2:], 3),
        (
            ("--relative-bias", "toeplitz", "--bias-std", "2"),
            lambda stack: stack.blocks[0].bias.table,
            2,
        ),
    ],
)
def test_a_start_is_what_the_option_says_and_the_default_is_not(build, words, weight, std):
    assert weight(build(*words)).std().item() == pytest.approx(std, rel=0.35)
    assert weight(build(*words[:-2])).std().item() < std / 2


@pytest.mark.parametrize("kind", ["toeplitz", "rotary"])
def test_both_biases_start_as_the_same_hill(build, kind):
    bias = build("--relative-bias", kind, "--bias-height", "0.5", "--attention-dim", "128").blocks[0].bias
    expected = build("--bias-height", "0.5", "--attention-dim", "128").blocks[0].bias.matrix(40)
    assert bias.matrix(40)[0, 0].item() == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(bias.matrix(40), expected, atol=1e-6)


@pytest.mark.parametrize("shift", [(), ("--shift-keys",)])
def test_scores_and_positions_change_where_the_options_say(build, shift):
    tokens, size = torch.randint(4, 300, (1, 24)), ("--chunk-size", "8", *shift)
    plain, turned = build(*size), build(*size, "--plain-linear")
    z = torch.randn(1, 24, 16)
    seen = []
    for stack in (plain, turned, build(*size, "--score-scale", "0.5")):
        block = stack.blocks[0]
        hook = block.register_forward_hook(
            lambda block, args, kwargs, out: seen.append(block.copies(z, kwargs["rows"])), with_kwargs=True
        )
        stack(tokens)
        hook.remove()
    usual, unrotated, scaled = seen
    assert torch.equal(usual[:2], unrotated[:2])
    keys = shifted(z) if shift else None
    assert torch.equal(unrotated[2:], turned.blocks[0].offset_scale(z, keys)[2:])
    assert not torch.allclose(usual[2:], unrotated[2:])
    assert torch.allclose(scaled[0], 0.5 * usual[0])
    assert torch.equal(scaled[1:], usual[1:])
