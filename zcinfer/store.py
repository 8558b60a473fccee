"""Stores: caches over the registry, from which workers take models without copying them.

A store's URL says all that another process needs: ``file:DIRECTORY`` (memory-mapped archives of the registry in that
directory) or ``ray:HOST:PORT?registry=DIRECTORY`` (that Ray's shared memory, filled from that registry). Ray's store is
in `ray_store`; both fulfil one contract test.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol
from urllib.parse import parse_qs

from .archive import Archive
from .condition import Condition, of_files
from .description import Bytes, Description
from .errors import ArchiveError, SettingsError
from .notebook import facts
from .registry import Registry
from .sizes import format_size

# Models of which a file store remembers description and skeleton, some 100 kB each.
_READ = 64


def registry_of(url: str) -> Path:
    """Directory of the registry in a store's URL."""
    kind, _, rest = url.partition(":")
    found = [rest] if kind == "file" else parse_qs(rest.partition("?")[2]).get("registry")
    if not found:
        raise SettingsError(f"{url!r} is no store's URL: it names no registry")
    return Path(found[0])


@dataclass(frozen=True)
class ModelRef:
    """One version of one model: small, hashable, picklable. Graphs carry this and never weights.

    Attributes
    ----------
    name : str
    version : int
    digest : str
        SHA-256 of the model's canonical form; equal content has equal digests.
    nbytes : int
        Bytes of weights.
    store : str
        URL of the store it can be had from. Not part of its identity.

    Examples
    --------
    >>> str(ModelRef("bert", 2, "ab" * 32, 437_951_328, "file:/models"))
    'bert@2'
    """

    name: str
    version: int
    digest: str
    nbytes: int = field(compare=False)
    store: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("zcinfer.ModelRef", self.digest)

    def _repr_html_(self) -> str:
        return facts(str(self), {"weights": format_size(self.nbytes), "digest": self.digest[:12], "store": self.store})


@dataclass(frozen=True)
class Fetched:
    """A model as it comes from a store, ready to be joined.

    Attributes
    ----------
    description : Description
    skeleton : bytes
    buffer : numpy.ndarray
        uint8, writable; nobody else sees what is written to it.
    base : numpy.ndarray or None
        The same of another model, where storages of this one lie in its buffer.
    protection : str
        "copy-on-write" or "read-only" (a write ends this process).
    is_on_disk : bool
        Ray's memory was full here, and it lies in a file.
    seconds : dict of str to float
        Seconds of each phase: "fetch" (get hold of it), "map".
    """

    description: Description
    skeleton: bytes
    buffer: Bytes
    protection: str
    seconds: dict[str, float]
    base: Bytes | None = None
    is_on_disk: bool = False


@dataclass(frozen=True)
class Budget:
    """What a store can hold on this machine, and what it holds; in bytes.

    Attributes
    ----------
    place : str
        What it is, for people.
    capacity, used : int
        ``used`` counts what others keep there, too.
    models : dict of str to int
        What it holds of each model, by digest; those used longest ago come first.
    in_use : frozenset of str
        Digests of those that do not go to make room for others; also of those that other machines have copies of,
        which are asked whether they use them only when room is needed.
    on_disk : int
        Of what memory had no room for, and lies in files now.
    spilled : int
        Written to a disk since the store was started.
    evicted : int
        Number of models that have gone to make room for others.
    """

    place: str
    capacity: int
    used: int
    models: dict[str, int]
    in_use: frozenset[str] = frozenset()
    on_disk: int = 0
    spilled: int = 0
    evicted: int = 0

    def __str__(self) -> str:
        told = [f"{format_size(self.used)} of {format_size(self.capacity)} taken"]
        told += [f"{len(self.models)} models in it"] if self.models else []
        told += [f"{len(self.in_use)} in use"] if self.in_use else []
        told += [f"{format_size(self.on_disk)} had no room and lie on disk"] if self.on_disk else []
        told += [f"{format_size(self.spilled)} written to disk since its start"] if self.spilled else []
        told += [f"{self.evicted} models gone to make room"] if self.evicted else []
        return f"{self.place}:\n  {', '.join(told)}"


