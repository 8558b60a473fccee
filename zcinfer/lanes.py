"""Streams and buffers by which rows go to a GPU and back while it computes; made once, and lent for a block.

Three streams copy in, compute and copy out. A slot is what they hand on from one to the next: pinned memory and memory
of the device, for rows and for results. Not for what lies in a slot (`staging`), nor for the order of work
(`pipeline`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Slots of a lane: one is filled, one computed, one fetched.
SLOTS = 3
# Lanes of a device that are kept while nobody uses them: each holds pinned memory.
KEPT = 2


class Buffer:
    """Bytes in pinned memory, and as many on the device.

    Attributes
    ----------
    host, there : torch.Tensor
        ``(bytes,)`` uint8 each.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.host = self.there = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> None:
        """Have room for that many bytes. What was there is lost."""
        if max(1, nbytes) <= len(self.host):  # also none of them are to be the device's
            return
        self.host = self.there = torch.empty(0, dtype=torch.uint8)  # given back first: both together may be too much
        size = max(1 << 16, 1 << (nbytes - 1).bit_length())  # as torch rounds pinned memory anyway
        with torch.inference_mode(False):
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self.there = torch.empty(size, dtype=torch.uint8, device=self._device)
        # Of memory that was freed a moment ago the allocator knows that this stream may have it, and no other.
        made = streams_of(self._device).Event()
        made.record(streams_of(self._device).current_stream(self._device))
        made.synchronize()

    def at(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, there: bool) -> torch.Tensor:
        """The bytes from ``offset``, a multiple of `ALIGNMENT`, as a tensor here or on the device."""
        memory = self.there if there else self.host
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return memory[offset : offset + nbytes].view(dtype).view(shape)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """What lies here where a tensor of `at` lies on the device."""
        return self.at(int(tensor.storage_offset()) * tensor.itemsize, tuple(tensor.shape), tensor.dtype, there=False)


class Slot:
    """Rows and results of one chunk of batches, and the events that hand them on.

    Attributes
    ----------
    rows, results : Buffer
    arrived, computed, returned
        Events: rows are on the device; results are; they are here. Who has waited for the last may fill the slot again.
    """

    def __init__(self, device: torch.device):
        streams = streams_of(device)
        self.rows, self.results = Buffer(device), Buffer(device)
        self.arrived, self.computed, self.returned = streams.Event(), streams.Event(), streams.Event()


class Lane:
    """Streams and slots for one block at a time.

    Parameters
    ----------
    device : torch.device

    Notes
    -----
    The slots are never given back to the allocator while a stream may use them, so that nothing need be recorded on
    streams.
    """

    def __init__(self, device: torch.device):
        self.streams = streams_of(device)
        self.copy_in, self.compute, self.copy_out = (self.streams.Stream(device) for _ in range(3))
        self.slots = [Slot(device) for _ in range(SLOTS)]

    def finish(self) -> None:
        """Wait for all that was asked of its streams. Raises what went wrong there, whenever that was."""
        for stream in (self.copy_in, self.compute, self.copy_out):
            event = self.streams.Event()
            event.record(stream)
            event.synchronize()


class Lanes:
    """Lanes of this process, by device."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Lane]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, device: torch.device) -> Iterator[Lane]:
        """Lend a lane to this thread. One in which something failed is not used again."""
        with self._lock:
            free = self._free.get(device)
            lane = free.pop() if free else None
        lane = lane or Lane(device)
        yield lane
        with self._lock:
            free = self._free.setdefault(device, [])
            if len(free) < KEPT:
                free.append(lane)

    def clear(self) -> None:
        """Drop all that nobody uses now."""
        with self._lock:
            self._free.clear()


def streams_of(device: torch.device) -> Any:
    """torch's module of streams and events for a device; those of the CPU do nothing."""
    return torch.cuda if device.type == "cuda" else torch.cpu


lanes = Lanes()
