"""Progress: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from treemem import progress
from treemem.progress import LINE_SECONDS, bars


def test_lines_say_what_is_done_the_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = io.StringIO()
    with bars(Console(file=shown, width=80)) as tell:
        tell("encoding", 0, None)
        now += 1
        tell("encoding", 50, 1000)  # too soon after the last line
        now += LINE_SECONDS - 1
        tell("encoding", 1500, 6000)
        now += LINE_SECONDS
        tell("encoding", 3000, None)
        tell("growing level 2", 0, None)  # a new stage is told at once
    assert shown.getvalue().splitlines() == [
        "encoding",
        "encoding 1,500 of about 6,000, 100/s, 45 s left",
        "encoding 3,000, 100/s",
        "growing level 2",
    ]


def test_a_bar_for_each_stage() -> None:
    shown = io.StringIO()
    with bars(Console(file=shown, force_terminal=True, width=120)) as tell:
        tell("encoding", 0, None)
        tell("encoding", 250, None)
        tell("encoding", 500, 1000)
        tell("growing level 2", 3, 9)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())
    assert "encoding" in text
    assert "500 of about 1,000" in text
    assert "3 of about 9" in text
    assert "growing level 2" in text


def test_a_total_that_changes_leaves_the_rate() -> None:
    shown = io.StringIO()
    with bars(Console(file=shown, force_terminal=True, width=120)) as tell:
        for done in range(6):
            tell("encoding", done * 100, 1000 + done)
    assert "/s" in shown.getvalue()


def test_a_total_of_nothing_is_no_error() -> None:
    for terminal in (True, False):
        with bars(Console(file=io.StringIO(), force_terminal=terminal)) as tell:
            tell("encoding", 0, 0)
            tell("encoding", 0, 0)
