"""Proves that the benchmark of the loss times what fairseq asks for, and only what is right."""

import pytest
import torch

from fairseq_flash.models import _loss
from support import tools
from support.tools import rows_of

QUICK = ("--quick", "--device", "cpu", "--losses", "plain", "chunked")


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    return tools.load_script("benchmark_loss")


@pytest.mark.skipif(bool(_loss.loss_objections("chunked", list)), reason="this PyTorch has no loss in pieces")
def test_each_loss_is_a_row_and_is_measured_once(benchmark, tmp_path):
    path = tmp_path / "loss.csv"
    for _ in range(2):
        benchmark.main([*QUICK, "--output", str(path)])
    plain, chunked = rows_of(path)
    assert (plain["name"], chunked["name"], plain["n"]) == ("plain", "chunked", "256")
    assert plain["status"] == chunked["status"] == "ok"
    assert plain["ratio"] == "1.000"
    expected = float(chunked["median_ms"]) / float(plain["median_ms"])
    assert float(chunked["ratio"]) == pytest.approx(expected, abs=2e-3)


def test_a_loss_that_cannot_run_is_left_out_and_refused_by_name(benchmark, monkeypatch, capsys):
    def objections(loss, compiled):
        return ["torch has no linear_cross_entropy"] if loss == "chunked" else []

    monkeypatch.setattr(benchmark, "loss_objections", objections)
    assert benchmark.parse(["--quick"]).losses == ["plain", "compiled"]
    with pytest.raises(SystemExit):
        benchmark.parse(["--losses", "chunked"])
    assert "--losses chunked cannot run: torch has no linear_cross_entropy" in capsys.readouterr().err


def test_memory_is_counted_with_the_gradients(benchmark):
    options = benchmark.parse([*QUICK, "--dim", "4096", "--vocabulary", "2048"])
    (record,) = benchmark.measure(["plain"], 16, options)
    assert record["peak_memory"] > 0.9 * 4 * 2048 * 4096


def test_no_loss_looks_at_the_logits(benchmark, monkeypatch):
    """What is timed must be the loss from the features, not that of logits that were computed after all."""
    monkeypatch.setattr(_loss.LazyLogits, "computed", None)
    monkeypatch.setattr(_loss, "_compiled", lambda: _loss._whole_loss)
    benchmark.Row(8, benchmark.parse(list(QUICK))).loss("compiled")


def test_a_loss_that_is_wrong_is_not_timed(benchmark, monkeypatch):
    def wrong(features, weight, target, ignore_index):
        return 1.01 * _whole(features, weight, target, ignore_index)

    _whole = _loss._whole_loss
    monkeypatch.setattr(_loss, "_compiled", lambda: wrong)
    with pytest.raises(RuntimeError, match=r"compiled differs from plain by 1\.0e-02"):
        benchmark.check("compiled", benchmark.parse(list(QUICK)))


def test_what_does_not_fit_is_a_record_and_the_others_go_on(benchmark, monkeypatch):
    loss = benchmark.Row.loss

    def lacking(self, name):
        if name == "plain":
            raise torch.OutOfMemoryError("out of memory")
        return loss(self, "plain")

    monkeypatch.setattr(benchmark.Row, "loss", lacking)
    plain, other = benchmark.measure(["plain", "compiled"], 32, benchmark.parse(list(QUICK)))
    assert plain == {"name": "plain", "n": 32, "status": "out of memory"}
    assert other["status"] == "ok"
    assert "ratio" not in other
