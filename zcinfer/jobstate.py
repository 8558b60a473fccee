"""Jobs as the scheduler sees them: which tasks hold a job's blocks, and how far each of these is.

A job's blocks are counted by the tasks that were submitted and contain its predictor: so the total is exact from the
start, whatever Dask has fused or left out, and no retry counts twice. Not for what workers count (`telemetry`).
"""

from __future__ import annotations

import re
import sys
from collections import Counter, deque
from collections.abc import Iterable
from functools import partial
from typing import Any

from .telemetry import Job

# States of a task that still is to be run, by Dask's names for them.
_QUEUED = ("released", "waiting", "no-worker", "queued")

# Completions that the usual pace is taken from; messages and blocks of a message that are kept.
_PACE, _MESSAGES, _PLACES = 100, 50, 20
_PLACE = re.compile(r", of \S+@\d+$")


class JobState:
    """One submission of a job.

    Parameters
    ----------
    number : int
        Of the submission; the same arrays may be computed again.
    job : Job
    models : list of str
    blocks : dict of key to int
        Blocks that each task holds.
    before : int
        Blocks that an earlier run has done.
    now : float
        ``time.time()``.
    """

    def __init__(self, number: int, job: Job, models: list[str], blocks: dict[Any, int], before: int, now: float):
        self.number, self.job, self.models, self.before = number, job, models, before
        self.begun = now
        self.submission = 0  # of the graph; one may hold several jobs
        self.client = ""  # who has submitted it
        self.ended: float | None = None
        self.last: float | None = None
        self.total = sum(blocks.values())
        self.counts = Counter(queued=self.total)
        # Blocks that went to a worker more than once, each counted once; and those of them that are done
        self.retried = self.done_again = 0
        self.errors: dict[str, dict[str, Any]] = {}
        self._blocks = blocks
        self._state = dict.fromkeys(blocks, "queued")
        self._completions: deque[float] = deque(maxlen=_PACE)
        self._sent: set[Any] = set()
        self._again: set[Any] = set()

    def moved(self, key: Any, finish: str, now: float) -> None:
        """Take note that a task of this job is in another of Dask's states."""
        before = self._state.get(key, "done")
        if finish == "processing" and key in self._state:
            self._sent_to_worker(key, before)
        if before == "done":
            return  # a result that was lost, and is computed again, was counted
        if finish == "memory":
            after = "done"
        elif finish == "erred":
            after = "failed"
        elif finish == "processing":
            after = "running"
        elif finish == "forgotten":
            after = before if before == "failed" else "cancelled"
        else:
            after = "queued" if finish in _QUEUED and before != "failed" else before
        if after == before:
            return
        blocks = self._blocks[key]
        self.counts[before] -= blocks
        self.counts[after] += blocks
        self._state[key] = after
        if after == "done":
            self.done_again += blocks if key in self._again else 0
            self.last = now
            self._completions.append(now)
        if not self.counts["queued"] and not self.counts["running"]:
            self.ended = now
            self._blocks, self._state, self._sent, self._again = {}, {}, set(), set()

    def _sent_to_worker(self, key: Any, before: str) -> None:
        # Also where a worker was lost with the result: such blocks are done, and stay so. Those that another worker
        # takes over before they begin do not pass through here.
        if key in self._sent and key not in self._again:
            self._again.add(key)
            self.retried += self._blocks[key]
            self.done_again += self._blocks[key] if before == "done" else 0
        self._sent.add(key)

    def erred(self, key: Any, message: str, traceback: str, now: float) -> None:
        """Take note of an error; those of the same cause, in whatever block, are one."""
        place, cause = in_two(message)
        found = self._error(cause, traceback)
        if found is not None:
            found["count"] += 1
            found["last"] = now
            if len(found["places"]) < _PLACES:
                found["places"].append(place or str(key))

    def told(self, message: str, traceback: str) -> None:
        """Take note of where an error came from, as the worker knows it: Dask tells no causes."""
        found = self._error(in_two(message)[1], traceback)
        if found is not None:
            found["traceback"] = traceback

    def _error(self, cause: str, traceback: str) -> dict[str, Any] | None:
        if cause not in self.errors and len(self.errors) < _MESSAGES:
            self.errors[cause] = {"message": cause, "traceback": traceback, "count": 0, "places": [], "last": None}
        return self.errors.get(cause)

    @property
    def state(self) -> str:
        """One of "waiting" (nothing has run yet), "running", "finished", "failed" and "cancelled"."""
        if self.ended is None:
            return "running" if self.counts["running"] or self.counts["done"] else "waiting"
        if self.counts["failed"]:
            return "failed"
        return "finished" if self.counts["done"] == self.total else "cancelled"

    @property
    def seconds_a_block(self) -> float | None:
        """Seconds between the last blocks that were done; None before there are two."""
        if len(self._completions) < 2:
            return None
        return (self._completions[-1] - self._completions[0]) / (len(self._completions) - 1)

    def plain(self) -> dict[str, Any]:
        """All of it, in types that go over any wire."""
        counts = {name: self.counts[name] for name in ("queued", "running", "done", "failed", "cancelled")}
        return {
            "number": self.number,
            "submission": self.submission,
            "client": self.client,
            "job": self.job.key,
            "name": self.job.name,
            "models": self.models,
            "state": self.state,
            "total": self.total,
            "before": self.before,
            **counts,
            "retried": self.retried,
            "done_again": self.done_again,
            "begun": self.begun,
            "ended": self.ended,
            "last": self.last,
            "seconds_a_block": self.seconds_a_block,
            "errors": list(self.errors.values()),
        }


