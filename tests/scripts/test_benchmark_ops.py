"""Proves that layers are timed after their results have passed, and that rows say what was timed."""

import pytest
import torch

import benchmark_ops
from bench import layers
from support.tools import rows_of

WORDS = [
    "--quick",
    "--lengths",
    "40",
    "--tokens",
    "80",
    "--dims",
    "64",
    "--chunk-size",
    "16",
    "--rounds",
    "2",
]


def test_rows_of_every_pass_and_a_second_run_measures_nothing_anew(tmp_path, capsys):
    words = [*WORDS, "--systems", "flash/reference", "transformer_pp", "--output", str(tmp_path / "ops.csv")]
    benchmark_ops.main(words)
    rows = rows_of(tmp_path / "ops.csv")
    assert [(row["name"], row["pass"], row["b"], row["n"], row["d"]) for row in rows] == [
        (name, kind, "2", "40", "64")
        for kind in ("forward", "training step")
        for name in ("flash/reference", "transformer_pp")
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["median_ms"]) > 0
        assert row["name"] != "transformer_pp" or float(row["ratio"]) == 1
    e, s, c, d = 128, 128, 16, 64
    unit = d * (2 * e + s) + e * d + c * (s + e) // 2 + 2 * s * e
    assert int(rows[0]["multiply_adds"]) == 80 * 2 * unit
    before = (tmp_path / "ops.csv").read_bytes()
    benchmark_ops.main(words)
    assert (tmp_path / "ops.csv").read_bytes() == before


def test_a_contender_that_sees_its_future_is_not_timed(monkeypatch):
    class Leaks(torch.nn.Module):
        def forward(self, x):
            return x + x.mean(dim=1, keepdim=True)

    leaking = layers.Contender("leaks", lambda d, c: layers.Layers([Leaks()]))
    monkeypatch.setitem(layers.CONTENDERS, "leaks", leaking)
    with pytest.raises(RuntimeError, match="leaks, of a prefix, is wrong by"):
        layers.build("leaks", 8, 16, "cpu", torch.float32)


def test_what_is_not_installed_or_needs_a_gpu_is_left_out_and_said(capsys, tmp_path):
    benchmark_ops.main(
        [*WORDS, "--systems", "fla GLA", "transformer_pp", "--output", str(tmp_path / "x.csv")]
    )
    assert "left out: fla GLA, compiled: no: " in capsys.readouterr().out


def test_what_fails_at_a_length_is_a_record_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    class Short(torch.nn.Linear):
        def forward(self, x):
            if x.shape[1] == 48:
                raise AssertionError("rows of 48 are too short")
            return super().forward(x)

    def wrong(d, c):
        raise RuntimeError("no such kernel")

    for name, make in (("short", lambda d, c: layers.Layers([Short(d, d)])), ("wrong", wrong)):
        monkeypatch.setitem(layers.CONTENDERS, name, layers.Contender(name, make, needs="torch"))
    words = [*WORDS, "--lengths", "40", "48", "--systems", "short", "wrong", "transformer_pp"]
    words += ["--passes", "forward", "--output", str(tmp_path / "ops.csv")]
    with pytest.raises(SystemExit, match="1 left out, as they failed: wrong, compiled: no: error"):
        benchmark_ops.main(words)
    assert "left out: wrong, compiled: no: error: RuntimeError: no such kernel" in capsys.readouterr().out
    found = {(row["name"], row["n"]): row["status"] for row in rows_of(tmp_path / "ops.csv")}
    assert found.pop(("short", "48")) == "error: AssertionError: rows of 48 are too short"
    assert len(found) == 3
    assert set(found.values()) == {"ok"}
    monkeypatch.setattr(Short, "forward", torch.nn.Linear.forward)
    with pytest.raises(SystemExit):
        benchmark_ops.main(words)
    assert [row["status"] for row in rows_of(tmp_path / "ops.csv")] == ["ok"] * 4, "tried again"


def test_an_error_of_the_card_ends_all():
    with pytest.raises(RuntimeError, match="illegal"):
        benchmark_ops.reason(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--systems", "flash/cuda"], "--systems flash/cuda is unknown; allowed: flash/"),
        (["--dims", "0"], "--dims 0 is not allowed; allowed: 1 or more"),
        (["--chunk-size", "-1"], "--chunk-size -1 is not allowed; allowed: 1 or more"),
    ],
)
def test_bad_options_are_named(words, said, capsys):
    with pytest.raises(SystemExit):
        benchmark_ops.parse(words)
    assert said in capsys.readouterr().err
