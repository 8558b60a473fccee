"""What a Dask worker needs to read shared models: ``dask worker --preload zcinfer.worker``, and `LocalCluster` itself.

For: memory limits that count what a worker has to itself. A model in shared memory is resident in every worker
that reads it, and Dask would spill, pause and restart each of them for it. For memory that is freed, which is kept, as
torch needs it again at once, until there is nothing to do. For torch itself, which is imported while nothing waits for
it. For the CPUs near its GPU, if it was given one: the first of CUDA_VISIBLE_DEVICES, whoever set that. And for
counters (`telemetry`), which ride on the heartbeat. Not for: models, nor which worker has which GPU.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import sys
import threading
import time
import weakref
from importlib import import_module
from typing import Any

from distributed import NannyPlugin, Status, WorkerPlugin
from distributed.worker_memory import NannyMemoryManager
from tornado.ioloop import PeriodicCallback

from . import prometheus, sampling, stores, telemetry
from .dask_upkeep import bound_sums
from .memory import give_back_freed, keep_freed, process_memory
from .pinning import bind_to_device, spans

# Seconds for which a heartbeat tells of a job after its last block
TOLD = 60.0
# Seconds after the last task until freed memory is given back, or twice that
REST = 2.0
# Seconds from one look at what Dask keeps for good to the next
BOUNDED = 60.0

logger = logging.getLogger(__name__)


class PrivateMemoryMonitor(NannyMemoryManager):  # type: ignore[misc]
    """Restarts a worker whose private memory is above the terminate threshold; memory it shares does not count."""

    def memory_monitor(self, nanny: Any) -> None:
        """Judge the worker of ``nanny``; called ten times a second by its event loop."""
        try:
            private = process_memory(nanny.pid).private if nanny.pid else 0
        except ProcessLookupError:
            return
        if private > self.memory_limit * self.memory_terminate_fraction:
            super().memory_monitor(nanny)


class PrivateMemoryLimit(NannyPlugin):  # type: ignore[misc]
    """Nanny plugin that makes the terminate threshold count private memory."""

    name = "zcinfer-private-memory-limit"

    def setup(self, nanny: Any) -> None:
        """Put a `PrivateMemoryMonitor` in the place of the monitor of ``nanny``, once."""
        if isinstance(nanny.memory_manager, PrivateMemoryMonitor):
            return
        # No callback where there is no limit. One that runs already must be stopped: nobody else still knows of it.
        replaced = nanny.periodic_callbacks.pop("memory_monitor", None)
        nanny.memory_manager = PrivateMemoryMonitor(nanny, memory_limit=nanny.memory_manager.memory_limit)
        if replaced is not None and replaced.is_running():
            replaced.stop()
            nanny.periodic_callbacks["memory_monitor"].start()


class Counting(WorkerPlugin):  # type: ignore[misc]
    """Worker plugin that has counters ride on heartbeats, also where workers were started without this preload."""

    name = "zcinfer-counting"
    idempotent = True

    def setup(self, worker: Any) -> None:
        """Begin with the next heartbeat."""
        tell_counters(worker)


# The worker of this process that tells its counters: where several share a process, one is enough.
_telling: weakref.ref[Any] | None = None


def tell_counters(worker: Any) -> None:
    """Have the counters of this process ride on the heartbeats of ``worker``, unless another one's have them."""
    global _telling
    before = _telling() if _telling is not None else None
    if before is None or before.status is Status.closed:
        _telling = weakref.ref(worker)
        worker.metrics["zcinfer"] = lambda _: telemetry.snapshot(since=time.time() - TOLD) | sampling.latest()


class Rest:
    """Gives freed memory back to the system when a worker has had nothing to do for a while.

    What batches leave for the next ones can be as much as all else that a worker holds.
    """

    def __init__(self, worker: Any):
        self._worker, self._seen, self._given = worker, 0, 0

    async def look(self) -> None:
        """Look whether there is something to do; at the second look without, give back."""
        state = self._worker.state
        rests = not state.executing and not state.ready and state.executed_count == self._seen
        self._seen = state.executed_count
        if rests and self._given != self._seen:
            self._given = self._seen
            await asyncio.to_thread(give_back_freed)


async def send_heartbeat(dask_worker: Any) -> None:
    """Have the scheduler know what this worker has counted so far."""
    await dask_worker.heartbeat()


def dask_setup(worker: Any) -> None:
    """Make the memory limits of ``worker`` and of its nanny, if it has one, count private memory.

    A worker with a nanny also leaves Ctrl-C to it and keeps to the CPUs near its GPU, and all keep freed memory for the
    next batch. Dask calls this in every worker process that starts with this preload, and again after each restart of
    the worker.
    """
    prometheus.show_worker()
    if worker.nanny is not None and sys.platform == "linux":  # else it is somebody's program, with threads of its own
        cpus, reason = bind_to_device()
        if cpus:
            logger.info("on CPUs %s, which are near its GPU", spans(cpus))
        elif reason:
            logger.info("not bound to the CPUs near its GPU: %s", reason)
    # A second and more, which the first block need not wait for. No daemon: to end in the midst of it is to crash.
    threading.Thread(target=import_module, args=("torch",), name="zcinfer-import").start()
    tell_counters(worker)
    sampling.start(worker.scheduler.address)
    worker.periodic_callbacks["zcinfer-sums"] = bounds = PeriodicCallback(lambda: bound_sums(worker), 1000 * BOUNDED)
    bounds.start()
    if sys.platform != "linux":
        # Only Linux tells shared memory apart.
        return
    if keep_freed():
        worker.periodic_callbacks["zcinfer-rest"] = looks = PeriodicCallback(Rest(worker).look, 1000 * REST)
        looks.start()
    # The one figure behind the spill and pause thresholds, the heartbeat and the scheduler's decisions.
    worker.monitor.get_process_memory = lambda: process_memory().private
    if worker.nanny is not None:
        # Ctrl-C reaches every process of the terminal, but it is the script or the nanny that ends the worker for it,
        # or goes on. Not SIG_IGN: the processes that tasks start would inherit that.
        signal.signal(signal.SIGINT, lambda *_: None)
        # Not awaited here: a nanny answers only once it has started, which is when its worker has.
        worker.loop.add_callback(_tell_nanny, worker)


def dask_teardown(worker: Any) -> None:
    """Leave Ray before the process ends: at the exit of the interpreter that can outlast the nanny's patience."""
    sampling.stop()
    stores.close_all()


async def _tell_nanny(worker: Any) -> None:
    try:
        async with worker.rpc(worker.nanny) as nanny:
            await nanny.plugin_add(plugin=pickle.dumps(PrivateMemoryLimit()), name=PrivateMemoryLimit.name)
    except OSError:
        if worker.status is Status.running:
            logger.exception(
                "The nanny at %s still counts shared memory: it may restart this worker for the models it reads.",
                worker.nanny,
            )
