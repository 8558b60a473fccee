"""What this process knows of the jobs that it computes itself, where no cluster has them: an `Observer` of its own.

Follows the graphs that Dask computes here, by a callback as Dask's progress bar is one, and the calls that are in no
graph, by the counters. Not for what a cluster computes (`observer`), nor for what is made of it (`reporting`).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from typing import Any

import dask
from dask.callbacks import Callback

from . import outcomes, telemetry
from .jobstate import Found, JobState, jobs_in
from .observer import METRIC, Observer, quietly
from .telemetry import Job


class _Process:
    """This process, as an `Observer` sees a worker."""

    def __init__(self) -> None:
        self.name, self.host = f"process {os.getpid()}", socket.gethostname()
        self.nthreads = len(os.sched_getaffinity(0))
        self.processing: tuple[Any, ...] = ()

    @property
    def metrics(self) -> dict[str, Any]:
        """What it would tell in a heartbeat."""
        return {METRIC: telemetry.snapshot()}


class _Scheduler:
    """What an `Observer` asks of a scheduler."""

    def __init__(self) -> None:
        self.workers = {"this process": _Process()}


class _Calls(JobState):
    """Calls of one model that are in no graph: how many there are is known when they are over."""

    def called(self, seconds: float, error: Exception | None) -> None:
        """Take note of one that has just ended."""
        now = time.time()
        self.begun = min(self.begun, now - seconds)
        self.total += 1
        self.counts["failed" if error else "done"] += 1
        self.last = self.ended = now
        if error is None:
            self._completions.append(now)
        else:
            self.erred("a call", str(error), "".join(traceback.format_exception(error)), now)


class LocalObserver(Callback):  # type: ignore[misc]
    """Follows what this process computes, from `__enter__` to `__exit__`.

    Any thread may call it. Of graphs that threads compute at the same time Dask's callbacks tell the first alone; of
    the others the calls of models are seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: set[str] = set()
        self._observer = Observer()
        self._observer.scheduler = _Scheduler()
        self._lock = threading.RLock()
        self._is_open = False
        # By task that is, or will be, computed: jobs that have blocks in it, and what they call these
        self._places: dict[Any, list[tuple[JobState, Any]]] = {}
        # Such tasks by job, and blocks of it that have failed in the graph that is computed
        self._tasks: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        # Jobs of graphs that have failed, of which other threads still compute what they had begun
        self._abandoned: set[str] = set()
        # By job whose blocks are computed one by one: what it calls those that no graph has had yet
        self._announced: dict[str, tuple[JobState, list[Any]]] = {}
        self._calls: dict[tuple[str, str], _Calls] = {}

    def __enter__(self) -> LocalObserver:
        self._observer.sample()
        self._observer.others.clear()
        self._is_open = True
        telemetry.followers.append(self._called)
        outcomes.followers.append(self._announce)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(None, None, None)
        self._is_open = False  # a graph that another thread computes may have kept the callback
        outcomes.followers.remove(self._announce)
        telemetry.followers.remove(self._called)

    def sample(self) -> None:
        """Put what was counted into a second of its own; to be called once a second."""
        with self._lock:
            self._observer.sample()

    def told(self, since: int = 0, whole: bool = False) -> dict[str, Any]:
        """As `Observer.snapshot`."""
        with self._lock:
            return self._observer.told(since, whole)

    # Calls that are in no graph

    @quietly
    def _called(self, job: Job, model: str, seconds: float, error: Exception | None) -> None:
        with self._lock:
            if self._tasks[job.key]:
                self._failures[job.key] += error is not None
            if self._tasks[job.key] or job.key in self._abandoned:
                return
            calls = self._calls.get((job.key, model))
            if calls is None:
                calls = self._calls[job.key, model] = _Calls(0, job, [model], {}, 0, time.time())
                self._observer.begin_submission()
                self._observer.keep(calls)
                # A second may have ended since it was counted
                self._observer.sums[calls.number] += self._observer.others.pop(job.key, 0)
            calls.called(seconds, error)

    # Graphs

    @quietly
    def _announce(self, array: Any) -> None:
        with self._lock:
            for state, left in self._announced.values():
                for place in left:
                    state.moved(place, "forgotten", time.time())
            self._announced = {}
            if array is not None:
                (optimised,) = dask.optimize(array)
                self._observer.begin_submission()
                for found in jobs_in(dict(optimised.__dask_graph__()).items()):
                    self._announced[found.job.key] = self._begin(found), list(found.blocks)

    def _begin(self, found: Found) -> JobState:
        state = JobState(0, found.job, list(found.models), found.blocks, found.before, time.time())
        self._observer.collect()
        self._observer.keep(state)
        return state

    @quietly
    def _start(self, graph: Mapping[Any, Any]) -> None:
        if not self._is_open:
            return
        with self._lock:
            self._failures.clear()
            self._observer.begin_submission()
            for found in jobs_in(graph.items()):
                state, left = self._announced.get(found.job.key) or (self._begin(found), list(found.blocks))
                for key in found.blocks:
                    self._places.setdefault(key, []).append((state, left.pop(0)))
                    self._tasks[found.job.key] += 1

    def _pretask(self, key: Any, *_: Any) -> None:
        self._move(key, "processing")

    def _posttask(self, key: Any, *_: Any) -> None:
        self._move(key, "memory")

    @quietly
    def _move(self, key: Any, finish: str) -> None:
        with self._lock:
            for state, place in self._places.get(key, ()):
                state.moved(place, finish, time.time())
            if finish != "processing":
                for state, _ in self._places.pop(key, ()):
                    self._tasks[state.job.key] -= 1

    @quietly
    def _finish(self, graph: Mapping[Any, Any], state: Mapping[str, Any], errored: bool) -> None:
        with self._lock:
            running = [key for key in self._places if key in state.get("running", ())]
            error = sys.exc_info()[1]
            if errored and isinstance(error, Exception):
                self._fail(running, error)
            self._abandoned |= {state.job.key for key in running for state, _ in self._places[key]}
            for key in [key for key in self._places if key in graph]:
                self._move(key, "forgotten")

    def _fail(self, running: list[Any], error: Exception) -> None:
        """Take those of the tasks that ran for failed that can be it: Dask does not tell which it was."""
        now, text = time.time(), "".join(traceback.format_exception(error))
        for key in running:
            for state, place in self._places[key]:
                if self._failures[state.job.key] > 0 or len(running) == 1:
                    self._failures[state.job.key] -= 1
                    state.erred(place, str(error), text, now)
                    state.moved(place, "erred", now)
