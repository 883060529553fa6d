"""Proves that the benchmark times only what is right, and goes on where it ended."""

import csv

import pytest
import tools
import torch

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


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_cell_is_a_row_and_is_measured_once(benchmark, tmp_path):
    path = tmp_path / "results.csv"
    benchmark.main([*QUICK, "--output", str(path)])
    rows = rows_of(path)
    steps = [(row["name"], row["beam"]) for row in rows if row["pass"] == "step"]
    assert sorted(steps) == [(n, b) for n in ("flash_lm", "transformer_lm") for b in ("1", "2")]
    assert {row["pass"] for row in rows} == {
        "step",
        "prompt at once",
        "forward pass",
        "prompt token by token",
    }
    assert all(float(row["median_ms"]) > 0 and row["status"] == "ok" for row in rows)
    benchmark.main([*QUICK, "--output", str(path)])
    assert rows_of(path) == rows


def test_the_reckoned_size_of_a_state_is_the_real_one(benchmark):
    with torch.no_grad():
        for name in ("flash_lm", "transformer_lm"):
            options = benchmark.parse([*QUICK])
            contender = benchmark.Contender(name, 100, "cpu", torch.float32, options.overrides)
            incremental, _ = contender.start(30, 3)
            assert contender.state_bytes(30, 3) == sum(x.nbytes for x in benchmark._tensors(incremental))


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