class Found:
    """What a graph holds of one job: its models, the blocks in each task, and how many an earlier run has done."""

    def __init__(self, job: Job):
        self.job = job
        self.models: dict[str, None] = {}
        self.blocks: dict[Any, int] = {}
        self.before = 0


def in_two(message: str) -> tuple[str, str]:
    """Place and cause that an error of ours tells: "block 3, rows 6-7, of m@1: ValueError: ..."."""
    text = re.sub(r"^\w+\((['\"])(.*)\1\)$", r"\2", message, flags=re.DOTALL)  # as `repr` has it
    place, found, cause = text.partition(": ")
    return (place, cause) if found and _PLACE.search(place) else ("", text)


def jobs_in(tasks: Iterable[tuple[Any, Any]]) -> list[Found]:
    """Jobs in the tasks of a graph.

    Parameters
    ----------
    tasks : iterable of (key, task)
        As they are run.
    """
    if "zcinfer.predictor" not in sys.modules:
        return []  # no task holds what was never unpickled here
    found: dict[str, Found] = {}
    # Tasks of one layer share what they run.
    seen: dict[int, list[tuple[str, Any]]] = {}
    for key, task in tasks:
        held: dict[str, int] = {}
        before = 0
        for kind, what in _inside(task, seen):
            if kind == "before":
                before = what
                continue
            job, models = what
            of_job = found.setdefault(job.key, Found(job))
            of_job.models.update(dict.fromkeys(models))
            held[job.key] = held.get(job.key, 0) + 1
        for name, blocks in held.items():
            found[name].blocks[key] = blocks
            found[name].before = max(found[name].before, before)
    return list(found.values())


def _inside(node: Any, seen: dict[int, list[tuple[str, Any]]]) -> list[tuple[str, Any]]:
    """What a task holds of ours: ("job", (job, models)) for each block, and ("before", number) of a job that writes.

    ``seen`` is of dictionaries and functions, by their ids, which live as long as the graph.
    """
    if isinstance(node, dict):
        known = seen.get(id(node))
        if known is None:
            known = seen[id(node)] = [what for value in node.values() for what in _inside(value, seen)]
        return known
    function = getattr(node, "func", None)
    if function is None:
        function = getattr(node, "value", None)
    held = seen.get(id(function)) if function is not None else _NONE
    if held is None:
        held = seen[id(function)] = _ours(function)
    for part in getattr(node, "args", ()):
        if isinstance(part, dict) or hasattr(part, "dependencies"):
            more = _inside(part, seen)
            held = [*held, *more] if more else held
    return held


_NONE: list[tuple[str, Any]] = []


def _ours(function: Any) -> list[tuple[str, Any]]:
    from .predictor import Predictor

    if isinstance(function, Predictor):
        return [("job", _job_of([function]))]
    if isinstance(function, partial):
        name = getattr(function.func, "__qualname__", "")
        if name == "write_block" and function.func.__module__ == f"{__package__}.target":
            return [("before", function.keywords.get("before", 0))]
        if name == "_run_block" and function.func.__module__ == f"{__package__}.arrays":
            model = function.args[0]
            several = getattr(model, "predictors", [model])
            return [("job", _job_of(list(several.values() if isinstance(several, dict) else several)))]
    return _NONE


def _job_of(predictors: list[Any]) -> tuple[Job, list[str]]:
    jobs = [predictor.counted_as for predictor in predictors]
    models = [str(predictor.ref) for predictor in predictors]
    names = dict.fromkeys(job.name for job in jobs)
    return Job(jobs[0].key, ", ".join(names)), models
