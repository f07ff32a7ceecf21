"""Bars: what they show, and that a file is not filled with them."""

import io
import sys

from support import progress
from support.progress import Activity


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_activity_shows_its_stage_its_rows_and_tokens_per_second_on_a_terminal(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    activity = Activity()
    activity.begin("generation", 8)
    activity.advance(tokens=30)  # a second later
    activity.advance(rows=3, tokens=30)  # two seconds later
    shown = terminal.getvalue()
    assert "generation" in shown and "3/8" in shown and "30 tokens/s" in shown
    activity.reach(8)
    assert "8/8" in terminal.getvalue()
    activity.end()
    activity.advance(rows=1, tokens=1)  # nothing is under way
    assert activity.bar is None


def test_an_activity_writes_nothing_into_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    activity = Activity()
    activity.begin("generation", 3)
    activity.advance(rows=1, tokens=10)
    activity.end()
    assert file.getvalue() == ""


def test_a_bar_in_a_file_is_a_few_lines_however_often_it_moves(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    with progress.bar(total=1000, desc="dev") as rows:
        for _ in range(1000):
            rows.update(1)
    assert len(file.getvalue()) < 500 and "1000/1000" in file.getvalue()
