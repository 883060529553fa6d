"""Proves that measurements survive a kill, are not made twice, and say what memory and time they took."""

import subprocess
import sys
import textwrap

import pytest

from bench import clock
from runs import provenance
from runs.table import Table, read
from support import tools
from support.tools import rows_of

COLUMNS = ("name", "n", "device", "median_ms")
MIB = 1 << 20
SCRIPTS = tools.REPOSITORY / "scripts"


def table(path, device="cpu"):
    return Table(path, COLUMNS, ("device", "n"), ("name", "median_ms"), {"device": device})


@pytest.fixture
def path(tmp_path):
    """A file with one cell, in a folder that did not exist."""
    path = tmp_path / "new" / "results.csv"
    table(path).add([{"name": name, "n": 256, "median_ms": "1.5"} for name in ("a", "b")])
    return path


def test_a_cell_is_known_by_its_names_and_its_key(path):
    for known in (table(path), table(path)):
        assert known.has(["a", "b"], n=256)
        assert not known.has(["a", "b", "c"], n=256)
        assert not known.has(["a"], n=257)
    assert not table(path, "cuda").has(["a"], n=256)


def test_a_cell_that_was_just_added_is_known(path):
    known = table(path)
    known.add([{"name": "a", "n": 512}])
    assert known.has(["a"], n=512)
    assert not known.has(["b"], n=512)


def test_rows_are_added_behind_those_that_are_there(path, capsys):
    table(path).add([{"name": "a", "n": 512, "median_ms": "2"}])
    assert "name=a  median_ms=2" in capsys.readouterr().out
    rows = rows_of(path)
    assert [(row["name"], row["n"], row["device"]) for row in rows] == [
        ("a", "256", "cpu"),
        ("b", "256", "cpu"),
        ("a", "512", "cpu"),
    ]


@pytest.mark.parametrize("torn", [1, 2, 3, 8])
def test_a_line_that_a_kill_tore_is_dropped_and_measured_again(path, torn):
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn])
    known = table(path)
    assert known.has(["a"], n=256)
    assert not known.has(["b"], n=256)
    known.add([{"name": "b", "n": 256, "median_ms": "1.5"}])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [b"", b"name,n,dev"])
def test_a_torn_header_is_written_anew(path, left):
    path.write_bytes(left)
    table(path).add([{"name": "a", "n": 256}])
    assert [row["name"] for row in rows_of(path)] == ["a"]


def test_a_file_of_other_columns_is_refused(path):
    path.write_text("name,speed\na,1\n")
    with pytest.raises(ValueError, match="has the columns name,speed; allowed: name,n,device,median_ms"):
        table(path)


def test_an_unknown_column_is_refused_and_nothing_is_written(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="speed"):
        table(path).add([{"name": "c", "n": 256, "speed": 1}])
    assert path.read_bytes() == before


def test_a_summary_is_the_median_and_half_the_distance_of_the_quartiles():
    found = clock.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found == {"median_ms": "3", "spread_ms": "25", "repeats": 5, "status": "ok"}
    assert clock.summary([7.25]) == {"median_ms": "7.25", "spread_ms": "0", "repeats": 1, "status": "ok"}


def in_a_new_process(code):
    """Runs it with ``memory``, ``MIB`` and torch: what this process has freed may be taken without a sign."""
    begin = "import torch\nfrom bench.clock import Memory\nmemory, MIB = Memory('cpu'), 1 << 20\n"
    done = tools.run("python", "-c", begin + textwrap.dedent(code), PYTHONPATH=str(SCRIPTS))
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_peak_is_what_the_work_took_and_gave_back():
    found = in_a_new_process("""
        def work():
            for _ in range(3):
                torch.ones(64 * MIB // 4)

        print(memory.peak_of(lambda: torch.ones(1)), memory.peak_of(work))
    """)
    if "None" in found:
        pytest.skip("the system does not tell")
    small, large = map(int, found.split())
    assert small < 16 * MIB
    assert 60 * MIB <= large < 100 * MIB


def test_free_memory_is_positive_and_respects_a_container(tmp_path, monkeypatch):
    memory = clock.Memory("cpu")
    monkeypatch.setattr(clock, "CGROUP", tmp_path / "none")
    system = memory.available()
    assert system > 0
    monkeypatch.setattr(clock, "CGROUP", tmp_path)
    for name, text in {
        "memory.max": "1000000",
        "memory.current": "400000",
        "memory.stat": "anon 5\ninactive_file 50000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert memory.available() == 650000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > 650000


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_work_that_takes_too_much_raises_and_the_limit_goes_away():
    in_a_new_process("""
        memory.available = lambda: 64 * MIB
        try:
            with memory.limited():
                torch.ones(512 * MIB // 4)
        except MemoryError:
            pass
        else:
            raise SystemExit("512 MiB were taken where 64 are free")
        with memory.limited():
            torch.ones(16 * MIB // 4)
        assert torch.ones(512 * MIB // 4).numel()
    """)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), clock.Memory("cpu").limited():
        raise RuntimeError("shapes differ")


def test_a_row_says_from_which_commit_and_device_it_is():
    found = provenance.commit().removesuffix("+")
    resolved = [
        subprocess.run(["git", "-C", str(provenance.ROOT), "rev-parse", name], capture_output=True, text=True)
        for name in ("HEAD", found)
    ]
    assert found == "unknown" or resolved[0].stdout == resolved[1].stdout
    assert provenance.device_name("cpu") == "cpu"
    assert clock.clock("cpu") < clock.clock("cpu")


def test_a_cell_is_no_formula_to_a_spreadsheet_and_reads_as_it_was_written(path):
    cells = ["=1+2", "+cmd", "@x", "-x", "'=quoted", "'plain", "a=b", "-1.5", "--dropout 0.1"]
    cells += ["\t=1", "\r=1", "\n=1", " =1", "\u3000=1", "\uff1d1", "'\t=1"]
    for cell in cells:
        table(path).add([{"name": cell, "n": 1}])
    stored = [row["name"] for row in rows_of(path)][2:]
    assert [
        cell for cell in stored if cell[0] in "=+@\t\r\n \u3000\uff1d" or (cell[0] == "-" and cell != "-1.5")
    ] == []
    assert [row["name"] for row in read(path)][2:] == cells
    assert all(table(path).has([cell], n=1) for cell in cells)


def test_rows_are_forgotten_and_the_others_stay(path):
    known = table(path)
    known.forget(lambda row: row["name"] == "a")
    assert not known.has(["a"], n=256)
    assert [row["name"] for row in rows_of(path)] == ["b"]


def test_data_are_known_by_what_belongs_to_them(tmp_path):
    folder = tmp_path / "data-bin"
    (folder / "en-de").mkdir(parents=True)
    (folder / "dict.txt").write_text("a 1\n")
    (folder / "train.idx").write_bytes(b"1")
    name = provenance.data_name(folder)
    (folder / "en-de" / "dict.en.txt").write_text("b 1\n")
    (folder / "en-de" / "train.en-de.en.idx").write_bytes(b"2")
    assert provenance.data_name(folder) == name
    (folder / "train.idx").write_bytes(b"3")
    assert provenance.data_name(folder) != name
    (tmp_path / "classes" / "input0").mkdir(parents=True)
    (tmp_path / "classes" / "input0" / "dict.txt").write_text("a 1\n")
    name = provenance.data_name(tmp_path / "classes")
    (tmp_path / "classes" / "input0" / "train.idx").write_bytes(b"1")
    assert provenance.data_name(tmp_path / "classes") != name
