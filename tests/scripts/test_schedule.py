"""Proves that a plan of trainings goes on as the same plan, whatever ended it before."""

import re
import sys

import pytest

from runs import process, schedule
from runs.log import MEASURED, Log
from runs.schedule import TrainingRun, carry_out
from runs.table import Table
from support.tools import rows_of

COLUMNS = ("name", "lr", *MEASURED, "command")
#: Stands for fairseq-train: ends as the file "end" beside its folder says.
FAKE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--save-dir") + 1])
end = folder.parent / "end"
print("| INFO | train_inner |", json.dumps({"loss": "2", "wps": "9", "wpb": "8", "num_updates": "3"}))
(folder.parent / "calls").open("a").write("x")
sys.exit(int(end.read_text()) if end.exists() else 0)
"""


@pytest.fixture
def carry(tmp_path, monkeypatch):
    """Carries out one training; gives the records, and how often it was begun."""
    (tmp_path / "fake.py").write_text(FAKE)
    fake = [sys.executable, str(tmp_path / "fake.py")]
    monkeypatch.setattr(schedule, "fairseq_command", lambda tool, *words: [*fake, *map(str, words)])
    folder = tmp_path / "runs"

    def run(*words):
        record = {"name": "flash_lm", "lr": 0.1}
        if words:
            record["command"] = " ".join(["fairseq-train", "books", *words])
        table = Table(tmp_path / "out.csv", COLUMNS, ("lr",), (), {})
        carry_out([TrainingRun(words, 3, record)], table, folder)
        return rows_of(tmp_path / "out.csv"), len((folder / "calls").read_text())

    run.folder = folder
    folder.mkdir()
    return run


@pytest.mark.parametrize("status", [143, 137, 130, 129, 192])
def test_a_run_that_a_signal_ended_is_tried_again(carry, status):
    (carry.folder / "end").write_text(str(status))
    ((failed,), _) = carry()
    assert failed["status"].startswith(f"error: status {status}")
    (carry.folder / "end").unlink()
    ((fine,), calls) = carry()
    assert (fine["status"], calls) == ("ok", 2)


@pytest.mark.parametrize("status", [1, 128, 193, 255])
def test_a_run_that_failed_by_itself_is_not(carry, status):
    (carry.folder / "end").write_text(str(status))
    first = carry()
    assert carry() == first
    assert first[1] == 1


def test_a_line_that_a_crash_tore_is_none_of_the_curve(tmp_path):
    whole = '2026-01-01 | INFO | train_inner | {"loss": "2", "wps": "9", "wpb": "8", "num_updates": "%d"}\n'
    torn = (whole % 2)[:60] + whole % 2 + (whole % 3)[:70] + "2026-01-01 | INFO | {'optimizer': None}\n"
    (tmp_path / "log").write_text(whole % 1 + torn)
    log = Log(tmp_path / "log")
    log.read()
    assert [point["num_updates"] for point in log.intervals] == [1, 2]


def test_records_of_other_options_are_not_taken_for_a_plan_s_own(carry):
    first = carry("--max-tokens", "512", "--restore-file", "a/b.pt", "--cpu")
    assert carry("--max-tokens", "512", "--restore-file", "c/b.pt") == first, "elsewhere, on another device"
    told = r"out.csv has flash_lm of --max-tokens 512, not 1024; allowed: the same options, or another file"
    with pytest.raises(ValueError, match=told):
        carry("--max-tokens", "1024", "--restore-file", "a/b.pt", "--cpu")
    with pytest.raises(ValueError, match=r"has flash_lm without --bf16; allowed: "):
        carry("--max-tokens", "512", "--restore-file", "a/b.pt", "--bf16")
    with pytest.raises(ValueError, match=r"has flash_lm of --restore-file b.pt, not other.pt; allowed: "):
        carry("--max-tokens", "512", "--restore-file", "a/other.pt")
    with process.locked(carry.folder):
        pass


def test_only_runs_of_the_same_stage_begin_anew_as_their_data_have_changed(carry, tmp_path, capsys):
    def told(data, stage):
        record = {"name": "flash_lm", "lr": 0.1, "data": data, "stage": stage}
        table = Table(tmp_path / "told.csv", (*COLUMNS, "data", "stage"), ("lr", "data", "stage"), (), {})
        carry_out([TrainingRun((data, stage), 3, record)], table, carry.folder)
        return re.findall(r"told.csv (.*begin anew)$", capsys.readouterr().out, re.MULTILINE)

    assert told("books-1", "pretraining") == told("authors-1", "fine-tuning") == []
    assert told("authors-2", "fine-tuning") == [
        "has records of authors-1, none of authors-2: these runs begin anew"
    ]
    assert told("books-1", "fine-tuning") == [], "data of another stage are known"
    assert len(told("books-2", "pretraining")) == 1
    assert told("books-2", "fine-tuning") == [], "told once"
