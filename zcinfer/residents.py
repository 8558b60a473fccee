"""Modules that a process keeps, lent to one thread at a time; the least recently used go, by number and by memory.

Going back to one costs microseconds. It is lent out for a block and looked at when it comes back: one that was written
to meanwhile is dropped, so that results never depend on the order of blocks. Not for how they are built (`loading`).
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Protocol

import torch

from . import device_memory, telemetry
from .errors import DeviceLost
from .memory import page_faults
from .store import ModelRef

log = logging.getLogger("zcinfer")


class Resident(Protocol):
    """A module, and what must be known to keep it."""

    name: str
    model: torch.nn.Module
    device: torch.device
    nbytes: int
    is_watched: bool

    def is_unchanged(self, faults: int) -> bool:
        """Whether it is what it was when it was built; ``faults`` are this process's page faults when it was lent."""

    def told(self) -> str:
        """Why it must not be used, as far as is known without a look at it; empty where it may."""

    def trouble(self) -> str:
        """Why what it has computed cannot be trusted; empty where it can."""


class Residents:
    """Modules built in this process, by digest and device; the least recently used go first.

    Parameters
    ----------
    build : callable
        Makes one of a ref, the name of a device, and what ``training`` is to be.
    limit : int
        Number of modules kept while nobody uses them.
    budget : callable, optional
        Given a device and the bytes that modules take there, the bytes that they may. Asked before one is built; what
        was used last is kept in any case.
    """

    def __init__(
        self,
        build: Callable[[ModelRef, str, str], Resident],
        limit: int,
        budget: Callable[[torch.device, int], float] = device_memory.budget,
    ):
        self._build = build
        self.limit = limit
        self._budget = budget
        self._free: OrderedDict[tuple[str, str, str], list[Resident]] = OrderedDict()
        # Bytes that all modules take on a device, also those that are lent, and what they may take
        self._held: Counter[torch.device] = Counter()
        self._most: dict[torch.device, float] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()

    @contextmanager
    def lend(self, ref: ModelRef, device: str, training: str) -> Iterator[torch.nn.Module]:
        """Lend a module to this thread.

        Parameters
        ----------
        ref : ModelRef
        device : str
        training : {"refuse", "eval", "keep"}
            "eval" switches the module to eval mode when it is built.

        Yields
        ------
        torch.nn.Module

        Raises
        ------
        DeviceLost
            After the block: its weights were shared with other jobs, and cannot be trusted. In a Dask worker the block
            is then computed again.
        """
        key = (ref.digest, device, training)
        with self._lock:
            free = self._free.get(key)
            resident = free.pop() if free else None
            if not free:
                self._free.pop(key, None)
            if resident is not None and resident.told():
                self._held[resident.device] -= resident.nbytes
                resident = None
        if resident is None:
            resident = self._built(ref, device, training)
        else:
            telemetry.count_hit(str(ref))
        keep, faults = False, page_faults()
        try:
            # Not given back after an exception: what it left half-done is not known.
            yield resident.model
            why = resident.trouble()
            if why:
                raise _untrusted(
                    f"the weights of {ref} on {device}, which jobs share, cannot be trusted ({why}), and so cannot "
                    "what was computed with them"
                )
            keep = self._is_as_built(resident, ref, faults)
        finally:
            with self._lock:
                if keep:
                    self._free.setdefault(key, []).append(resident)
                    self._free.move_to_end(key)
                else:
                    self._held[resident.device] -= resident.nbytes
                dropped = self._drop(lambda: sum(map(len, self._free.values())) > self.limit)
                most = self._most.get(resident.device, inf)
                dropped += self._drop(lambda: self._held[resident.device] > most, resident.device, least=1)
            _let_go(dropped, resident.device)

    def _is_as_built(self, resident: Resident, ref: ModelRef, faults: int) -> bool:
        if not resident.is_watched:
            return False
        if resident.is_unchanged(faults):
            return True
        if ref.digest not in self._told:
            self._told.add(ref.digest)
            log.warning(
                "%s wrote to its own weights, buffers or attributes while it computed; it is loaded anew for every "
                "block, so that results do not depend on the order of blocks",
                ref,
            )
        telemetry.count_evicted(str(ref))
        return False

    def _built(self, ref: ModelRef, device: str, training: str) -> Resident:
        place = torch.device(device)
        with self._lock:
            most = self._most[place] = self._budget(place, self._held[place])
            dropped = self._drop(lambda: self._held[place] + ref.nbytes > most, place)
        _let_go(dropped, place)
        try:
            resident: Resident | None = self._build(ref, device, training)
        except torch.OutOfMemoryError:
            with self._lock:
                dropped = self._drop(lambda: True, place)
            if not dropped:
                raise
            resident = None
        if resident is None:
            # Only here: an exception that is being handled holds what was made of the memory
            _let_go(dropped, place)
            resident = self._build(ref, device, training)
        with self._lock:
            self._held[place] += resident.nbytes
        return resident

    def _drop(self, must: Callable[[], bool], device: torch.device | None = None, least: int = 0) -> list[Resident]:
        """Take out modules that nobody uses, on that device, as long as some must go; under the lock."""
        dropped: list[Resident] = []
        while must():
            found = [key for key in self._free if device is None or torch.device(key[1]) == device]
            if sum(len(self._free[key]) for key in found) <= least:
                break
            dropped.append(self._free[found[0]].pop(0))
            self._held[dropped[-1].device] -= dropped[-1].nbytes
            if not self._free[found[0]]:
                del self._free[found[0]]
        return dropped

    def clear(self) -> None:
        """Drop all modules that nobody uses now."""
        with self._lock:
            self._drop(lambda: True)


def _untrusted(what: str) -> DeviceLost:
    module = sys.modules.get("distributed.worker")
    if module is None or getattr(module.thread_state, "key", None) is None:
        return DeviceLost(f"{what}: compute it again")
    from distributed import Reschedule

    log.warning("%s: it is computed again", what)
    again: type[DeviceLost] = type("TriedAgain", (DeviceLost, Reschedule), {})
    return again(f"{what}: it is computed again")


def _let_go(dropped: list[Resident], device: torch.device) -> None:
    if not dropped:
        return
    for name in [resident.name for resident in dropped]:
        telemetry.count_evicted(name)
    dropped.clear()
    device_memory.give_back(device)
