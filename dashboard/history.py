"""What a page knows: the last hour of a cluster, fed by the snapshots of its scheduler.

One for a whole process, whoever looks at it; or fed from a record, for a report. Knows no scheduler, and no HTML.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zcinfer.observer import COLUMNS, DEVICE_COLUMNS, HOUR
from zcinfer.telemetry import PHASES

__all__ = ["History", "Run", "Track"]

MINUTE = 60.0
# Seconds over which the pace of blocks is taken
_PACE = 120.0
# Seconds for which a device that has gone is still shown
_GONE = 600.0

_COUNTS = ("total", "before", "done", "running", "queued", "failed", "cancelled", "retried")
ACTIVE = ("waiting", "running")


@dataclass(frozen=True)
class Run:
    """What a person calls a job: the predictions of one name that were submitted together.

    Attributes
    ----------
    key : tuple
        The same in every snapshot.
    name : str
    models : tuple of str
    state : str
        "waiting", "running", "finished", "failed", "cancelled"; or "lost", with a scheduler that was.
    total, before, done, running, queued, failed, cancelled, retried : int
        Blocks.
    begun : float
    ended, last : float or None
        Seconds since 1970, on the scheduler's clock; ``last``: of the last block.
    usual : float or None
        Seconds from one block to the next; not under what a block takes.
    sums : dict of str to float
        What was counted for it, by `zcinfer.observer.COLUMNS`.
    errors : tuple of dict
    """

    key: tuple[Any, ...]
    name: str
    models: tuple[str, ...]
    state: str
    total: int
    before: int
    done: int
    running: int
    queued: int
    failed: int
    cancelled: int
    retried: int
    begun: float
    ended: float | None
    last: float | None
    usual: float | None
    sums: dict[str, float] = field(hash=False)
    errors: tuple[dict[str, Any], ...] = field(hash=False)

    @property
    def active(self) -> bool:
        """Whether anything of it is still to be run."""
        return self.state in ACTIVE


def runs(jobs: Iterable[Mapping[str, Any]], begun: float) -> list[Run]:
    """Jobs of a snapshot, those put together that a person calls one; oldest first."""
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for job in jobs:
        together.setdefault((begun, job["submission"], job["name"]), []).append(job)
    return sorted((_one(key, parts) for key, parts in together.items()), key=lambda run: run.begun)


def _one(key: tuple[Any, ...], parts: list[Mapping[str, Any]]) -> Run:
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    seen = set()
    for part in parts:
        counts.update({name: part[name] for name in _COUNTS})
        if part["job"] not in seen:  # arrays that are in the graph twice are counted together
            sums.update(part["sums"])
            seen.add(part["job"])
    ended = [part["ended"] for part in parts]
    last = [part["last"] for part in parts if part["last"] is not None]
    between = [part["seconds_a_block"] for part in parts if part["seconds_a_block"] is not None]
    if sums["blocks"]:
        between.append(sum(sums[phase] for phase in PHASES) / sums["blocks"])
    states = {part["state"] for part in parts}
    if None in ended:
        state = "running" if states - {"waiting"} else "waiting"
    else:
        state = next(state for state in ("failed", "cancelled", "finished") if state in states)
    return Run(
        key=key,
        name=parts[0]["name"],
        models=tuple(dict.fromkeys(model for part in parts for model in part["models"])),
        state=state,
        **{name: counts[name] for name in _COUNTS},
        begun=min(part["begun"] for part in parts),
        ended=None if None in ended else max(ended),
        last=max(last, default=None),
        usual=max(between, default=None),
        sums=dict(sums),
        errors=tuple(error for part in parts for error in part["errors"]),
    )


class Track:
    """The last hour of one device.

    Attributes
    ----------
    plain : dict
        What the last snapshot said of it.
    seconds : deque of int
    rows : deque of tuple of float
        For each second, by `zcinfer.observer.DEVICE_COLUMNS`.
    """

    def __init__(self, plain: Mapping[str, Any]):
        self.plain = plain
        self.seconds: deque[int] = deque(maxlen=HOUR)
        self.rows: deque[tuple[float, ...]] = deque(maxlen=HOUR)
        self._totals: deque[tuple[float, Mapping[str, float]]] = deque()

    def take(self, plain: Mapping[str, Any], history: Mapping[str, Any] | None, now: float) -> None:
        """Take up what a snapshot says of it."""
        self.plain = plain
        self._totals.append((now, plain["totals"]))
        while len(self._totals) > 2 and self._totals[1][0] <= now - MINUTE:
            self._totals.popleft()
        if history is not None:
            _append(self.seconds, self.rows, history["seconds"], [history[name] for name in DEVICE_COLUMNS])

    def mean(self, column: str, now: float, seconds: float) -> float:
        """Mean of a column over the last seconds, or since the first of them that has any."""
        return _mean(self.seconds, self.rows, DEVICE_COLUMNS.index(column), now, seconds)

    def binned(self, column: str, now: float, seconds: float, bins: int) -> list[float]:
        """Means of a column over equal parts of the last seconds, oldest first."""
        number, width = DEVICE_COLUMNS.index(column), seconds / bins
        sums = [0.0] * bins
        known = [0] * bins
        for second, row in zip(reversed(self.seconds), reversed(self.rows), strict=True):
            place = bins - 1 - int((now - second) / width)
            if place < 0:
                break
            if place < bins:
                sums[place] += row[number]
                known[place] += 1
        return [total / max(1, many) for total, many in zip(sums, known, strict=True)]

    def phases(self) -> tuple[dict[str, float], bool]:
        """Seconds by phase of the last minute, and True; where nothing was done in it, of all its time, and False."""
        first, last = self._totals[0][1], self._totals[-1][1]
        lately = {phase: max(0.0, last[phase] - first[phase]) for phase in PHASES}
        if sum(lately.values()) > 0:
            return lately, True
        return {phase: last[phase] for phase in PHASES}, False


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
        For each second, by `zcinfer.observer.COLUMNS`.
    devices : dict of str to Track
        By the worker's address.
    runs : list of Run
        Oldest first.
    names : dict of str to str
        Of jobs, by their keys.
    models : list of dict
        Loads of each model on each device, as the snapshot has them.
    links : dict of str to str
        To other pages, by their names.
    """

    def __init__(self, address: str):
        self.address = address
        self.now: float | None = None
        self.problem: str | None = None
        self.sequence = 0
        self.seconds: deque[int] = deque(maxlen=HOUR)
        self.rows: deque[tuple[float, ...]] = deque(maxlen=HOUR)
        self.devices: dict[str, Track] = {}
        self.runs: list[Run] = []
        self.names: dict[str, str] = {}
        self.models: list[Mapping[str, Any]] = []
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
        _append(self.seconds, self.rows, snapshot["seconds"], [snapshot["columns"][name] for name in COLUMNS])
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
        return 0.0 if self.now is None else _mean(self.seconds, self.rows, COLUMNS.index("rows"), self.now, seconds)

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


def _append(seconds: deque[int], rows: deque[tuple[float, ...]], new: Iterable[int], columns: list[Any]) -> None:
    last = seconds[-1] if seconds else 0
    for second, *row in zip(new, *columns, strict=True):
        if second > last:
            seconds.append(second)
            rows.append(tuple(row))


def _mean(seconds: deque[int], rows: deque[tuple[float, ...]], column: int, now: float, span: float) -> float:
    # A second holds what was counted up to its sample, which came during it
    total, first = 0.0, None
    for second, row in zip(reversed(seconds), reversed(rows), strict=True):
        if second <= now - span:
            break
        if row[column]:
            total, first = total + row[column], second
    return 0.0 if first is None else total / min(span, max(1.0, int(now) - first + 1))
