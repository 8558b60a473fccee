"""Memory of a process by kind, read from /proc: private (``Anonymous``) and shared (``RssShmem`` + ``RssFile``).

Resident size alone says nothing about zcinfer: a worker that maps a 10 GB model shared by all has 10 GB resident
and next to nothing of its own. And how much of what it frees a process keeps.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
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


def peak_resident(function: Callable[[], object]) -> int:
    """Resident memory of this process in bytes, at most, while a call runs; 0 where the system does not tell.

    What the call takes is the difference from `resident`, asked after `give_back_freed`: what the C library keeps of
    freed memory is resident too, and taken anew without a trace. Other threads count too.

    Examples
    --------
    >>> give_back_freed()
    >>> before = resident()
    >>> peak_resident(lambda: len(bytes(b"1" * 50_000_000))) - before > 40_000_000
    True
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak so far is forgotten
    except OSError:
        function()
        return 0
    function()
    return _status("VmHWM")


def resident() -> int:
    """Resident memory of this process in bytes, private and shared; 0 where the system does not tell.

    Examples
    --------
    >>> resident() > 1_000_000
    True
    """
    return _status("VmRSS")


def page_faults() -> int:
    """Page faults that this process has had, of all its threads; -1 where the system does not count them.

    Examples
    --------
    >>> page_faults() > 0
    True
    """
    if not _counts_faults():
        return -1
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt + used.ru_majflt


@cache
def _counts_faults() -> bool:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1  # no memory was there for it yet
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt > before


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


def keep_freed() -> bool:
    """Have the C library keep freed memory for the next allocation, as it does by itself if not told otherwise.

    Dask starts its workers with MALLOC_TRIM_THRESHOLD_=65536, for which every tensor of more than 128 kB is mapped
    from the system and given back, and its pages are zeroed anew for each operation.

    Returns
    -------
    bool
        Whether this C library (glibc) takes such advice.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # Where glibc's own limits end up when a program uses large tensors.
    return all([mallopt(_M_MMAP_THRESHOLD, 32 << 20), mallopt(_M_TRIM_THRESHOLD, 64 << 20)])


def give_back_freed() -> None:
    """Give freed memory that the C library keeps back to the system; the next allocations have it zeroed anew."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _status(field: str) -> int:
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
