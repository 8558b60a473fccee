"""How many threads of this process compute at a time.

A worker with more tasks than that reads, prepares and writes in the others meanwhile, without more threads computing
than there are cores.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import AbstractContextManager
from functools import cache

import torch

from . import config


def computing() -> AbstractContextManager[object]:
    """Context in which a thread computes; the others wait at its door."""
    return _door()


@cache
def _door() -> threading.Semaphore:
    return threading.Semaphore(_places())


def _places() -> int:
    asked = config.get("computing")
    if asked is not None:
        return max(1, int(asked))
    return max(1, _threads_of_worker() // torch.get_num_threads())


def _threads_of_worker() -> int:
    """Threads that this process may keep busy: those of its Dask worker, or the cores."""
    module = sys.modules.get("distributed.worker")
    if module is not None:
        try:
            return int(module.get_worker().state.nthreads)
        except ValueError:
            pass
    return len(os.sched_getaffinity(0))
