"""What a scheduler knows of all jobs, models and devices of its cluster, and tells whoever asks.

A plugin: it follows the tasks of jobs (`jobstate`), takes up what workers count (`telemetry`) from their heartbeats
once a second, and answers ``zcinfer_snapshot``. It never raises into the scheduler. Not for pages, nor for what the
figures mean.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from distributed import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from . import prometheus
from .jobstate import Found, JobState, jobs_in
from .telemetry import PHASES, REMEMBERED

log = logging.getLogger(__name__)

NAME, HANDLER, METRIC = "zcinfer-observer", "zcinfer_snapshot", "zcinfer"

# Seconds that are remembered; jobs that have ended and are; devices whose history is told.
HOUR, ENDED, TOLD = 3600, 100, 64
# Seconds for which a device is said to work for a job after its last block.
LATELY = 60.0
_SUMS = ("rows", "blocks", "batches", "bytes_in", "bytes_out", "errors", "halved")
# Columns of a second: of the cluster, and of each device.
COLUMNS = (*_SUMS, *PHASES)
DEVICE_COLUMNS = ("rows", "computing", "busy", "private")


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
        self.second = np.zeros(len(COLUMNS))  # of the last second
        self.jobs: dict[str, float] = {}
        self.models: list[str] = []
        self.private = self.shared = 0
        self.seen = 0.0
        self.gone: float | None = None
        self.ring = Ring(len(DEVICE_COLUMNS))
        self._epoch = ""
        self._last: dict[tuple[str, str], Any] = {}

    def take(self, counted: dict[str, Any], now: float) -> list[tuple[str, np.ndarray]]:
        """Take up counters; what each job has more than before, by its key."""
        if counted["epoch"] != self._epoch:
            self._epoch, self._last = counted["epoch"], {}
        self.private, self.shared, self.seen = counted["private"], counted["shared"], now
        more = []
        for work in counted["work"]:
            key = (work["job"], work["model"])
            found = np.array([*(work[name] for name in _SUMS), *work["seconds"]])
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
        self.second = np.sum([added for _, added in more], axis=0) if more else np.zeros(len(COLUMNS))
        self.totals += self.second
        return more

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
        }


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Log what fails, and never let the scheduler feel it."""

    @wraps(function)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return function(self, *arguments, **keywords)
        except Exception:
            if function.__name__ not in self.failed:
                self.failed.add(function.__name__)
                log.exception("zcinfer's figures are incomplete: %s failed (told once)", function.__name__)

    return call


