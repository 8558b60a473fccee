"""What tests of several processes share: waiting for a condition, and telling which processes still live."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from zcinfer.ray_node import MARK


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Poll ``condition`` until it holds; the test fails where it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def orphaned_shared_memory() -> set[str]:
    """Files in /dev/shm that no running process has mapped: those in use by other programs are theirs."""
    files = set(os.listdir("/dev/shm"))
    for process in psutil.process_iter():
        if not files:
            break
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        files -= {name for name in files if f"/dev/shm/{name}" in maps}
    return files


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


def processes_below(place: Path) -> list[psutil.Process]:
    """Living processes of Rays of ours below a directory, and those that work there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(place)) or process.cwd().startswith(str(place)):
                found.append(process)
        except psutil.Error:
            continue
    return living(found)
