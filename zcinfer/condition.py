"""How a store is on one machine: what it holds of what it can, and whether somebody fills it.

What stores answer when they are asked (`store`, `ray_store`). Not for when they are (`watching`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# A size in bytes, or "unavailable: <reason>"
Size = int | str

UNAVAILABLE = "unavailable: "

# States of an actor as Ray names them, and what they mean for who fills a store.
_STATES = {
    "ALIVE": "alive",
    "RESTARTING": "lost; Ray is starting it again",
    "PENDING_CREATION": "being started",
    "DEPENDENCIES_UNREADY": "being started",
    "DEAD": "dead: models that are not loaded yet come from their archives",
}


@dataclass(frozen=True)
class Condition:
    """How one store is, on one machine.

    Attributes
    ----------
    store : str
        "ray:HOST:PORT" or "file:DIRECTORY".
    sizes : dict of str to int or str
        Bytes, or "unavailable: <reason>". Of Ray: "used" and "capacity" of its shared memory, "spilled" (to disk, in
        all since it was started), "fallback" (in files, since memory was full). Of files: "mapped" (archives that the
        process that looks has mapped), "cached" (of these, in the page cache), "free" (of the disk).
    holder : str
        How the actor is that fills it, in words; empty where there is none.
    healthy : bool
        Whether models can be had from it.
    """

    store: str
    sizes: dict[str, Size] = field(hash=False)
    holder: str = ""
    healthy: bool = True

    def plain(self) -> dict[str, Any]:
        """All of it, in types that go over any wire."""
        return {"store": self.store, "sizes": dict(self.sizes), "holder": self.holder, "healthy": self.healthy}


def of_ray(store: str, sizes: Mapping[str, Size], actor: Mapping[str, Any] | None) -> Condition:
    """Condition of a store in Ray, from what Ray tells of its holder.

    Parameters
    ----------
    store : str
    sizes : mapping
        As in `Condition`.
    actor : mapping, optional
        "State" and "NumRestarts" as Ray has them; None: Ray knows no such actor.

    Examples
    --------
    >>> of_ray("ray:a:1", {}, {"State": "ALIVE", "NumRestarts": 2}).holder
    'alive, after 2 restarts'
    """
    state = actor["State"] if actor else "DEAD"
    words = _STATES.get(state, state)
    restarts = int(actor.get("NumRestarts", 0)) if actor else 0
    if state == "ALIVE" and restarts:
        words += f", after {restarts} restart{'' if restarts == 1 else 's'}"
    return Condition(store, dict(sizes), words, healthy=state == "ALIVE")


def of_files(store: str, directory: Path) -> Condition:
    """Condition of a store of memory-mapped archives in ``directory``."""
    sizes: dict[str, Size] = {}
    try:
        paths = mapped(directory)
        sizes["mapped"] = sum(path.stat().st_size for path in paths)
        sizes["cached"] = sum(map(cached, paths))
    except OSError as error:
        sizes = dict.fromkeys(("mapped", "cached"), f"{UNAVAILABLE}{error}")
    try:
        disk = os.statvfs(directory)
    except OSError as error:
        return Condition(store, sizes | {"free": f"{UNAVAILABLE}{error}"}, healthy=False)
    return Condition(store, sizes | {"free": disk.f_bavail * disk.f_frsize})


def mapped(directory: Path) -> set[Path]:
    """Files below a directory that this process has mapped.

    Raises
    ------
    OSError
        The system does not tell (there is no /proc).
    """
    found = set()
    prefix = f"{os.path.realpath(directory)}{os.sep}"
    with open("/proc/self/maps") as lines:
        for line in lines:
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if path and path[0].startswith(prefix) and not path[0].endswith(" (deleted)"):
                found.add(Path(path[0]))
    return found


def cached(path: str | os.PathLike[str]) -> int:
    """Bytes of a file that are in the page cache.

    Raises
    ------
    OSError

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(bytes(100_000))
    ...     file.flush()
    ...     cached(file.name)
    100000
    """
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes == 0:
            return 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            array = np.frombuffer(pages, np.uint8)
            held = np.empty(-(-nbytes // mmap.PAGESIZE), np.uint8)
            failed = _MINCORE(array.ctypes.data, nbytes, held.ctypes.data)
            del array  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return min(nbytes, int(np.count_nonzero(held & 1)) * mmap.PAGESIZE)


_MINCORE = ctypes.CDLL(None, use_errno=True).mincore
_MINCORE.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