class Observer(SchedulerPlugin):  # type: ignore[misc]
    """The plugin. Register it as often as you like: there is one to a scheduler.

    Examples
    --------
    >>> from distributed import Client
    >>> client = Client(processes=False, dashboard_address=None)
    >>> client.register_plugin(Observer())
    >>> client.sync(client.scheduler.zcinfer_snapshot)["jobs"]
    []
    >>> client.close()
    """

    name = NAME
    idempotent = True

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.jobs: dict[int, JobState] = {}
        self.devices: dict[str, Device] = {}
        self.sums: dict[str, np.ndarray] = {}
        self.models: dict[tuple[str, str], dict[str, Any]] = {}
        self.ring = Ring(len(COLUMNS))
        self.begun = time.time()
        self.spent = 0.0
        # Jobs by task: a fused one may hold blocks of several.
        self._owners: dict[Any, list[JobState]] = {}
        self._number = self._submissions = 0
        # Of each submission: what was counted for its job before.
        self._before: dict[int, np.ndarray] = {}

    async def start(self, scheduler: Any) -> None:
        """Begin to watch; called once by the scheduler."""
        self.scheduler = scheduler
        scheduler.handlers[HANDLER] = self.snapshot
        prometheus.show_scheduler(self)
        self._clock = PeriodicCallback(self.sample, 1000)
        self._clock.start()

    async def close(self) -> None:
        """Stop watching."""
        self._clock.stop()

    def __reduce__(self) -> Any:
        return Observer, ()

    @_quietly
    def update_graph(self, scheduler: Any, *, tasks: list[Any], **_: Any) -> None:
        """Find the jobs of a new graph."""
        begin = time.perf_counter()
        known = scheduler.tasks
        self._submissions += 1
        for found in jobs_in((key, known[key].run_spec) for key in tasks if key in known):
            self._add(found, known)
        self.spent += time.perf_counter() - begin

    def _add(self, found: Found, known: Any) -> None:
        # Tasks that are there already, of arrays computed again while they are, are not to be run.
        now = time.time()
        self._number += 1
        state = JobState(self._number, found.job, list(found.models), found.blocks, found.before, now)
        state.submission = self._submissions
        self.jobs[self._number] = state
        self._before[self._number] = self.sums.get(found.job.key, np.zeros(len(COLUMNS)))
        for key in found.blocks:
            self._owners[key] = [*(job for job in self._owners.get(key, ()) if job.ended is None), state]
            state.moved(key, known[key].state, now)
        ended = [number for number, job in self.jobs.items() if job.ended is not None]
        for number in ended[:-ENDED]:
            del self.jobs[number], self._before[number]
        if ended[:-ENDED]:
            keys = {job.job.key for job in self.jobs.values()}
            self.sums = {key: sums for key, sums in self.sums.items() if key in keys}

    @_quietly
    def transition(self, key: Any, start: str, finish: str, *_: Any, **told: Any) -> None:
        """Follow a task of a job from state to state."""
        states = self._owners.get(key)
        if states is None:
            return
        now = time.time()
        task = self.scheduler.tasks.get(key)
        if finish == "erred":
            message = str(told.get("exception_text") or getattr(task, "exception_text", "") or "unknown")
            traceback = str(told.get("traceback_text") or getattr(task, "traceback_text", "") or "")
            for state in states:
                state.erred(key, message, traceback, now)
        # What came of a failure is kept while somebody holds the result; the other blocks nobody waits for any more
        given_up = finish == "released" and task is not None and not task.waiters and not task.who_wants
        for state in states:
            state.moved(key, "forgotten" if given_up else finish, now)
        if finish == "forgotten":
            del self._owners[key]

    @_quietly
    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        """Take note that a worker is gone."""
        if worker in self.devices:
            self.devices[worker].gone = time.time()

    @_quietly
    def sample(self) -> None:
        """Take up what workers have counted; once a second."""
        begin = time.perf_counter()
        now = time.time()
        second, total = int(now), np.zeros(len(COLUMNS))
        for address, worker in self.scheduler.workers.items():
            counted = worker.metrics.get(METRIC)
            if not counted:
                continue
            device = self.devices.get(address)
            if device is None:
                device = self.devices[address] = Device(address, str(worker.name), worker.host)
            for job, added in device.take(counted, now):
                self.sums[job] = self.sums.get(job, 0) + added
            for failure in counted["failures"]:
                self._tell(failure)
            total += device.second
            self._take_loads(device, counted["loads"])
            seconds = device.second[len(_SUMS) :]
            computing = seconds[PHASES.index("computing")]
            device.ring.put(second, (device.second[0], computing, seconds.sum(), device.private))
        self.ring.put(second, total)
        gone = [a for a, device in self.devices.items() if device.gone is not None and now - device.gone > HOUR]
        for address in gone:
            del self.devices[address]
        # Those told last are last; a process tells of all that it remembers
        told = [(key, loads) for key, loads in self.models.items() if key[1] in self.devices]
        self.models = dict(told[-2 * REMEMBERED * len(self.devices) :] if self.devices else [])
        self.spent += time.perf_counter() - begin

    def _tell(self, failure: dict[str, Any]) -> None:
        for job in self.jobs.values():
            if job.job.key == failure["job"] and job.counts["failed"]:
                job.told(failure["message"], failure["traceback"])

    def _take_loads(self, device: Device, loads: list[dict[str, Any]]) -> None:
        for loaded in loads:
            self.models.pop((loaded["model"], device.address), None)
            self.models[loaded["model"], device.address] = loaded

    async def snapshot(self, since: int = 0, **_: Any) -> dict[str, Any]:
        """All that is known, and the figures of the seconds after ``since``.

        Returns
        -------
        dict
            ``now``, ``begun`` and ``spent`` (seconds that this took of the scheduler's); ``jobs``, each with its state,
            exact counts of blocks, errors, and sums of what workers counted for its arrays since it began; ``devices``;
            ``models``, by device; ``seconds`` and ``columns``; ``history`` by device.
        """
        seconds, columns = self.ring.since(since)
        told = list(self.devices.values())[:TOLD]
        return {
            "now": time.time(),
            "begun": self.begun,
            "spent": self.spent,
            "threads": sum(worker.nthreads for worker in self.scheduler.workers.values()),
            "workers": len(self.scheduler.workers),
            "jobs": [job.plain() | {"sums": self._sums_of(job)} for job in self.jobs.values()],
            "devices": [device.plain() | self._work_of(device) for device in self.devices.values()],
            "models": [{"device": address, **loaded} for (_, address), loaded in self.models.items()],
            "seconds": seconds,
            "columns": dict(zip(COLUMNS, columns, strict=True)),
            "history": {device.address: _history(device, since) for device in told},
        }

    def _work_of(self, device: Device) -> dict[str, Any]:
        """Tasks that a worker has now, and the jobs that it has them of, or had."""
        worker = self.scheduler.workers.get(device.address)
        owned = [found for task in worker.processing if (found := self._owners.get(task.key))] if worker else []
        now = {state.job.key for found in owned for state in found}
        lately = {job for job, at in device.jobs.items() if time.time() - at < LATELY}
        return {"running": len(owned), "jobs": sorted(now | lately)}

    def _sums_of(self, job: JobState) -> dict[str, float]:
        before = self._before[job.number]
        return dict(zip(COLUMNS, (self.sums.get(job.job.key, before) - before).tolist(), strict=True))


def _history(device: Device, since: int) -> dict[str, Any]:
    seconds, columns = device.ring.since(since)
    return {"seconds": seconds, **dict(zip(DEVICE_COLUMNS, columns, strict=True))}


async def dask_setup(scheduler: Any) -> None:
    """For ``dask scheduler --preload zcinfer.observer``."""
    await scheduler.register_scheduler_plugin(Observer(), name=NAME, idempotent=True)
