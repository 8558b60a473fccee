"""What a page knows: the last hour of a cluster, fed by the snapshots of its scheduler.

One for a whole process, whoever looks at it; or fed from a record, for a report. Knows no scheduler, and no HTML.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from zcinfer.devicestate import COLUMNS, HOUR

from .runs import Run, runs
from .tracks import Row, Track, append, mean

__all__ = ["History"]

# Seconds over which the pace of blocks is taken
_PACE = 120.0
# Seconds for which a device that has gone is still shown
_GONE = 600.0


class History:
    """All that a page knows.

    Parameters
    ----------
    address : str
        Of the scheduler, as shown.

    Attributes
    ----------
    now : float or None
        Of the last snapshot, on the scheduler's clock; None before the first.
    problem : str or None
        Why there is no connection.
    sequence : int
        Grows with every change; a page that has seen one asks for what came after.
    seconds : deque of int
    rows : deque of tuple of float
        For each second, by `zcinfer.devicestate.COLUMNS`.
    devices : dict of str to Track
        By the worker's address.
    runs : list of Run
        Oldest first.
    names : dict of str to str
        Of jobs, by their keys.
    models : list of dict
        Loads of each model on each device, as the snapshot has them.
    stores : list of dict
        Stores of each machine, as the snapshot has them.
    links : dict of str to str
        To other pages, by their names.
    """

    def __init__(self, address: str):
        self.address = address
        self.now: float | None = None
        self.problem: str | None = None
        self.sequence = 0
        self.seconds: deque[int] = deque(maxlen=HOUR)
        self.rows: deque[Row] = deque(maxlen=HOUR)
        self.devices: dict[str, Track] = {}
        self.runs: list[Run] = []
        self.names: dict[str, str] = {}
        self.models: list[Mapping[str, Any]] = []
        self.stores: list[Mapping[str, Any]] = []
        self.workers = self.threads = 0
        self.links: dict[str, str] = {}
        self._begun: float | None = None
        self._past: list[Run] = []
        self._paces: dict[tuple[Any, ...], deque[tuple[float, int]]] = {}

    @classmethod
    def of(cls, snapshots: Iterable[Mapping[str, Any]], address: str = "a record") -> History:
        """History of recorded snapshots."""
        history = cls(address)
        for snapshot in snapshots:
            history.take(snapshot)
        return history

    @property
    def last_second(self) -> int:
        """The newest second that is known: what to ask the scheduler for is what came after."""
        return self.seconds[-1] if self.seconds else 0

    def take(self, snapshot: Mapping[str, Any]) -> None:
        """Take up an answer of `zcinfer.observer.Observer.snapshot`."""
        if self._begun is not None and snapshot["begun"] != self._begun:
            # Another scheduler in its place; nobody will say more of what the last one had.
            self._past += [replace(run, state="lost", ended=self.now) if run.active else run for run in self.runs]
            self._past = self._past[-100:]
            self.devices = {}
        self._begun, self.now, self.problem = snapshot["begun"], snapshot["now"], None
        now = snapshot["now"]
        self.workers, self.threads = snapshot["workers"], snapshot["threads"]
        past = [run for run in self._past if run.key[0] != self._begun]
        self.runs = past + runs(snapshot["jobs"], snapshot["begun"])
        self.names = {job["job"]: job["name"] for job in snapshot["jobs"]}
        self.models = list(snapshot["models"])
        self.stores = list(snapshot["stores"])
        append(self.seconds, self.rows, snapshot["seconds"], [snapshot["columns"][name] for name in COLUMNS])
        for plain in snapshot["devices"]:
            track = self.devices.setdefault(plain["address"], Track(plain))
            track.take(plain, snapshot["history"].get(plain["address"]), now)
        told = {plain["address"] for plain in snapshot["devices"]}
        self.devices = {
            address: track
            for address, track in self.devices.items()
            if address in told and (track.plain["gone"] is None or now - track.plain["gone"] < _GONE)
        }
        for run in self.runs:
            if run.active:
                pace = self._paces.setdefault(run.key, deque())
                pace.append((now, run.done))
                while len(pace) > 2 and pace[1][0] <= now - _PACE:
                    pace.popleft()
            else:
                self._paces.pop(run.key, None)
        self.sequence += 1

    def lose(self, problem: str) -> None:
        """Take note that the scheduler does not answer."""
        if problem != self.problem:
            self.problem = problem
            self.sequence += 1

    @property
    def active(self) -> list[Run]:
        """Runs of which something is still to be done."""
        return [run for run in self.runs if run.active]

    @property
    def present(self) -> list[Track]:
        """Devices that are there."""
        return [track for track in self.devices.values() if track.plain["gone"] is None]

    def rate(self, seconds: float) -> float:
        """Rows a second over the last seconds, or since the first of them in which there was a row."""
        return 0.0 if self.now is None else mean(self.seconds, self.rows, COLUMNS.index("rows"), self.now, seconds)

    def left(self, run: Run) -> float | None:
        """Seconds until it is done, at its pace of the last minutes; None where there is none yet."""
        pace = self._paces.get(run.key)
        if pace is None or self.now is None or not run.done:
            return None
        (begin, before), (end, after) = pace[0], pace[-1]
        if end - begin < 5:  # the page is younger than the pace
            begin, before = run.begun, 0
        if after == before:
            return None
        return (run.running + run.queued) * (end - begin) / (after - before)
