"""Streams that remember: who wrote and read which bytes, and what was certain to have happened before.

A stand-in for `torch.cuda` on the CPU, where everything happens in the order of the program: what a card may do in
another order is found from the order that events force (vector clocks). For tests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[int, int]


def later(one: Clock, other: Clock) -> Clock:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in one.keys() | other.keys()}


class Recorder(TorchDispatchMode):
    """Operators of torch and accesses of the host, with the time of the stream or host that made them.

    ``races``: pairs of accesses to one memory, one of which writes, that no event has put into an order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clocks: dict[int, Clock] = {0: {0: 1}}  # 0: the host, and its default stream
        self.now = 0
        self.accesses: dict[int, list[tuple[int, Clock, bool, str]]] = {}
        self.races: list[str] = []
        self.kept: list[Any] = []  # that no two storages get one address
        self.watched: set[int] = set()
        self.used: set[int] = set()
        recorder = self

        class Stream:
            def __init__(self, device: Any = None):
                self.number = len(recorder.clocks)
                recorder.clocks[self.number] = {self.number: 1}

            def wait_event(self, event: Event) -> None:
                recorder.clocks[self.number] = later(recorder.clocks[self.number], event.clock)

            def wait_stream(self, stream: Stream) -> None:
                recorder.clocks[self.number] = later(recorder.clocks[self.number], recorder.clocks[stream.number])

        class Event:
            def __init__(self) -> None:
                self.clock: Clock = {}

            def record(self, stream: Stream) -> None:
                self.clock = dict(recorder.clocks[stream.number])

            def synchronize(self) -> None:
                recorder.clocks[0] = later(recorder.clocks[0], self.clock)

        self.Stream, self.Event = Stream, Event
        self._default = Stream.__new__(Stream)
        self._default.number = 0

    def current_stream(self, device: Any = None) -> Any:
        return self._default

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.number
        yield
        self.now = before

    def watch(self, tensor: torch.Tensor) -> None:
        """Memory of which accesses count."""
        self.watched.add(tensor.untyped_storage().data_ptr())
        self.kept.append(tensor)

    def access(self, tensor: torch.Tensor, writes: bool, what: str, host: bool = False) -> None:
        where = tensor.untyped_storage().data_ptr()
        if where not in self.watched:
            return
        who = 0 if host else self.now
        if not host and who:
            # What the host asks for comes after what it has seen to happen.
            self.clocks[who] = later(self.clocks[who], {0: self.clocks[0][0]} | self.clocks[0])
        clock = self.clocks[who]
        clock[who] = clock.get(who, 0) + 1
        self.used.add(who)
        for other, time, wrote, name in self.accesses.setdefault(where, []):
            if (writes or wrote) and other != who and clock.get(other, 0) < time[other]:
                self.races.append(f"{name} in stream {other}, and {what} in stream {who}")
        self.accesses[where].append((who, dict(clock), writes, what))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if threading.current_thread() is threading.main_thread():
            schema = function._schema
            views = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
            if not views:
                for argument, value in zip(schema.arguments, args, strict=False):
                    writes = argument.alias_info is not None and argument.alias_info.is_write
                    for tensor in tree_leaves(value):
                        if isinstance(tensor, torch.Tensor):
                            self.access(tensor, writes, function.__name__)
        return function(*args, **(kwargs or {}))
