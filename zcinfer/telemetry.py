"""Counters of this process: what its models did, where the time went, how they were loaded. Always on, and cheap.

Code that works counts here and knows nobody who reads; who reads takes a `snapshot`. Counters only grow, so that a
reader who misses one loses nothing. Works without Dask. Not for sums over processes (`observer`), nor for pages.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

from . import config
from .memory import process_memory

# Where the seconds of a block go: until its input is there; until a module is; rows made ready; copied to the device;
# waiting for a core; forward; copied back; written. On the CPU "copying" is the making of tensors and arrays.
PHASES = ("reading", "model", "preparing", "to_device", "waiting", "computing", "from_device", "writing")
_READING, _WRITING = PHASES.index("reading"), PHASES.index("writing")
_COMPUTING = PHASES.index("computing")

# Those of a load; "connect" and "import" are paid once a process.
LOAD_PHASES = ("connect", "import", "fetch", "map", "join", "to device", "first batch")
_FIRST_BATCH = LOAD_PHASES.index("first batch")

# How a module was had: over shared memory; mostly of this process's own (programs); from the archive, since the store
# had died; one that was there.
KINDS = ("zero-copy", "private", "from disk", "resident hit")

# Upper bounds of the histograms, in seconds: 0.1 ms to 14 minutes, each twice the one before.
BOUNDS = tuple(1e-4 * 2**power for power in range(24))

# Pairs of job and model, and models, that are remembered (the ones used least recently go); failures, and characters
# of each.
REMEMBERED, _FAILURES, _CHARACTERS = 100, 20, 4000


class Job(NamedTuple):
    """What a block belongs to: one prediction over arrays, by a key that all its blocks carry, and its name."""

    key: str
    name: str


@dataclass
class Work:
    """What one model has done for one job in this process.

    Attributes
    ----------
    job : Job
    model : str
        "name@version".
    rows, blocks, batches, bytes_in, bytes_out : int
    errors : int
        Blocks that failed.
    halved : int
        Batches that did not fit into memory, and were cut in halves.
    seconds : list of float
        One for each of `PHASES`.
    histogram : list of int
        Blocks by their seconds in all: up to each of `BOUNDS`, and beyond.
    """

    job: Job
    model: str
    rows: int = 0
    blocks: int = 0
    batches: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    errors: int = 0
    halved: int = 0

    def __post_init__(self) -> None:
        self.seconds = [0.0] * len(PHASES)
        self.histogram = [0] * (len(BOUNDS) + 1)
        self.touched = time.time()

    def plain(self) -> dict[str, Any]:
        """All counters, in types that go over any wire."""
        return {
            "job": self.job.key,
            "name": self.job.name,
            "model": self.model,
            **{name: getattr(self, name) for name in _COUNTED},
            "seconds": list(self.seconds),
            "histogram": list(self.histogram),
        }


_COUNTED = ("rows", "blocks", "batches", "bytes_in", "bytes_out", "errors", "halved")


class Loads:
    """How one model was loaded in this process.

    Attributes
    ----------
    counts : list of int
        One for each of `KINDS`.
    seconds : list of float
        One for each of `LOAD_PHASES`, over all loads.
    histograms : dict of str to list of int
        Loads by their seconds, for each of `KINDS` but hits.
    shared, private : int
        Bytes of the last load.
    evicted : int
        Modules dropped for want of room, or since they were written to.
    """

    def __init__(self, model: str):
        self.model = model
        self.counts = [0] * len(KINDS)
        self.seconds = [0.0] * len(LOAD_PHASES)
        self.histograms: dict[str, list[int]] = {}
        self.shared = self.private = self.evicted = 0

    def plain(self) -> dict[str, Any]:
        """All counters, in types that go over any wire."""
        return {
            "model": self.model,
            "counts": list(self.counts),
            "seconds": list(self.seconds),
            "histograms": {kind: list(histogram) for kind, histogram in self.histograms.items()},
            "shared": self.shared,
            "private": self.private,
            "evicted": self.evicted,
        }


class Span(NamedTuple):
    """A stretch of time of one block, for `trace`; seconds of `time.perf_counter`."""

    thread: int
    job: str
    where: str
    phase: str
    begin: float
    end: float


class Clock:
    """Says where the time of one block goes: each `lap` ends a phase, and begins the next.

    Counts for itself, in one thread; what it has is added to the process's counters when the block ends.
    """

    __slots__ = ("_last", "batches", "first_batch", "halved", "job", "seconds", "where")

    def __init__(self, job: Job, where: str):
        self.job = job
        self.where = where
        self.seconds = [0.0] * len(PHASES)
        self.batches = self.halved = 0
        self.first_batch: Loads | None = None
        self._last = perf_counter()

    def lap(self, phase: int) -> None:
        """End a phase, of `PHASES` by number."""
        now = perf_counter()
        self.seconds[phase] += now - self._last
        if self.first_batch is not None and phase == _COMPUTING:
            self.first_batch.seconds[_FIRST_BATCH] += now - self._last
            self.first_batch = None
        if _spans is not None:
            _spans.append(Span(threading.get_ident(), self.job.key, self.where, PHASES[phase], self._last, now))
        self._last = now


_works: OrderedDict[tuple[str, str], Work] = OrderedDict()
_loads: OrderedDict[str, Loads] = OrderedDict()
# The last blocks that failed, as they are told.
_failures: deque[dict[str, Any]] = deque(maxlen=_FAILURES)
_lock = threading.Lock()
_spans: deque[Span] | None = None
# Of this process: counters of another one under the same address begin anew.
_epoch = f"{os.getpid()}-{time.time_ns()}"


# Called after each block that was counted, in its thread: its job and model, its seconds, and how it failed.
followers: list[Callable[[Job, str, float, Exception | None], object]] = []


class _Here(threading.local):
    clock: Clock | None = None
    work: Work | None = None
    charged: float = 0.0


_here = _Here()


def is_on() -> bool:
    """Whether anything is counted: setting ``zcinfer.telemetry``."""
    return bool(config.get("telemetry"))


@contextmanager
def block(job: Job, model: str, where: str, rows: int, bytes_in: int, bytes_out: int) -> Iterator[Clock]:
    """Count a block; yields its clock.

    Parameters
    ----------
    job : Job
    model : str
        "name@version".
    where : str
        What to call the block.
    rows, bytes_in, bytes_out : int
        Counted if it does not fail.

    Notes
    -----
    Within another block of this thread it is part of that one.
    """
    if _here.clock is not None:
        yield _here.clock
        return
    clock = Clock(job, where)
    if not is_on():
        yield clock
        return
    waited = _waited_for_input()
    clock.seconds[_READING] = waited
    if _spans is not None and waited:
        _spans.append(Span(threading.get_ident(), job.key, where, "reading", clock._last - waited, clock._last))
    _here.clock = clock
    failed, failure = True, None
    try:
        yield clock
        failed = False
    except Exception as error:
        failure = error
        text = "".join(traceback.format_exception(error))[-_CHARACTERS:]
        with _lock:
            _failures.append({"job": job.key, "message": str(error), "traceback": text, "time": time.time()})
        raise
    finally:
        _here.clock = None
        with _lock:
            work = _here.work = _work(job, model)
            work.batches += clock.batches
            work.halved += clock.halved
            for number, seconds in enumerate(clock.seconds):
                work.seconds[number] += seconds
            if failed:
                work.errors += 1
            else:
                work.blocks += 1
                work.rows += rows
                work.bytes_in += bytes_in
                work.bytes_out += bytes_out
                work.histogram[bisect_left(BOUNDS, sum(clock.seconds))] += 1
        for follow in followers:
            follow(job, model, sum(clock.seconds), failure)


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Count the time that the output of this thread's last block takes to be written."""
    begin = perf_counter()
    try:
        yield
    finally:
        end, work = perf_counter(), _here.work
        if work is not None and is_on():
            with _lock:
                work.seconds[_WRITING] += end - begin
            if _spans is not None:
                _spans.append(Span(threading.get_ident(), work.job.key, where, "writing", begin, end))


