"""Proves that the benchmark of shared rows measures only what is right, and is a row for each measurement."""

import os
import sys

import pytest
import torch

from support import tools
from support.ranks import run_ranks
from support.tools import rows_of

SCRIPT = tools.REPOSITORY / "scripts" / "benchmark_sequence_parallel.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
QUICK = ("--quick", "--device", "cpu", "--rounds", "2", "--vocabulary", "50")


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    return tools.load_script("benchmark_sequence_parallel")


WATCHED = """
import os, pathlib, runpy
from torch import distributed

def threads():
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(path.read_text())
        except OSError:
            pass  # it has ended meanwhile
    return sum("gloo" in name for name in names)

def destroy(end=distributed.destroy_process_group):
    counts.append(threads())
    end()

counts, distributed.destroy_process_group = [], destroy
runpy.run_path({script!r}, run_name="__main__")
pathlib.Path({folder!r}, os.environ["RANK"] + ".threads").write_text(f"{{min(counts) > 0}}, {{threads()}}")
"""


def test_two_processes_are_a_row_beside_one_and_are_measured_once(tmp_path):
    watched, found = tmp_path / "watched.py", tmp_path / "found.csv"
    watched.write_text(WATCHED.format(script=str(SCRIPT), folder=str(tmp_path)))
    words = (*TORCHRUN, watched, *QUICK, "--lengths", "256", "--output", found)
    for _ in range(2):
        done = tools.run("python", *words, PYTHONPATH=f"{tools.REPOSITORY}{os.pathsep}{SCRIPT.parent}")
        assert done.returncode == 0, done.stdout
        # While the group is there it has threads. Where one is left when Python ends, SIGABRT may follow.
        left = [(tmp_path / f"{rank}.threads").read_text() for rank in (0, 1)]
        assert left == ["True, 0", "True, 0"]
    alone, together = rows_of(found)
    assert (alone["ranks"], alone["n"], together["ranks"], together["n"]) == ("1", "128", "2", "256")
    assert alone["status"] == together["status"] == "ok"
    assert float(together["ratio"]) == pytest.approx(
        float(together["median_ms"]) / float(alone["median_ms"]), abs=1e-3
    )
    assert 0 < float(together["error"]) < 1e-5
    assert int(together["peak_memory"]) > 0


def wrongly_shared(group):
    """What the check says where each process sees its own part alone."""
    from fairseq_flash.ops.mixed_chunk import gated

    sys.path.insert(0, str(SCRIPT.parent))
    benchmark = tools.load_script("benchmark_sequence_parallel")
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(group.rank()), str(group.size())
    torch.set_default_dtype(torch.float32)
    options = benchmark.parse([*QUICK])
    gated._from_others = lambda projected, options, group: None
    try:
        benchmark.check(options, group)
    except RuntimeError as error:
        return str(error)


def test_what_is_not_one_processes_result_is_not_timed():
    for message in run_ranks(wrongly_shared, 2):
        assert message.startswith("shared rows give other losses or gradients, by ")


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ((), {}, "there is one process; allowed: torchrun --standalone"),
        (
            ("--arch", "flash_quad_lm"),
            {},
            "--arch flash_quad_lm cannot share rows, or is unknown; allowed: fl",
        ),
        (
            ("--lengths", "5"),
            {"RANK": "0", "WORLD_SIZE": "2"},
            "--lengths 5 is not allowed with 2 processes; al",
        ),
        (("--rounds", "0"), {}, "--rounds 0 is not allowed; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(benchmark, words, environment, message, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        benchmark.parse([*words])
    assert message in capsys.readouterr().err
