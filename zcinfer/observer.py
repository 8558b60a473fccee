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
from .devicestate import COLUMNS, HOUR, LATELY, SUMS, Device, Ring
from .jobstate import JobState, jobs_in
from .telemetry import REMEMBERED

log = logging.getLogger(__name__)

NAME, HANDLER, METRIC = "zcinfer-observer", "zcinfer_snapshot", "zcinfer"

# Jobs that have ended and are remembered; devices whose history is told.
ENDED, TOLD = 100, 64
_BLOCKS = COLUMNS.index("blocks")


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
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
    >>> client = Client(processes=False, dashboard_address=":0")
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
        # What was counted for each job, and for arrays of which no job is known
        self.sums: dict[int, np.ndarray] = {}
        self.others: dict[str, np.ndarray] = {}
        self.models: dict[tuple[str, str], dict[str, Any]] = {}
        self.ring = Ring(len(COLUMNS))
        self.begun = time.time()
        self.spent = 0.0
        # Jobs by task: a fused one may hold blocks of several.
        self._owners: dict[Any, list[JobState]] = {}
        self._number = self._submissions = self._second = 0
        # The times that the same arrays were computed, oldest first
        self._same: dict[str, list[JobState]] = {}

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

    @quietly
    def update_graph(self, scheduler: Any, *, tasks: list[Any], client: str = "", **_: Any) -> None:
        """Find the jobs of a new graph."""
        begin = time.perf_counter()
        known, now = scheduler.tasks, time.time()
        self.begin_submission()
        for found in jobs_in((key, known[key].run_spec) for key in tasks if key in known):
            state = JobState(0, found.job, list(found.models), found.blocks, found.before, now)
            self.keep(state, client)
            for key in found.blocks:
                self._owners[key] = [*(job for job in self._owners.get(key, ()) if job.ended is None), state]
                # Those that are there already, of arrays computed again while they are, are not to be run
                state.moved(key, known[key].state, now)
        self.spent += time.perf_counter() - begin

    def begin_submission(self) -> None:
        """Have the jobs that come now told as of one graph."""
        self._submissions += 1

    def keep(self, state: JobState, client: str = "") -> None:
        """Tell of a job from now on."""
        self._number += 1
        state.number, state.submission, state.client = self._number, self._submissions, client
        self.jobs[self._number] = state
        self.sums[self._number] = np.zeros(len(COLUMNS))
        self._same.setdefault(state.job.key, []).append(state)
        ended = [number for number, job in self.jobs.items() if job.ended is not None]
        for number in ended[:-ENDED]:
            gone = self.jobs.pop(number)
            del self.sums[number]
            self._same[gone.job.key].remove(gone)
            if not self._same[gone.job.key]:
                del self._same[gone.job.key]

    @quietly
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

    @quietly
    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        """Take note that a worker is gone."""
        if worker in self.devices:
            self.devices[worker].gone = time.time()

    @quietly
    def sample(self) -> None:
        """Take up what workers have counted, and put it into the rings; once a second."""
        begin = time.perf_counter()
        now = time.time()
        self.collect()
        # Each second once: a clock that is late by some milliseconds would else tick twice in the next one
        self._second = max(int(now), self._second + 1)
        self.ring.put(self._second, self._pending())
        for device in self.devices.values():
            device.put(self._second)
        gone = [a for a, device in self.devices.items() if device.gone is not None and now - device.gone > HOUR]
        for address in gone:
            del self.devices[address]
        # Those told last are last; a process tells of all that it remembers
        told = [(key, loads) for key, loads in self.models.items() if key[1] in self.devices]
        self.models = dict(told[-2 * REMEMBERED * len(self.devices) :] if self.devices else [])
        self.spent += time.perf_counter() - begin

    @quietly
    def collect(self) -> None:
        """Take up the counters that workers have sent."""
        now = time.time()
        for address, worker in self.scheduler.workers.items():
            counted = worker.metrics.get(METRIC)
            if not counted:
                continue
            device = self.devices.get(address)
            if device is None:
                device = self.devices[address] = Device(address, str(worker.name), worker.host)
            for job, added in device.take(counted, now):
                self._give(job, added)
            for failure in counted["failures"]:
                self._tell(failure)
            self._take_loads(device, counted["loads"])

    def _give(self, job: str, added: np.ndarray) -> None:
        """Share out what was counted for arrays among the times that they were computed.

        It comes by heartbeats, which know no times: the first gets as much as blocks were done in it.
        """
        same = self._same.get(job)
        if not same:
            self.others[job] = self.others.pop(job, 0) + added
            while len(self.others) > REMEMBERED:
                del self.others[next(iter(self.others))]
            return
        for state in same[:-1]:
            sums = self.sums[state.number]
            if state.ended is None:
                sums += added  # blocks that both wait for are computed once
                continue
            room = state.counts["done"] * len(state.models) - sums[_BLOCKS]
            if room <= 0:
                continue
            share = min(1.0, room / added[_BLOCKS]) if added[_BLOCKS] else 1.0
            part = added * share
            part[: len(SUMS)] = np.rint(part[: len(SUMS)])
            sums += part
            if share == 1.0:
                return
            added = added - part
        self.sums[same[-1].number] += added

    def _pending(self) -> np.ndarray:
        """What was counted since the last second was put into the rings."""
        total = np.zeros(len(COLUMNS))
        for device in self.devices.values():
            total += device.second
        return total

    def _tell(self, failure: dict[str, Any]) -> None:
        for job in self.jobs.values():
            if job.job.key == failure["job"] and job.counts["failed"]:
                job.told(failure["message"], failure["traceback"])

    def _take_loads(self, device: Device, loads: list[dict[str, Any]]) -> None:
        for loaded in loads:
            self.models.pop((loaded["model"], device.address), None)
            self.models[loaded["model"], device.address] = loaded

    async def snapshot(self, since: int = 0, whole: bool = False, **_: Any) -> dict[str, Any]:
        """All that is known, and the figures of the seconds after ``since``.

        Parameters
        ----------
        since : int
            Seconds since 1970.
        whole : bool
            Also what was counted since the last second, as a second of its own, which is told again when it is over.

        Returns
        -------
        dict
            ``now``, ``begun`` and ``spent`` (seconds that this took of the scheduler's); ``jobs``, each with its state,
            exact counts of blocks, errors, and sums of what workers counted for its arrays since it began; ``devices``;
            ``models``, by device; ``stores``, by device and host; ``seconds`` and ``columns``; ``history`` by device.
        """
        return self.told(since, whole)

    def told(self, since: int = 0, whole: bool = False) -> dict[str, Any]:
        """What `snapshot` answers."""
        self.collect()
        seconds, columns = self.ring.since(since)
        told = list(self.devices.values())[:TOLD]
        pending = self._second + 1 if whole else None
        if pending is not None:
            seconds = [*seconds, pending]
            columns = [[*values, last] for values, last in zip(columns, self._pending().tolist(), strict=True)]
        return {
            "now": time.time(),
            "begun": self.begun,
            "spent": self.spent,
            "threads": sum(worker.nthreads for worker in self.scheduler.workers.values()),
            "workers": len(self.scheduler.workers),
            "jobs": [
                job.plain() | {"sums": dict(zip(COLUMNS, self.sums[number].tolist(), strict=True))}
                for number, job in self.jobs.items()
            ],
            "devices": [device.plain() | self._work_of(device) for device in self.devices.values()],
            "models": [{"device": address, **loaded} for (_, address), loaded in self.models.items()],
            "stores": [told for device in self.devices.values() for told in device.told_stores()],
            "seconds": seconds,
            "columns": dict(zip(COLUMNS, columns, strict=True)),
            "history": {device.address: device.history(since, pending) for device in told},
        }

    def _work_of(self, device: Device) -> dict[str, Any]:
        """Tasks that a worker has now, and the jobs that it has them of, or had."""
        worker = self.scheduler.workers.get(device.address)
        owned = [found for task in worker.processing if (found := self._owners.get(task.key))] if worker else []
        now = {state.job.key for found in owned for state in found}
        lately = {job for job, at in device.jobs.items() if time.time() - at < LATELY}
        return {"running": len(owned), "jobs": sorted(now | lately)}


async def dask_setup(scheduler: Any) -> None:
    """For ``dask scheduler --preload zcinfer.observer``."""
    await scheduler.register_scheduler_plugin(Observer(), name=NAME, idempotent=True)
