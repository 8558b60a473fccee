"""Memory of a process by kind, read from /proc: private (``Anonymous``) and shared (``RssShmem`` + ``RssFile``).

Resident size alone says nothing about zcinfer: a worker that maps a 10 GB model shared by all has 10 GB resident
and next to nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: ``private`` to it, and ``shared`` with others or backed by a file."""

    private: int
    shared: int


def process_memory(pid: int | str = "self") -> Memory:
    """Memory of process ``pid`` in bytes.

    Raises
    ------
    ProcessLookupError
        The process is gone.

    Examples
    --------
    >>> process_memory().private > 0
    True
    """
    fields = {}
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                key, _, rest = line.partition(":")
                if key.startswith("Rss"):
                    fields[key] = int(rest.split()[0]) * 1024
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    return Memory(
        private=fields.get("RssAnon", 0),
        shared=fields.get("RssShmem", 0) + fields.get("RssFile", 0),
    )


def peak_private(function: Callable[[], object]) -> int:
    """Bytes by which a call raises the resident memory of this process at most; 0 where the system does not tell.

    Other threads count too.

    Examples
    --------
    >>> peak_private(lambda: len(bytes(b"1" * 50_000_000))) > 40_000_000
    True
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak so far is forgotten
    except OSError:
        function()
        return 0
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def available() -> int:
    """Bytes of memory that processes here may still take: of the machine, and of the container if there is one.

    Examples
    --------
    >>> available() > 0
    True
    """
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or no limit
        return free


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
