"""Proves that a plan tells how far it is and how long it takes, on a terminal and without one."""

import io
import sys

import pytest

from runs import progress
from runs.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "1 s"), (89, "89 s"), (90, "2 min"), (3569, "59 min"), (3600, "1 h 00 min"), (7810, "2 h 10 min")],
)
def test_a_time_is_said_as_one_says_it(seconds, words):
    assert duration(seconds) == words


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_each_run_that_ends_is_a_line_with_the_time_left(clock, capsys):
    with Progress(4, 100.0) as told:
        told.skip(1, 40.0)
        told.work(5.0)
        told.work(5.0)
        clock[0] = 600.0
        told.end()
        told.work(50.0)
        told.end()
        told.end()
    assert capsys.readouterr().out.splitlines() == [
        "2 of 4 runs done, about 50 min left",
        "3 of 4 runs done, about 1 s left",
        "4 of 4 runs done",
    ]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, 10.0) as told:
        told.work(5.0)
        told.end()
    assert not capsys.readouterr().out
    assert "1 of 2 runs done  50%|" in terminal.getvalue()
