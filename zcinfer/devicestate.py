"""Workers as the scheduler sees them: what each has counted, over all its lives, and its last hour second by second.

Not for what they count (`telemetry`) and look up (`sampling`), nor for who asks them (`observer`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .telemetry import PHASES, REMEMBERED

# Seconds that are remembered; and for which a device is said to work for a job after its last block.
HOUR, LATELY = 3600, 60.0
SUMS = ("rows", "blocks", "batches", "bytes_in", "bytes_out", "errors", "halved")
# Columns of a second: of the cluster, and of each device.
COLUMNS = (*SUMS, *PHASES)
_COMPUTING = PHASES.index("computing")
DEVICE_COLUMNS = ("rows", "computing", "busy", "private")
# Of those that have cards: percent of the time that these are used, and bytes in use; None where that is not known.
GPU_COLUMNS = ("gpu", "gpu_memory")


class Ring:
    """The last hour of some figures, a row a second, ``(HOUR, columns)``."""

    def __init__(self, columns: int):
        self._rows = np.zeros((HOUR, columns), np.float32)
        self._seconds = np.zeros(HOUR, np.int64)

    def put(self, second: int, row: Any) -> None:
        """Set the figures of a second (``time.time()``)."""
        self._rows[second % HOUR] = row
        self._seconds[second % HOUR] = second

    def since(self, second: int) -> tuple[list[int], list[list[float]]]:
        """Seconds after that one, and a list of figures for each column."""
        chosen = np.flatnonzero(self._seconds > second)
        chosen = chosen[np.argsort(self._seconds[chosen])]
        return self._seconds[chosen].tolist(), self._rows[chosen].T.tolist()


class Device:
    """What one worker has counted, over all its lives."""

    def __init__(self, address: str, name: str, host: str):
        self.address, self.name, self.host = address, name, host
        self.totals = np.zeros(len(COLUMNS))
        self.second = np.zeros(len(COLUMNS))  # since the last second was put into the ring
        self.jobs: dict[str, float] = {}
        self.models: list[str] = []
        self.private = self.shared = 0
        self.seen = 0.0
        self.gone: float | None = None
        self.ring = Ring(len(DEVICE_COLUMNS))
        # What workers look up now and then (`sampling`): cards, or why there is none to be seen; and stores
        self.gpus: Any = None
        self.stores: Any = ()
        self.gpu_ring: Ring | None = None
        self._epoch, self._told = "", 0.0
        self._last: dict[tuple[str, str], Any] = {}

    def take(self, counted: dict[str, Any], now: float) -> list[tuple[str, np.ndarray]]:
        """Take up counters; what each job has more than before, by its key."""
        if counted["epoch"] != self._epoch:
            self._epoch, self._last, self._told = counted["epoch"], {}, 0.0
        elif counted["time"] <= self._told:
            return []  # the same as before; or another heartbeat has overtaken it
        self._told = counted["time"]
        self.private, self.shared, self.seen = counted["private"], counted["shared"], now
        self.gpus, self.stores = counted.get("gpus"), counted.get("stores", ())
        more = []
        for work in counted["work"]:
            key = (work["job"], work["model"])
            found = np.array([*(work[name] for name in SUMS), *work["seconds"]])
            added = found - self._last.pop(key, 0)
            self._last[key] = found
            if added.any():
                more.append((work["job"], added))
                self.jobs[work["job"]] = now
                if work["model"] in self.models:
                    self.models.remove(work["model"])
                self.models = [work["model"], *self.models][:5]
        # What the process has forgotten begins anew if it comes again; both forget what was used least recently
        for old in list(self._last)[:-REMEMBERED]:
            del self._last[old]
        self.jobs = {job: at for job, at in self.jobs.items() if now - at < LATELY}
        for _, added in more:
            self.second += added
            self.totals += added
        return more

    def put(self, second: int) -> None:
        """Keep the figures since the last second, and begin another."""
        if self.gone is None or self.second.any():
            self.ring.put(second, self._row())
            if self.gpus:
                self.gpu_ring = self.gpu_ring or Ring(len(GPU_COLUMNS))
                self.gpu_ring.put(second, _gpu_figures(self.gpus))
        self.second = np.zeros(len(COLUMNS))

    def _row(self) -> tuple[float, ...]:
        seconds = self.second[len(SUMS) :]
        return float(self.second[0]), float(seconds[_COMPUTING]), float(seconds.sum()), self.private

    def history(self, since: int, pending: int | None = None) -> dict[str, Any]:
        """Figures of the seconds after that one, by name; those of cards where there are any.

        ``pending``: with what came after the last of them, as of that second.
        """
        seconds, columns = self.ring.since(since)
        told: dict[str, Any] = {"seconds": seconds, **dict(zip(DEVICE_COLUMNS, columns, strict=True))}
        if self.gpu_ring is not None:
            known, found = self.gpu_ring.since(since)
            for name, values in zip(GPU_COLUMNS, found, strict=True):
                of_second = {second: value for second, value in zip(known, values, strict=True) if value == value}
                told[name] = [of_second.get(second) for second in seconds]
        if pending is not None:
            row: dict[str, float | None] = dict(zip(DEVICE_COLUMNS, self._row(), strict=True))
            if self.gpus:
                figures = dict(zip(GPU_COLUMNS, _gpu_figures(self.gpus), strict=True))
                row |= {name: value if value == value else None for name, value in figures.items()}
            told = {name: [*values, pending if name == "seconds" else row.get(name)] for name, values in told.items()}
        return told

    def plain(self) -> dict[str, Any]:
        """All of it, in types that go over any wire."""
        return {
            "address": self.address,
            "name": self.name,
            "host": self.host,
            "totals": dict(zip(COLUMNS, self.totals.tolist(), strict=True)),
            "models": self.models,
            "private": self.private,
            "shared": self.shared,
            "seen": self.seen,
            "gone": self.gone,
            "gpus": self.gpus,
        }

    def told_stores(self) -> list[dict[str, Any]]:
        """What it tells of the stores of its machine, while it is there."""
        if self.gone is not None:
            return []
        who = {"device": self.address, "host": self.host}
        if isinstance(self.stores, str):
            return [{**who, "store": "stores", "sizes": {}, "holder": self.stores, "healthy": False}]
        return [{**who, **told} for told in self.stores]


def _gpu_figures(gpus: Any) -> tuple[float, float]:
    """Mean utilization and memory in use of a worker's cards; NaN where none tells."""
    cards = () if isinstance(gpus, str) else gpus
    used, memory = (
        [value for card in cards if not isinstance(value := card[name], str)] for name in ("utilization", "memory_used")
    )
    return sum(used) / len(used) if used else math.nan, sum(memory) if memory else math.nan
