"""Figures second by second, and what they say of one device: means, sparklines, where its time went. Knows no HTML."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from zcinfer.devicestate import DEVICE_COLUMNS, GPU_COLUMNS, HOUR
from zcinfer.telemetry import PHASES

__all__ = ["MINUTE", "Track", "append", "mean"]

MINUTE = 60.0

# Of each second of a device; None where one is not known
Row = tuple[float | None, ...]
_NAMES = (*DEVICE_COLUMNS, *GPU_COLUMNS)


class Track:
    """The last hour of one device.

    Attributes
    ----------
    plain : dict
        What the last snapshot said of it.
    seconds : deque of int
    rows : deque of tuple
        For each second, by `zcinfer.devicestate.DEVICE_COLUMNS` and `GPU_COLUMNS`.
    """

    def __init__(self, plain: Mapping[str, Any]):
        self.plain = plain
        self.seconds: deque[int] = deque(maxlen=HOUR)
        self.rows: deque[Row] = deque(maxlen=HOUR)
        self._totals: deque[tuple[float, Mapping[str, float]]] = deque()

    def take(self, plain: Mapping[str, Any], history: Mapping[str, Any] | None, now: float) -> None:
        """Take up what a snapshot says of it."""
        self.plain = plain
        self._totals.append((now, plain["totals"]))
        while len(self._totals) > 2 and self._totals[1][0] <= now - MINUTE:
            self._totals.popleft()
        if history is not None:
            seconds = history["seconds"]
            append(self.seconds, self.rows, seconds, [history.get(name) or [None] * len(seconds) for name in _NAMES])

    def mean(self, column: str, now: float, seconds: float) -> float:
        """Mean of a column over the last seconds, or since the first of them that has any."""
        return mean(self.seconds, self.rows, _NAMES.index(column), now, seconds)

    def binned(self, column: str, now: float, seconds: float, bins: int) -> list[float]:
        """Means of a column over equal parts of the last seconds, oldest first."""
        number, width = _NAMES.index(column), seconds / bins
        sums = [0.0] * bins
        known = [0] * bins
        for second, row in zip(reversed(self.seconds), reversed(self.rows), strict=True):
            place = bins - 1 - int((now - second) / width)
            if place < 0:
                break
            if place < bins and (value := row[number]) is not None:
                sums[place] += value
                known[place] += 1
        return [total / max(1, many) for total, many in zip(sums, known, strict=True)]

    def phases(self) -> tuple[dict[str, float], bool]:
        """Seconds by phase of the last minute, and True; where nothing was done in it, of all its time, and False."""
        first, last = self._totals[0][1], self._totals[-1][1]
        lately = {phase: max(0.0, last[phase] - first[phase]) for phase in PHASES}
        if sum(lately.values()) > 0:
            return lately, True
        return {phase: last[phase] for phase in PHASES}, False


def append(seconds: deque[int], rows: deque[Row], new: Iterable[int], columns: list[Any]) -> None:
    last = seconds[-1] if seconds else 0
    for second, *row in zip(new, *columns, strict=True):
        if second > last:
            seconds.append(second)
            rows.append(tuple(row))


def mean(seconds: deque[int], rows: deque[Row], column: int, now: float, span: float) -> float:
    # A second holds what was counted up to its sample, which came during it
    total, first = 0.0, None
    for second, row in zip(reversed(seconds), reversed(rows), strict=True):
        if second <= now - span:
            break
        if value := row[column]:
            total, first = total + value, second
    return 0.0 if first is None else total / min(span, max(1.0, int(now) - first + 1))
