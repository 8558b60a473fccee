"""Bytes of host memory on their way to a device: in large copies, through pinned memory that is made once a process.

Threads fill slots of pinned memory, and the device copies out of them meanwhile; a slot is filled again when its copy
has arrived. What the bytes are is not known here (`upload`); rows of input arrays go another way (`staging`).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch

from .description import ALIGNMENT, Bytes

# Of pinned memory 32 MiB, a power of two, since torch rounds up to one. Memory is read by some 10 GB/s a thread and the
# bus takes 55: six threads, each with a slot, and two slots that are on their way. (By reports, not measured here.)
SLOTS, SLOT_BYTES, THREADS = 8, 4 << 20, 6


class Span(NamedTuple):
    """Bytes to copy: where they lie, where they go, how many."""

    source: int
    target: int
    nbytes: int


class Chunk(NamedTuple):
    """A piece of the target that one copy writes: its start, its length, and its spans, counted from its start."""

    start: int
    nbytes: int
    spans: tuple[Span, ...]


def chunks(spans: Iterable[Span], most: int) -> Iterator[Chunk]:
    """Cut spans into pieces of the target.

    Parameters
    ----------
    spans : iterable of Span
        In any order; no two have a byte of the target in common.
    most : int
        Bytes that a piece may have.

    Examples
    --------
    >>> [(c.start, c.nbytes) for c in chunks([Span(0, 256, 150), Span(90, 0, 100), Span(20, 9000, 1)], 300)]
    [(0, 300), (300, 106), (9000, 1)]
    """
    start, end, held = 0, 0, list[Span]()
    for span in sorted((span for span in spans if span.nbytes), key=lambda span: span.target):
        source, target, nbytes = span
        while nbytes:
            # A gap that is mere padding is copied along: another copy would cost more
            if held and (target - end >= ALIGNMENT or target - start >= most):
                yield Chunk(start, end - start, tuple(held))
                held = []
            if not held:
                start = target
            taken = min(nbytes, start + most - target)
            held.append(Span(source, target - start, taken))
            source, target, nbytes = source + taken, target + taken, nbytes - taken
            end = target
    if held:
        yield Chunk(start, end - start, tuple(held))


class Event(Protocol):
    """A place in the order of a device's work."""

    def synchronize(self) -> None:
        """Return when the device has come to it."""


class Side(Protocol):
    """What a device does; methods may be called from any thread."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory (uint8) that the device reads by itself."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device (uint8)."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Begin a copy out of pinned memory; the event is after it."""

    def finish(self) -> None:
        """Return when all copies have arrived."""


class Cuda:
    """A CUDA device, with a stream of its own for copies.

    Parameters
    ----------
    device : torch.device
        With an index.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):  # else a process would have a context on its first device, too
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, nbytes: int) -> torch.Tensor:
        made = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # Who had the memory before may still have work to do in it
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return made

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event

    def finish(self) -> None:
        self._stream.synchronize()


class PinnedSlots:
    """Slots of pinned memory; one upload at a time goes through them.

    Parameters
    ----------
    side : Side
        That gives the memory. Pinned memory serves all devices of a process.
    slots : int
    slot_bytes : int
        Most bytes of one copy.
    threads : int, optional
        That fill slots; no more than there are slots. Default: as many as the process has cores, up to 6.
    """

    def __init__(self, side: Side, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES, threads: int | None = None):
        self._slots = side.pinned(slots * slot_bytes).view(slots, slot_bytes)
        self._threads = min(slots, threads or min(THREADS, len(os.sched_getaffinity(0))))
        self._lock = threading.Lock()

    def move(self, side: Side, source: Bytes, target: torch.Tensor, spans: Iterable[Span]) -> None:
        """Copy spans of ``source`` (uint8) into ``target`` (uint8, of the device), and return when they are there.

        The bytes between them become anything. An exception of the device, or of a copy, comes when no copy is on its
        way any more.
        """
        with self._lock:
            todo = deque(chunks(spans, self._slots.shape[1]))
            free: SimpleQueue[tuple[torch.Tensor, Event | None]] = SimpleQueue()
            for slot in self._slots:
                free.put((slot, None))

            def work() -> None:
                try:
                    while True:
                        try:
                            chunk = todo.popleft()
                        except IndexError:
                            return
                        # There are no fewer slots than threads, so this does not wait for a thread that failed
                        slot, event = free.get()
                        if event is not None:
                            event.synchronize()
                        _fill(slot, source, chunk)
                        piece = target[chunk.start : chunk.start + chunk.nbytes]
                        free.put((slot, side.copy(piece, slot[: chunk.nbytes])))
                except BaseException:
                    todo.clear()
                    raise

            try:
                threads = min(self._threads, len(todo))
                if threads <= 1:
                    work()
                    return
                with ThreadPoolExecutor(threads, "zcinfer-upload") as pool:
                    done, _ = wait([pool.submit(work) for _ in range(threads)])
                for each in done:
                    each.result()
            finally:
                side.finish()


def _fill(slot: torch.Tensor, source: Bytes, chunk: Chunk) -> None:
    memory = slot.numpy()
    for start, target, nbytes in chunk.spans:
        memory[target : target + nbytes] = source[start : start + nbytes]  # without the interpreter's lock
