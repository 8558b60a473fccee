"""What a scheduler knows of all jobs, models and devices of its cluster, and tells whoever asks.

A plugin: it follows the tasks of jobs (`jobstate`), takes up what workers count (`telemetry`) from their heartbeats
once a second (`devicestate`), and answers ``zcinfer_snapshot``. It never raises into the scheduler. Not for pages, nor
for what the figures mean.
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
from .devicestate import COLUMNS, HOUR, LATELY, Device, Ring
from .jobstate import Found, JobState, jobs_in
from .telemetry import REMEMBERED

log = logging.getLogger(__name__)

NAME, HANDLER, METRIC = "zcinfer-observer", "zcinfer_snapshot", "zcinfer"

# Jobs that have ended and are remembered; devices whose history is told.
ENDED, TOLD = 100, 64


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
            device.put(second)
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
            ``models``, by device; ``stores``, by device and host; ``seconds`` and ``columns``; ``history`` by device.
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
            "stores": [told for device in self.devices.values() for told in device.told_stores()],
            "seconds": seconds,
            "columns": dict(zip(COLUMNS, columns, strict=True)),
            "history": {device.address: device.history(since) for device in told},
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


async def dask_setup(scheduler: Any) -> None:
    """For ``dask scheduler --preload zcinfer.observer``."""
    await scheduler.register_scheduler_plugin(Observer(), name=NAME, idempotent=True)
