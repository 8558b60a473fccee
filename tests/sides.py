"""A device side without a device, for tests of what goes to one: plain memory, and copies as late as a real one's."""

from __future__ import annotations

import threading

import torch


class Late:
    """A device that copies when an event is waited for, or at the end; and says what it did.

    Who fills a slot before its event gives it other bytes to copy.
    """

    def __init__(self, fail_after: int | None = None) -> None:
        self.pending: list[LateEvent] = []
        self.told: list[tuple[str, int]] = []
        self.memory: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self._left = fail_after

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def empty(self, nbytes: int) -> torch.Tensor:
        self.memory.append(torch.full((nbytes,), 0xA5, dtype=torch.uint8))
        return self.memory[-1]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> LateEvent:
        with self._lock:
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    raise RuntimeError("the device refuses")
            event = LateEvent(self, target, source)
            self.pending.append(event)
            self.told.append(("copy", source.data_ptr()))
            return event

    def finish(self) -> None:
        while self.pending:
            self.pending[0].synchronize()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of this device."""
        place = tensor.data_ptr()
        return any(m.data_ptr() <= place < m.data_ptr() + max(1, m.nbytes) for m in self.memory)


class LateEvent:
    def __init__(self, device: Late, target: torch.Tensor, source: torch.Tensor):
        self.device, self.target, self.source = device, target, source

    def synchronize(self) -> None:
        with self.device._lock:
            if self in self.device.pending:
                self.device.pending.remove(self)
                self.target.copy_(self.source)
                self.device.told.append(("arrived", self.source.data_ptr()))
