"""Proves that benchmark_fairseq_train.py measures trainings as users start them."""

import pytest
from fairseq import options as fairseq_options

from support import tools

TINY = ("--embed-dim", "16", "--layers", "1", "--attention-dim", "8", "--optimizer", "adam")
COMMAND = "--lengths 16 --tokens 32 --vocabulary 40 --updates 4 --skip 1 --log-interval 1 --device cpu"


@pytest.fixture
def benchmark(monkeypatch):
    script = tools.load_script("benchmark_fairseq_train")
    arch = ("--arch", "flash_lm_tiny", *TINY)
    contenders = {"first": arch, "broken": (*arch, "--chunk-size", "0"), "second": arch}
    monkeypatch.setitem(script.CONTENDERS, "lm", ("dummy_lm", contenders))
    return script


def test_trainings_become_records_and_a_second_run_repeats_none(benchmark, tmp_path, capfd):
    command = [*COMMAND.split(), "--dtype", "float32", "--output", str(tmp_path / "out.csv")]
    benchmark.main(command)
    first, broken, second = tools.rows_of(tmp_path / "out.csv")
    assert (first["name"], second["name"], first["intervals"]) == ("first", "second", "3")
    assert (first["status"], first["ratio"], first["n"], first["peak_memory"]) == ("ok", "1.000", "16", "")
    assert 0 < float(first["slowest"]) <= float(first["tokens_per_s"]) <= float(first["fastest"])
    assert float(second["ratio"]) == pytest.approx(
        float(second["tokens_per_s"]) / float(first["tokens_per_s"]), abs=2e-3
    )
    assert "chunk_size=0" in broken["status"]
    assert broken["tokens_per_s"] == broken["ratio"] == ""
    capfd.readouterr()
    benchmark.main(command)
    assert "round" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, (_, contenders) in tools.load_script("benchmark_fairseq_train").CONTENDERS.items()
        for name in contenders
    ],
)
def test_every_contender_is_a_command_line_that_fairseq_takes(kind, name):
    script = tools.load_script("benchmark_fairseq_train")
    words = script.words_of(kind, name, 64, script.parse(["--kind", kind]))
    args = fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), words)
    assert args.arch in words
    assert args.optimizer in words


def test_systems_are_chosen_by_name_and_the_first_is_the_ratios(benchmark, tmp_path, capsys):
    command = [*COMMAND.split(), "--dtype", "float32", "--output", str(tmp_path / "out.csv")]
    benchmark.main([*command, "--systems", "second", "first"])
    names = {row["name"]: row["ratio"] for row in tools.rows_of(tmp_path / "out.csv")}
    assert list(names) == ["second", "first"]
    assert names["second"] == "1.000"
    with pytest.raises(SystemExit):
        benchmark.parse(["--systems", "third"])
    assert "--systems 'third' is unknown; allowed: 'first', 'broken', 'second'" in capsys.readouterr().err


def test_a_vocabulary_below_a_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        tools.load_script("benchmark_fairseq_train").parse(["--lengths", "65536"])
    assert "--vocabulary 32000" in capsys.readouterr().err
