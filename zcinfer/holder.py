"""The actor that owns the models in Ray's shared memory, and puts them there from their archives, on demand.

What a Ray object needs is an owner that lives: readers come and go. Not for how it is reached (`ray_holder`), which
is also what gives it Ray's put and get.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from socket import gethostname
from time import monotonic, sleep
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .archive import MARGIN, Archive
from .description import Bytes, Description
from .errors import ModelNotFound, StoreFull
from .occupancy import is_mapped, mapped_spans
from .registry import Registry
from .sharing import Plasma
from .sizes import format_size

# Models that a reader is told of when it connects: its first load then needs no question.
_OFFERED = 16

# Seconds for which a reader keeps an object that it has just used, and so its memory.
KEPT = 3.0

# Seconds in which who has asked for a model has it mapped; and for a question of the holder's own.
_MAPPED_WITHIN, _ANSWERED_WITHIN = 1.0, 0.5


class _Held(NamedTuple):
    """A model in the store: bytes of its own object, pickle of description and skeleton, objects, registry, last use
    (by the clock of `time.monotonic`).
    """

    nbytes: int
    head: bytes
    references: list[Any]
    registry: str
    used: float


class Holder:
    """The actor that owns the objects. One per Ray cluster; it holds no torch and no model, only bytes.

    Parameters
    ----------
    capacity : int
        Bytes of the store.
    put, get, places : callable
        Ray's; the last tells which machines have an object.
    mapped_elsewhere : callable
        Gives, of objects and the machines that have them, those that readers of other machines than this have mapped.
    """

    def __init__(
        self,
        capacity: int,
        put: Callable[[Bytes], Any],
        get: Callable[..., Bytes],
        places: Callable[..., dict[Any, Any]],
        mapped_elsewhere: Callable[[Mapping[Any, Sequence[str]]], set[Any]],
    ):
        self._capacity = capacity
        self._put = put
        self._get = get
        self._places = places
        self._mapped_elsewhere = mapped_elsewhere
        self._objects: dict[str, _Held] = {}  # those used last come last
        self._evicted = 0
        self._forgotten: list[tuple[float, int]] = []
        self._page = self._put(np.zeros(1 << 17, np.uint8))  # below 100 kB Ray would send the bytes themselves
        self._arena = Plasma(self._get(self._page)).file

    def greet(self) -> tuple[list[Any], dict[str, tuple[bytes, list[Any]]]]:
        """A small object in shared memory, and what `fetch` gives for the models used last."""
        # Objects in lists are passed on unread.
        last = list(self._objects.items())[-_OFFERED:]
        return [self._page], {digest: (held.head, held.references) for digest, held in last}

    def fetch(self, digest: str, registry: str, evict: bool = False) -> tuple[bytes, list[Any]]:
        """Pickle of description and skeleton, and the object (in a list, so that it is passed on unread).

        A second object is that of the base in which some of the storages lie. With ``evict`` models that nobody uses
        may go to make room for it.
        """
        if digest not in self._objects:
            archive, base = _archive(digest, registry), Registry(registry).base(digest)
            description, weights = archive.description, archive.padded_weights()
            others: list[Any] = []
            if base is not None:
                _, others = self.fetch(base.description.digest, registry, evict)
                if len(others) > 1:
                    others = []  # held as a variant itself, from before it became a base; this one is put whole
                else:
                    description = description.over(base.description)
                    weights = _own_weights(archive, description)
            self.make_room(digest, description.nbytes, registry, evict, keep=others)
            head = pickle.dumps((description, archive.skeleton()))
            reference = self._put(weights)
            if Plasma(self._get(reference)).file != self._arena:
                # Plasma was fuller than we knew: a deleted model that somebody still maps, or objects of others.
                del reference
                self._refuse(description.nbytes, registry, "no room in one piece", evict)
            self._objects[digest] = _Held(description.nbytes, head, [reference, *others], registry, monotonic())
        held = self._objects[digest] = self._objects.pop(digest)._replace(used=monotonic())
        return held.head, held.references

    def size(self, digest: str, registry: str) -> int:
        """Bytes of a model's weights, whether they are in the store or not yet."""
        return _archive(digest, registry).description.nbytes

    def forget(self, digest: str) -> None:
        """Drop one model; its memory is free once the last reader has let go."""
        forgotten = self._objects.pop(digest, None)
        if forgotten is not None:
            self._forgotten.append((monotonic(), forgotten.nbytes))

    def forget_lost(self, digest: str) -> None:
        """Drop a model whose object is lost, or its base's, and all that share one with it."""
        lost = set(self._objects[digest].references) if digest in self._objects else set()
        for other in [other for other, held in self._objects.items() if lost & set(held.references)]:
            self.forget(other)

    def usage(self) -> tuple[int, int, dict[str, int]]:
        """Capacity of the store, bytes held, and bytes by digest."""
        held = {digest: found.nbytes for digest, found in self._objects.items()}
        return self._capacity, sum(held.values()), held

    def in_use(self) -> set[str]:
        """Digests of the models that are mapped by readers of this machine, are the base of one that is held, or have
        copies on other machines, whose readers are asked for when room is needed (`_used`).
        """
        here, copied = self._uses()
        return here | copied.keys()

    def _used(self) -> set[str]:
        """Digests of the models that must not go: readers have them mapped, on this machine or another, or a base."""
        here, copied = self._uses()
        mapped = self._mapped_elsewhere(dict(copied.values())) if copied else set()
        return here | {digest for digest, (reference, _) in copied.items() if reference in mapped}

    def _uses(self) -> tuple[set[str], dict[str, tuple[Any, list[str]]]]:
        """Digests of bases and of what is mapped on this machine; of the others with copies, objects and machines."""
        places = self._places(
            [held.references[0] for held in self._objects.values()], timeout_ms=int(1000 * _ANSWERED_WITHIN)
        )
        bases = {reference for held in self._objects.values() for reference in held.references[1:]}
        machines = {
            digest: list(places.get(held.references[0], {}).get("node_ids", ()))
            for digest, held in self._objects.items()
        }
        in_memory = [digest for digest, nodes in machines.items() if nodes]
        mapped = are_mapped([self._objects[digest].references[0] for digest in in_memory], self._get)
        here = {digest for digest, is_mapped in zip(in_memory, mapped, strict=True) if is_mapped}
        here |= {digest for digest, held in self._objects.items() if held.references[0] in bases}
        copied = {
            digest: (self._objects[digest].references[0], nodes)
            for digest, nodes in machines.items()
            if len(nodes) > 1 and digest not in here
        }
        return here, copied

    def evicted(self) -> int:
        """Number of models that have gone to make room for others."""
        return self._evicted

    def make_room(
        self, digest: str, nbytes: int, registry: str, evict: bool = False, keep: Sequence[Any] = ()
    ) -> list[str]:
        """Refuse a model that would not fit: Plasma itself would put it into a file on disk, and say nothing.

        With ``evict`` models that nobody uses go first, those used longest ago, if that is enough, but none with an
        object to ``keep``. Returns their digests.
        """
        if digest in self._objects:
            return []
        self._forget_deleted()
        capacity, used, _ = self.usage()
        lacking = used + nbytes + MARGIN - capacity
        gone, in_use = self._evict(lacking, keep) if evict and lacking > 0 else ([], None)
        used = self.usage()[1]
        if used + nbytes + MARGIN > capacity:
            why = f"{format_size(used)} of the store's {format_size(capacity)} are taken"
            self._refuse(nbytes, registry, why, evict, in_use)
        # What was deleted a moment ago, readers may keep for a moment more.
        self._forgotten = [(since, size) for since, size in self._forgotten if monotonic() - since < KEPT + 0.5]
        if used + nbytes + MARGIN + sum(size for _, size in self._forgotten) > capacity:
            sleep(max(0.0, max(since for since, _ in self._forgotten) + KEPT + 0.5 - monotonic()))
        return gone

    def _evict(self, nbytes: int, keep: Sequence[Any]) -> tuple[list[str], set[str]]:
        """Digests of those that have gone, and of those in use."""
        sleep(max([0.0, *(held.used + _MAPPED_WITHIN - monotonic() for held in self._objects.values())]))
        used = self._used()
        gone: list[str] = []
        for digest, held in self._objects.items():
            if digest not in used and held.references[0] not in keep:
                gone.append(digest)
                nbytes -= held.nbytes
                if nbytes <= 0:
                    break
        if nbytes > 0:
            return [], used  # it would not help
        for digest in gone:
            self.forget(digest)
        self._evicted += len(gone)
        return gone, used

    def _forget_deleted(self) -> None:
        # Programs that are not connected (`zcinfer rm`) delete in the registry alone.
        registries = {held.registry for held in self._objects.values()}
        known = {registry: Registry(registry).digests() for registry in registries}
        for digest, held in list(self._objects.items()):
            if digest not in known[held.registry]:
                self.forget(digest)

    def _refuse(self, nbytes: int, registry: str, why: str, evict: bool, in_use: set[str] | None = None) -> NoReturn:
        names = {version.digest: str(version) for version in Registry(registry).names.versions()}
        # Other machines are not asked again: who waits for this would give up
        held, used = self.usage()[2], self.in_use() if in_use is None else in_use
        listed = ", ".join(
            f"{names.get(digest, digest[:12])} ({format_size(size)}{', in use' if digest in used else ''})"
            for digest, size in held.items()
        )
        eviction = "" if evict else "have those go that nobody uses (DASK_ZCINFER__STORE_EVICTION=true), "
        raise StoreFull(
            f"a model of {format_size(nbytes)} does not fit: {why}{'; held are ' + listed if listed else ''}. "
            f"Delete what is not needed (zcinfer rm NAME), {eviction}or give Ray more memory "
            "(DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY, or ray start --object-store-memory), or use the store 'file'."
        )


