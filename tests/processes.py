"""What tests of several processes share: waiting for a condition, and telling which processes still live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Poll ``condition`` until it holds; the test fails where it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of ``processes`` that still run; in a container nobody may ever collect the ended ones."""
    alive = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            pass
    return alive