def count_load(model: str, kind: str, seconds: dict[str, float], shared: int, private: int) -> None:
    """Count a load: ``seconds`` by `LOAD_PHASES`, bytes mapped and bytes of this process's own."""
    if not is_on():
        return
    with _lock:
        loads = _loads_of(model)
        loads.counts[KINDS.index(kind)] += 1
        loads.shared, loads.private = shared, private
        took = 0.0
        for phase, value in seconds.items():
            loads.seconds[LOAD_PHASES.index(phase)] += value
            took += 0 if phase in ("connect", "import") else value
        histogram = loads.histograms.setdefault(kind, [0] * (len(BOUNDS) + 1))
        histogram[bisect_left(BOUNDS, took)] += 1
    if _here.clock is not None:
        _here.clock.first_batch = loads


def count_hit(model: str) -> None:
    """Count that a module was there."""
    if is_on():
        with _lock:
            _loads_of(model).counts[KINDS.index("resident hit")] += 1


def count_evicted(model: str) -> None:
    """Count that a module was dropped."""
    if is_on():
        with _lock:
            _loads_of(model).evicted += 1


def snapshot(since: float = 0.0) -> dict[str, Any]:
    """All counters of this process, in types that go over any wire.

    Parameters
    ----------
    since : float
        Leave out jobs of which nothing was counted after that time (``time.time()``), and failures before it.
    """
    with _lock:
        now = time.time()
        work = [work.plain() for work in _works.values() if work.touched >= since]
        loads = [loads.plain() for loads in _loads.values()]
        failures = [failure for failure in _failures if failure["time"] >= since]
    memory = process_memory()
    return {
        "epoch": _epoch,
        "time": now,
        "work": work,
        "loads": loads,
        "failures": failures,
        "private": memory.private,
        "shared": memory.shared,
    }


@contextmanager
def trace(most: int = 100_000) -> Iterator[deque[Span]]:
    """Record what each block of this process does when, as long as the context lasts; yields the spans."""
    global _spans
    spans: deque[Span] = deque(maxlen=most)
    _spans = spans
    try:
        yield spans
    finally:
        _spans = None


def _work(job: Job, model: str) -> Work:
    key = (job.key, model)
    work = _works.get(key)
    if work is None:
        work = _works[key] = Work(job, model)
        while len(_works) > REMEMBERED:
            _works.popitem(last=False)
    _works.move_to_end(key)
    work.touched = time.time()
    return work


def _loads_of(model: str) -> Loads:
    loads = _loads.get(model)
    if loads is None:
        loads = _loads[model] = Loads(model)
        while len(_loads) > REMEMBERED:
            _loads.popitem(last=False)
    _loads.move_to_end(model)
    return loads


def _waited_for_input() -> float:
    """Seconds since the Dask task began that this thread is in: what it has read, and made of it, before the model.

    Counted for the first model of a task alone.
    """
    begin = _task_began()
    if begin is None or begin == _here.charged:
        return 0.0
    _here.charged = begin
    return max(0.0, time.time() - begin)


def _task_began() -> float | None:
    module = sys.modules.get("distributed.worker")
    return getattr(module.thread_state, "start_time", None) if module is not None else None
