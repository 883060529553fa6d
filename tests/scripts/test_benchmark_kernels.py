"""Proves that every kernel is timed in every setting, after its results have passed, and once."""

import os
import subprocess
import sys

import pytest

from support import tools
from support.tools import rows_of

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WORDS = (
    *("--lengths", "70", "--tokens", "70", "--expanded-dim", "24", "--attention-dim", "64"),
    *("--chunk-size", "64", "--rounds", "1"),
)
run_here = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter")


@pytest.mark.skipif(INTERPRETED, reason="the tests below run in this process")
def test_the_benchmark_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture
def benchmark():
    from support import interpreted

    interpreted.mend()
    return tools.load_script("benchmark_kernels")


@run_here
def test_each_kernel_is_a_record_in_each_setting_and_is_timed_once(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "TILINGS", {"base": ((16, 4, 4),), "output": ((64, 32, 64, 4, 2),)})
    path, before = tmp_path / "kernels.csv", (dict(benchmark.kernel.TILINGS), benchmark.kernel.BASE)
    for _ in range(2):
        benchmark.main([*WORDS, "--tilings", "all", "--output", str(path)])
    found = rows_of(path)
    names = {}
    for record in found:
        assert record["status"] == "ok"
        assert float(record["median_us"]) > 0
        names.setdefault(record["setting"], []).append(record["name"])
    assert list(names) == ["chunks", "chunks, base 16x4x4", "chunks, output 64x32x64x4x2"]
    assert names["chunks"] == names["chunks, base 16x4x4"] == names["chunks, output 64x32x64x4x2"]
    assert {"both passes", "copies", "scores", "states", "scan, backward", "output", "output, backward"} | {
        *("values_backward", "pairs_backward", "base_backward")
    } <= set(names["chunks"])
    assert before == (benchmark.kernel.TILINGS, benchmark.kernel.BASE)


@run_here
def test_a_setting_with_other_results_is_not_timed(benchmark, monkeypatch, tmp_path):
    wrong, start = benchmark.Setting("base", (16, 4, 4)), benchmark.kernel._start

    def start_wrongly(launched, programs, *args, **constants):
        start(launched, programs, *args, **constants)
        if constants.get("BLOCK") == 16:
            args[6].zero_()

    monkeypatch.setattr(benchmark.kernel, "_start", start_wrongly)
    options = benchmark.parse([*WORDS, "--output", str(tmp_path / "kernels.csv")])
    (record,) = benchmark.measure(options, 70, [wrong])
    assert record["status"].startswith("RuntimeError: a result is wrong by ")
    assert "median_us" not in record


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    if INTERPRETED:
        pytest.skip("the interpreter needs none")
    benchmark = tools.load_script("benchmark_kernels")
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse([])
    assert "there is no GPU; allowed: one, or TRITON_INTERPRET=1" in capsys.readouterr().err
