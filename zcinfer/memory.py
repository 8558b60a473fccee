"""Memory of a process by kind, read from /proc: private (``Anonymous``) and shared (``RssShmem`` + ``RssFile``).

Resident size alone says nothing about zcinfer: a worker that maps a 10 GB model shared by all has 10 GB resident
and next to nothing of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


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
