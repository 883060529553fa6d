"""Proves that what describe.py --plan prints is arithmetic by hand, and near what was measured."""

import re

import pytest

from report import plan
from runs.provenance import ROOT
from runs.table import read
from support import tools

CLUSTER = plan.Cluster()


@pytest.fixture(scope="module")
def cost():
    """Of the model that was measured."""
    return plan.Cost(["--arch", "flash_lm_gpt"], plan.MEASURED_WORDS)


def test_one_gpu_is_as_fast_as_measured_and_two_nearly_twice(cost):
    tokens, rate = plan.measured_rate()
    one, two = (plan.plan_of(cost, 1024, 32_768 * gpus, gpus, rate, CLUSTER) for gpus in (1, 2))
    assert one.tokens_per_s == pytest.approx(tokens, rel=1e-9)
    # Two H100s trained 1.87 times as fast as one, losses equal.
    assert two.tokens_per_s / one.tokens_per_s == pytest.approx(1.87, rel=0.2)
    assert two.ranks == one.ranks == 1


def test_a_cost_is_that_of_the_layers(cost):
    d, units, words, s = 768, 24, 32_000, 128
    e = 2 * d
    # A unit has two dense layers; its norm, offsets and biases are the rest.
    assert cost.parameters == pytest.approx(units * (d * (2 * e + s) + e * d) + words * d, rel=2e-3)
    c = 256
    attention = c * (s + e) + 2 * s * e
    assert cost.multiply_adds == pytest.approx(
        units * (d * (2 * e + s) + e * d + attention) + words * d, rel=0.02
    )
    assert cost.state == 4 * s * e


@pytest.mark.parametrize(
    ("name", "parameters"), [("125M", 125e6), ("350M", 350e6), ("1.3B", 1.3e9), ("7B", 7e9)]
)
def test_sizes_are_what_their_names_say(name, parameters):
    size = plan.SIZES[name]
    words = ["--arch", "flash_lm", "--embed-dim", str(size.embed_dim), "--layers", str(size.units)]
    assert plan.Cost(words, plan.VOCABULARY).parameters == pytest.approx(parameters, rel=0.06)


def test_an_update_is_its_work_its_gradients_and_its_gathers(cost):
    _, rate = plan.measured_rate()
    n, rows, gpus, ranks = 2**17, 3, 16, 8
    seconds = plan.step_seconds(cost, n, rows, gpus, ranks, True, rate, CLUSTER)
    work = CLUSTER.sharing * 8 * cost.multiply_adds * rows * n / ranks / rate
    gradients = 2 * 2 * cost.parameters * 15 / 16 / CLUSTER.outside
    gathers = rows * 24 * 3 * (7 * cost.state / CLUSTER.inside + CLUSTER.latency)
    assert seconds == pytest.approx(work + gradients + gathers, rel=1e-12)


def test_rows_over_one_and_two_gpus_take_what_was_measured():
    _, rate = plan.measured_rate()
    cost = plan.Cost(["--arch", "flash_lm_gpt"], 32_768)
    records = list(read(ROOT / "scripts" / "results" / "sequence_parallel.csv"))
    assert {record["ranks"] for record in records} == {"1", "2"}
    for record in records:
        n, ranks = int(record["n"]), int(record["ranks"])
        seconds = plan.step_seconds(cost, n, 1, ranks, ranks, True, rate, CLUSTER)
        assert 1000 * seconds == pytest.approx(float(record["median_ms"]), rel=0.1)


def test_what_does_not_fit_shares_more_or_is_told(cost):
    _, rate = plan.measured_rate()
    small = CLUSTER._replace(memory=12e9)
    assert plan.plan_of(cost, 2**20, 2**20, 1, rate, small) is None
    shared = plan.plan_of(cost, 2**20, 2**20, 16, rate, small)
    assert shared.ranks > 1
    assert shared.memory <= small.memory
    whole = cost.memory(2**16, 16, recomputes=True, sharded=False)
    assert whole - cost.memory(2**16, 16, recomputes=True, sharded=True) == pytest.approx(
        12 * cost.parameters * 15 / 16
    )


def test_the_command_prints_assumptions_and_every_size(capsys):
    tools.load_script("describe").main(["--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("assumed") for line in lines)
    for name in plan.SIZES:
        assert sum(line.startswith(name) for line in lines) == len(plan.LENGTHS) * len(plan.GPUS)
    assert re.search(r"tokens a second, \d+ TFLOP/s", lines[0])


def test_a_plan_takes_no_other_option(capsys):
    with pytest.raises(SystemExit):
        tools.load_script("describe").main(["--plan", "--arch", "flash_lm"])
    assert "--plan is alone; allowed: --plan, or --arch with --tokens-per-sample" in capsys.readouterr().err
