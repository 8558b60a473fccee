"""How many threads of this process compute at a time.

A worker with more tasks than that reads, prepares and writes in the others meanwhile, without more threads computing
than there are cores.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import AbstractContextManager, suppress
from functools import cache

import torch

from . import config


def computing() -> AbstractContextManager[object]:
    """Context in which a thread computes; the others wait at its door."""
    return _door()


@cache
def _door() -> AbstractContextManager[object]:
    places = _places()
    # A semaphore is written in Python, and ten times as slow as a lock; there is a batch each time.
    return threading.RLock() if places == 1 else threading.Semaphore(places)


def _places() -> int:
    threads = _threads_here()
    asked = config.get("computing")
    return max(1, int(asked) if asked is not None else threads // torch.get_num_threads())


def _threads_here() -> int:
    """Threads that this process may keep busy: those of its Dask worker, or the cores."""
    module = sys.modules.get("distributed.worker")
    if module is not None:
        try:
            threads = int(module.get_worker().state.nthreads)
        except ValueError:
            pass
        else:
            with suppress(RuntimeError):  # it was set, or used
                torch.set_num_interop_threads(1)  # tasks are what runs side by side
            return threads
    return len(os.sched_getaffinity(0))