def are_mapped(references: Sequence[Any], get: Callable[..., Bytes]) -> list[bool]:
    """Which objects, of those in this machine's memory, its readers have mapped."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    return [_is_mapped(reference, get, spans) for reference in references]


def _is_mapped(reference: Any, get: Callable[..., Bytes], spans: dict[tuple[int, int], list[tuple[int, int]]]) -> bool:
    try:
        found = Plasma(get(reference, timeout=_ANSWERED_WITHIN))
    except TimeoutError:  # Ray's is one: too busy to tell, or on its way back from the disk; it stays
        return True
    except Exception:  # spilled or lost meanwhile: not in memory, and so in nobody's
        return False
    if found.file is None:
        return True
    if found.file not in spans:
        spans[found.file] = mapped_spans(*found.file)
    # The page in front belongs to it alone; what is mapped of an object before it ends there.
    return is_mapped(found.start + MARGIN, spans[found.file])


def _archive(digest: str, registry: str) -> Archive:
    try:
        # What is not here is fetched by who asks (see `RayStore.publish`): others would wait for it in this queue.
        return Registry(registry).local(digest)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"{error} This was asked on the machine {gethostname()}, where Ray's memory is filled from archives: on "
            "clusters of several machines publish on that of the head, or keep the registry (zcinfer.registry) in a "
            "directory that all have in common."
        ) from error


def _own_weights(archive: Archive, description: Description) -> Bytes:
    """The storages that do not lie in the base, where the description has them, with a margin in front."""
    whole = archive.weights()
    padded = np.zeros(MARGIN + description.nbytes, np.uint8)
    for number, (spec, place) in enumerate(zip(archive.description.storages, description.storages, strict=True)):
        if number not in description.in_base:
            start = MARGIN + place.offset
            padded[start : start + spec.nbytes] = whole[spec.offset : spec.offset + spec.nbytes]
    return padded