def disk_budget(registry: Registry) -> Budget:
    """What the disk of a registry has room for, and what its archives take of that."""
    models = registry.nbytes()
    place = next(path for path in (registry.directory, *registry.directory.parents) if path.exists())
    used, free = sum(models.values()), shutil.disk_usage(place).free
    return Budget(f"disk of {registry.directory}", used + free, used, models)


class Store(Protocol):
    """What every store does."""

    registry: Registry

    @property
    def url(self) -> str:
        """URL by which any process can open this store."""

    @property
    def alive(self) -> bool:
        """Whether it can be used, as far as is known without asking."""

    @property
    def died(self) -> bool:
        """Whether its service is known to have died; else a store that is not alive can be opened again."""

    def fetch(self, digest: str) -> Fetched:
        """Get a model; from the registry, through the cache."""

    def budget(self) -> Budget:
        """What it can hold, and holds."""

    def make_room(self, digest: str, nbytes: int) -> None:
        """Raise `StoreFull` if a model of that size, not yet here, would not fit into its memory."""

    def publish(self, digest: str) -> None:
        """Have a model ready in the cache; raises `StoreFull` if it does not fit."""

    def bring(self, digest: str) -> int:
        """Have a model in the memory of this machine; returns the bytes that came from elsewhere for it."""

    def forget(self, digest: str) -> None:
        """Drop a model from the cache. Who has it mapped keeps it."""

    def condition(self) -> Condition:
        """How it is on this machine; asks, and may take seconds."""

    def close(self, ending: bool = False) -> None:
        """Let go of what this process holds of the store. What is loaded stays what it is, unless the process ends."""


class _Opened(NamedTuple):
    """An archive that has been read, and that of the base which it shares storages with."""

    archive: Archive
    base: Archive | None
    description: Description
    skeleton: bytes

    def map(self) -> tuple[Bytes, Bytes | None]:
        return self.archive.weights(), self.base.weights() if self.base is not None else None


class FileStore:
    """Memory-mapped archives: the page cache is the shared memory. Needs no service.

    Parameters
    ----------
    directory : path
        The registry's.
    """

    def __init__(self, directory: str | Path):
        self.registry = Registry(directory)
        # Descriptions and skeletons of the models fetched last: content under one digest never changes.
        self._read: OrderedDict[str, _Opened] = OrderedDict()

    @property
    def url(self) -> str:
        return f"file:{self.registry.directory}"

    @property
    def alive(self) -> bool:
        return True

    @property
    def died(self) -> bool:
        return False

    def fetch(self, digest: str) -> Fetched:
        begin = perf_counter()
        opened = self._read.get(digest) or self._open(digest)
        fetched = perf_counter()
        try:
            buffer, base = opened.map()
        except ArchiveError:
            opened = self._open(digest)  # deleted, or published anew, since it was read
            buffer, base = opened.map()
        seconds = {"fetch": fetched - begin, "map": perf_counter() - fetched}
        return Fetched(opened.description, opened.skeleton, buffer, "copy-on-write", seconds, base)

    def _open(self, digest: str) -> _Opened:
        self._read.pop(digest, None)
        archive, skeleton = self.registry.whole(digest)
        base = self.registry.base(digest)
        description = archive.description.over(base.description, own=False) if base else archive.description
        opened = self._read[digest] = _Opened(archive, base, description, skeleton)
        while len(self._read) > _READ:
            self._read.popitem(last=False)
        return opened

    def budget(self) -> Budget:
        return disk_budget(self.registry)

    def make_room(self, digest: str, nbytes: int) -> None:
        pass  # it needs none beside the registry's

    def publish(self, digest: str) -> None:
        self.registry.archive(digest)

    def bring(self, digest: str) -> int:
        opened = self._open(digest)
        return sum(archive.read_ahead() for archive in (opened.archive, opened.base) if archive is not None)

    def forget(self, digest: str) -> None:
        self._read.pop(digest, None)

    def condition(self) -> Condition:
        return of_files(self.url, self.registry.directory)

    def close(self, ending: bool = False) -> None:
        pass
