"""Proves that the benchmark times only what is right, and goes on where it ended."""

import sys

import pytest
import torch

from bench.models import bytes_of
from support import tools
from support.tools import rows_of

QUICK = (
    "--quick",
    "--device",
    "cpu",
    "--positions",
    "40",
    "--beams",
    "1",
    "2",
    "--prompts",
    "20",
    "--rounds",
    "1",
)


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    return tools.load_script("benchmark_generation")


def test_every_cell_is_a_row_and_is_measured_once(benchmark, tmp_path):
    path = tmp_path / "results.csv"
    benchmark.main([*QUICK, "--output", str(path)])
    rows = rows_of(path)
    steps = [(row["name"], row["beam"]) for row in rows if row["pass"] == "step"]
    systems = ("flash_lm", "transformer_lm", "transformer_pp_lm")
    assert sorted(steps) == [(name, beam) for name in systems for beam in ("1", "2")]
    sizes = {row["name"]: [row[size] for size in ("d", "e", "s", "c")] for row in rows}
    assert sizes == {
        "flash_lm": ["64", "128", "128", "256"],
        "transformer_lm": ["64", "", "", ""],
        "transformer_pp_lm": ["64", "", "64", ""],
    }
    assert {row["pass"] for row in rows} == {
        "step",
        "prompt at once",
        "forward pass",
        "prompt token by token",
    }
    assert all(float(row["median_ms"]) > 0 and row["status"] == "ok" for row in rows)
    benchmark.main([*QUICK, "--output", str(path)])
    assert rows_of(path) == rows


def test_a_system_that_is_new_in_a_file_is_measured_alone(benchmark, tmp_path):
    path = tmp_path / "results.csv"
    benchmark.main([*QUICK, "--systems", "flash_lm", "transformer_lm", "--output", str(path)])
    old = rows_of(path)
    benchmark.main([*QUICK, "--output", str(path)])
    rows = rows_of(path)
    assert rows[: len(old)] == old
    new = rows[len(old) :]
    assert {row["name"] for row in new} == {"transformer_pp_lm"}
    assert {row["pass"] for row in new} == {row["pass"] for row in old}
    by_hand = path.read_text().splitlines(keepends=True)
    path.write_text("".join(by_hand[:-1]))
    benchmark.main([*QUICK, "--output", str(path)])
    key = ("name", "pass", "b", "beam", "n")
    assert [[row[k] for k in key] for row in rows_of(path)] == [[row[k] for k in key] for row in rows]


def test_weights_of_eight_bits_need_a_package_that_is_named(benchmark, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(SystemExit):
        benchmark.main([*QUICK, "--dtype", "int8"])
    assert "--dtype int8 needs the package torchao; allowed: pip install torchao" in capsys.readouterr().err


def test_weights_of_eight_bits_are_those_of_dense_layers(benchmark, monkeypatch, tmp_path):
    """Runs where torchao is installed."""
    pytest.importorskip("torchao")
    made, narrow = [], benchmark.with_int8_weights
    monkeypatch.setattr(benchmark, "with_int8_weights", lambda model: (narrow(model), made.append(model)))
    words = ("--systems", "flash_lm", "--beams", "1", "--prompts", "--dtype", "int8")
    benchmark.main([*QUICK, *words, "--output", str(tmp_path / "results.csv")])
    (row,) = rows_of(tmp_path / "results.csv")
    assert (row["dtype"], row["status"]) == ("int8", "ok")
    weights = {name: type(weight).__name__ for name, weight in made[0].named_parameters()}
    assert {"Int8Tensor", "AffineQuantizedTensor"} & set(weights.values())
    assert weights["decoder.stack.embed_tokens.weight"] == "Parameter"
    assert made[0].decoder.output_projection.weight is made[0].decoder.stack.embed_tokens.weight


CONTENDERS = ["flash_lm", "flash_quad_lm", "transformer_lm", "transformer_pp_lm", "mc_transformer_pp_lm"]


@pytest.mark.parametrize("name", CONTENDERS)
@torch.no_grad()
def test_a_start_at_a_position_has_the_state_of_that_position(benchmark, name):
    options = benchmark.parse([*QUICK])
    contender = benchmark.Contender(name, 100, "cpu", torch.float32, options.overrides)
    incremental, tokens = contender.start(30, 3)
    size = bytes_of(incremental)
    assert contender.state_bytes(30, 3) == size
    assert (contender.state_bytes(60, 3) > size) == contender.grows
    assert contender.grows == (name in ("flash_quad_lm", "transformer_lm", "transformer_pp_lm"))
    first = contender.step(incremental, tokens, torch.arange(3))
    contender.step(incremental, first, torch.tensor([0, 0, 2]))
    if contender.has_state:
        (_, state), *_ = incremental.values()
        assert state.position.tolist() == [32, 32, 32]
    contender.check()


def test_a_wrong_result_is_not_timed(benchmark, tmp_path, monkeypatch):
    from fairseq_flash.models.flash_lm import FlashDecoder

    right = FlashDecoder._advance
    monkeypatch.setattr(FlashDecoder, "_advance", lambda self, *args: right(self, *args) * 1.1)
    with pytest.raises(RuntimeError, match="differs from parallel"):
        benchmark.main([*QUICK, "--output", str(tmp_path / "results.csv")])
    assert not (tmp_path / "results.csv").exists()


def test_what_does_not_fit_is_a_row(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.Memory, "available", lambda self: 10)
    path = tmp_path / "results.csv"
    benchmark.main([*QUICK, "--output", str(path)])
    assert {row["status"] for row in rows_of(path) if row["pass"] == "step"} == {"out of memory"}


def test_an_unknown_system_is_named(benchmark):
    with pytest.raises(SystemExit, match="no_such_lm is unknown"):
        benchmark.main([*QUICK, "--systems", "no_such_lm"])
