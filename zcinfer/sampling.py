"""What a worker looks up in threads of their own, now and then, and the heartbeat carries: its cards and its stores.

A question to a driver or a store may take milliseconds, or hang; none is asked on an event loop. Not for counting
(`telemetry`), nor for what is asked (`nvml`, `watching`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from . import nvml, telemetry
from .condition import UNAVAILABLE
from .watching import Watch

log = logging.getLogger(__name__)

# Seconds between two looks at cards, and at stores
GPU_SECONDS, STORE_SECONDS = 1.0, 5.0
# An answer is told for so many times that; after it, that there is none
_STALE = 6


class Sampler:
    """Calls a function again and again in a thread, and keeps what it gave last.

    Parameters
    ----------
    name : str
        Of the thread.
    look : callable
        Whatever it raises is told in the place of its answer.
    seconds : float
        Between two calls.

    Examples
    --------
    >>> sampler = Sampler("example", lambda: 42, 0.01)
    >>> sampler.start()
    >>> sampler.wait(5)
    >>> sampler.latest
    42
    >>> sampler.stop()
    """

    def __init__(self, name: str, look: Callable[[], Any], seconds: float):
        self._look, self._seconds = look, seconds
        self._found: tuple[float, Any] | None = None
        self._begun = monotonic()
        self._end, self._first = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a call that hangs is left to hang."""
        self._end.set()
        self._thread.join(0.2)

    def wait(self, seconds: float) -> None:
        """Wait for the first answer."""
        self._first.wait(seconds)

    @property
    def latest(self) -> Any:
        """The last answer; None before the first; "unavailable: <reason>" where the last one is too old."""
        since, answer = self._found or (self._begun, None)
        age = monotonic() - since
        if age > _STALE * self._seconds:
            return f"{UNAVAILABLE}no answer for {age:.0f} s"
        return answer

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                answer = self._look()
            except Exception as error:
                log.debug("%s failed", self._thread.name, exc_info=True)
                answer = f"{UNAVAILABLE}{type(error).__name__}: {error}"
            self._found = monotonic(), answer
            self._first.set()
            self._end.wait(self._seconds)


_samplers: dict[str, Sampler] = {}
_watch: Watch | None = None


def start(cluster: str) -> None:
    """Look at what there is from now on; again does nothing, and nothing is done where `telemetry` is off.

    Parameters
    ----------
    cluster : str
        Address of its scheduler: of the workers of one cluster on a machine, one looks at the stores.
    """
    if _samplers or not telemetry.is_on():
        return
    if nvml.present():
        _samplers["gpus"] = Sampler("zcinfer-nvml", nvml.read, GPU_SECONDS)
    global _watch
    _watch = Watch(cluster)
    _samplers["stores"] = Sampler("zcinfer-stores", _watch.look, STORE_SECONDS)
    for sampler in _samplers.values():
        sampler.start()


def stop() -> None:
    """Look no more."""
    while _samplers:
        _samplers.popitem()[1].stop()
    if _watch is not None:
        _watch.close()


def latest() -> dict[str, Any]:
    """The last answers, in types that go over any wire: "gpus", where there are cards, and "stores"."""
    return {name: answer for name, sampler in list(_samplers.items()) if (answer := sampler.latest) is not None}
