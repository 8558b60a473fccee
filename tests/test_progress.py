"""Progress for a person at a terminal, and one line for a log."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
from contextlib import suppress

import pytest

from zcinfer.progress import Progress, bytes_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with Progress("model@1", 1000, file=file) as progress:
        for _ in range(10):
            progress.add(100)
        assert file.getvalue() == ""
    assert re.fullmatch(r"model@1: done, 1,000 of 1,000 rows in \d+\.\d s, [\d,]+ rows/s\n", file.getvalue())


def test_line_after_an_error_says_where_it_stopped() -> None:
    file = io.StringIO()
    with suppress(KeyboardInterrupt), Progress("model@1", 1000, file=file) as progress:
        progress.add(100)
        raise KeyboardInterrupt
    assert file.getvalue().startswith("model@1: stopped, 100 of 1,000 rows in ")


def test_rows_of_an_earlier_run_do_not_count_for_the_rate() -> None:
    file = io.StringIO()
    with Progress("model@1", 1_000_000, done=999_999, file=file) as progress:
        while progress.seconds < 0.01:
            pass
        progress.add(1)
    assert "1,000,000 of 1,000,000 rows" in file.getvalue()
    rate = re.search(r"([\d,]+) rows/s", file.getvalue())
    assert rate is not None
    assert int(rate[1].replace(",", "")) <= 100


def test_quiet_prints_nothing() -> None:
    file = io.StringIO()
    with Progress("model@1", 10, quiet=True, file=file) as progress:
        progress.add(10)
    assert file.getvalue() == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_bar_of_fixed_total_with_rate_and_time_left_at_a_terminal(quiet: bool) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", 0) as terminal, os.fdopen(theirs, "w") as file:
        with Progress("model@1", 2000, done=500, quiet=quiet, file=file) as progress:
            while progress.seconds < 0.2:  # more than tqdm's least time between two drawings
                pass
            progress.add(1000)
        print("end", file=file, flush=True)
        drawn = ""
        while "end" not in drawn:
            drawn += terminal.read(65536).decode()
    if quiet:
        assert drawn == "end\r\n"
    else:
        assert re.search(r"model@1:  25 % \|.*\| 500/2,000 rows", drawn)
        assert re.search(r"model@1:  75 % \|.*\| 1,500/2,000 rows, *[\d.]+k? rows/s, \d\d:\d\d left", drawn)
        assert "done" not in drawn


def test_a_bar_over_bytes_waits_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bytes_bar("put model", 3_000_000, None) as advance:
        advance(1_000_000)
        assert not re.search(r"\d+%", terminal.getvalue())
        threading.Event().wait(1.1)
        advance(1_000_000)
        assert re.search(r"put model: +67%.*2\.00M/3\.00M", terminal.getvalue())


@pytest.mark.parametrize(("terminal", "show"), [(True, False), (False, None)])
def test_a_bar_over_bytes_can_be_left_out(terminal: bool, show: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", file := Terminal() if terminal else io.StringIO())
    with bytes_bar("put model", 3_000_000, show) as advance:
        threading.Event().wait(1.1)
        advance(3_000_000)
    assert file.getvalue() == ""
