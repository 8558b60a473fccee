"""A progress bar over rows for a person, one plain line at the end for a log. Not for machines (`--json`).

In a notebook it is a line of HTML, since that has no terminal whose last line a bar of text could draw anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import TracebackType
from typing import IO, Any

from .notebook import Line, is_notebook

tqdm: Any = None  # a machine that publishes and computes, and shows nothing, need not have it
with suppress(ImportError):
    from tqdm import tqdm

# Seconds between two drawings in a notebook
_DRAWN = 0.25


class Progress:
    """Rows done of a fixed total, with rows/s and the time left.

    Parameters
    ----------
    label : str
    total : int
        Rows in all.
    done : int
        Rows that an earlier run has done; they do not count for the rate.
    quiet : bool
        Print nothing.
    file : file, optional
        Default: standard error; in a notebook, below the cell.
    """

    def __init__(self, label: str, total: int, done: int = 0, quiet: bool = False, file: IO[str] | None = None):
        self.label, self.total, self.done = label, total, done
        self._file = file or sys.stderr
        self._quiet = quiet
        self._new = 0
        self._begin = perf_counter()
        self._line = Line() if file is None and not quiet and is_notebook() else None
        self._shown = self._begin
        if self._line is not None:
            self._draw(self._line, "0 rows/s")
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=" rows",
            unit_scale=False,
            smoothing=0.05,
            **_shape(self._file),
            disable=quiet or not self._file.isatty(),
            file=self._file,
            bar_format="{desc}: {percentage:3.0f} % |{bar}| {n:,}/{total:,} rows, {rate_fmt}, {remaining} left",
        )

    def add(self, rows: int) -> None:
        """Count ``rows`` more as done."""
        self.done += rows
        self._new += rows
        self._bar.update(rows)
        if self._line is not None and perf_counter() - self._shown > _DRAWN:
            self._shown = perf_counter()
            left = (self.total - self.done) / self._rate
            self._draw(self._line, f"{self._rate:,.0f} rows/s, {left:,.0f} s left")

    def _draw(self, line: Line, state: str) -> None:
        share = self.done / self.total if self.total else 1.0
        line.show(f"{self.label}: {100 * share:.0f} %, {self.done:,} of {self.total:,} rows, {state}", share)

    @property
    def _rate(self) -> float:
        return self._new / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return perf_counter() - self._begin

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, rate = self.seconds, self._rate
        self._bar.close()
        state = "done" if kind is None else "stopped"
        if self._line is not None:
            self._draw(self._line, f"{state} in {seconds:.1f} s, {rate:,.0f} rows/s")
        elif not self._quiet and not self._file.isatty():
            print(
                f"{self.label}: {state}, {self.done:,} of {self.total:,} rows in {seconds:.1f} s, {rate:,.0f} rows/s",
                file=self._file,
                flush=True,
            )


@contextmanager
def bytes_bar(label: str, total: int, show: bool | None) -> Iterator[Callable[[int], object]]:
    """A bar over bytes, from the second on which they take; yields the function that counts them.

    ``show`` None: on a terminal.
    """
    shown = sys.stderr.isatty() if show is None else show
    if tqdm is None:
        yield lambda _: None
        return
    bar = tqdm(
        total=total, desc=label, unit="B", unit_scale=True, delay=1, leave=False, disable=not shown, file=sys.stderr,
        **_shape(sys.stderr),
    )  # fmt: skip
    with bar:
        yield bar.update


def _shape(file: IO[str]) -> dict[str, Any]:
    """Size of the terminal for tqdm, which shows nothing on one that says its size is 0 by 0 (as `script` does)."""
    try:
        columns, lines = os.get_terminal_size(file.fileno())
    except (OSError, ValueError):
        return {}
    return {"dynamic_ncols": True} if columns and lines else {"ncols": 80, "nrows": 24}
