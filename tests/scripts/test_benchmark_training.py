"""Proves that the training benchmark times only what is right, tells what does not fit, and resumes."""

import sys
import types

import pytest
import torch

from support import tools
from support.tools import rows_of

QUICK = ("--quick", "--device", "cpu", "--lengths", "40", "--tokens", "80", "--rounds", "2")
PAIR = ("--systems", "transformer_lm", "flash_lm")


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    return tools.load_script("benchmark_training")


def test_every_system_is_a_row_and_is_measured_once(benchmark, tmp_path):
    path = tmp_path / "results.csv"
    benchmark.main([*QUICK, "--output", str(path), "--systems", *benchmark.SYSTEMS])
    rows = rows_of(path)
    assert [row["name"] for row in rows] == list(benchmark.SYSTEMS)
    assert all(row["status"] == "ok" and int(row["peak_memory"]) > 0 for row in rows)
    assert {(row["b"], row["n"], row["repeats"]) for row in rows} == {("2", "40", "2")}
    base = float(rows[0]["median_ms"])
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["median_ms"]) / base, abs=1e-3)
        assert float(row["tokens_per_s"]) == pytest.approx(80_000 / float(row["median_ms"]), rel=1e-3)
    benchmark.main([*QUICK, "--output", str(path), "--systems", *benchmark.SYSTEMS])
    assert rows_of(path) == rows


def test_the_step_is_the_gradient_of_the_mean_cross_entropy(benchmark):
    options = benchmark.parse([*QUICK, *PAIR])
    for system in options.systems:
        contender = benchmark.Contender(system, options)
        tokens = torch.randint(4, 500, (2, 41))
        loss = contender.step(tokens)
        grads = [parameter.grad.clone() for parameter in contender.model.parameters()]
        contender.model.zero_grad()
        logits, _ = contender.model(tokens[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        for grad, parameter in zip(grads, contender.model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_is_not_timed(benchmark, tmp_path, monkeypatch):
    from fairseq_flash.modules import GatedAttentionUnit

    forward = GatedAttentionUnit.forward
    broken = lambda self, x, *args, **kwargs: forward(self, x * torch.inf, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(GatedAttentionUnit, "forward", broken)
    path = tmp_path / "results.csv"
    benchmark.main([*QUICK, *PAIR, "--output", str(path)])
    baseline, ours = rows_of(path)
    assert "not finite" in ours["status"]
    assert ours["median_ms"] == ours["ratio"] == ""
    assert baseline["status"] == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel ends a process that takes too much")
def test_what_does_not_fit_is_a_row(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.Memory, "available", lambda self: 10)
    path = tmp_path / "results.csv"
    words = ("--lengths", "512", "--tokens", "16384", "--vocabulary", "2000")
    benchmark.main([*QUICK, *words, *PAIR, "--output", str(path)])
    assert [(row["status"], row["median_ms"]) for row in rows_of(path)] == [("out of memory", "")] * 2


def test_a_peer_takes_part_where_it_is_installed(benchmark, tmp_path, monkeypatch):
    class Model(torch.nn.Module):
        def __init__(self, *, num_tokens, dim, **sizes):
            super().__init__()
            self.token_emb, self.sizes = torch.nn.Embedding(num_tokens, dim), sizes
            self.to_logits = torch.nn.Sequential(torch.nn.Linear(dim, num_tokens))

        def forward(self, tokens):
            return self.to_logits(self.token_emb(tokens))

    peer = types.ModuleType("flash_pytorch")
    peer.FLASHTransformer, peer.__spec__ = Model, object()
    monkeypatch.setitem(sys.modules, "flash_pytorch", peer)
    options = benchmark.parse([*QUICK, "--output", str(tmp_path / "results.csv")])
    assert options.systems[-1] == benchmark.PEER
    contender = benchmark.Contender(benchmark.PEER, options)
    assert contender.model.sizes == {
        **{"depth": 2, "group_size": 64, "query_key_dim": 128, "expansion_factor": 2.0, "causal": True}
    }
    assert contender.model.to_logits[-1].weight is contender.model.token_emb.weight
    contender.check(torch.randint(4, 500, (2, 41)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--systems", "no_such_lm"],
            "no_such_lm is unknown in --size tiny; allowed: flash2_lm, flash_global_lm",
        ),
        (["--systems", "FLASH-pytorch"], "is not installed; allowed: pip install"),
    ],
)
def test_a_system_that_is_not_there_is_named(benchmark, words, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_pytorch", None)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=message):
        benchmark.main([*QUICK, *words])
