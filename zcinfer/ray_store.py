"""The store in Ray's shared memory: one copy of each model's weights per machine, whoever reads it.

A Ray object dies with the process that put it. So a detached actor, the *holder*, does its own ``ray.put`` from the
archive, on demand; when it is lost Ray starts it again and it puts again. Readers map the object's pages a second
time, copy-on-write (`sharing`). Every wait has a deadline of our own: Ray's are not kept when its raylet is gone.

Not for how a process gets into a Ray (`ray_session`), nor for the holder and what Ray knows of it (`ray_holder`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter, sleep
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode

import ray
import ray.experimental

from . import config, keeper, own_ray
from .archive import MARGIN, WEIGHTS
from .condition import UNAVAILABLE, Condition, of_ray
from .deadline import join_within
from .description import Bytes
from .errors import ArchiveError, ModelNotFound, StoreUnavailable, ZcinferError
from .holder import KEPT
from .ray_holder import ASKING, LOOKING, Head, find_holder, look, plasma, read_head
from .ray_session import Session, admitted, first_line, probe, refuse_another, why_silent
from .registry import Registry
from .sharing import Plasma
from .sizes import format_size
from .store import Budget, Fetched, registry_of
from .stores import PATIENCE

log = logging.getLogger("zcinfer")

T = TypeVar("T")

# Bytes a second
SLOWEST_DISK, SLOWEST_NETWORK = 50e6, 10e6
# Seconds after a call without an answer in which no other is made; twice as long after each further one, up to PATIENCE
_RESPITE = 4.0
# In the environment for a Ray that asks for our token
TOKEN = "RAY_AUTH_TOKEN_PATH"


class RayStore:
    """Shared memory of one Ray cluster, filled from one registry.

    Parameters
    ----------
    address : str
        "HOST:PORT" of the Ray cluster.
    registry : Registry
    environment : dict of str to str, optional
        Variables that Ray's clients need, as the path of the token of our own Ray. Default: found by asking.
    own : keeper.OwnRay, optional
        Ends with this store.

    Raises
    ------
    StoreUnavailable
        Nothing answers at that address within ``zcinfer.ray.timeout`` seconds, or it refuses our token.
    """

    def __init__(
        self,
        address: str,
        registry: Registry,
        environment: dict[str, str] | None = None,
        own: keeper.OwnRay | None = None,
    ):
        self.address = address
        self.registry = registry
        self._own = own
        self._timeout = float(config.get("ray.timeout"))
        self._lost = threading.Event()
        self._retry_at = self._look_at = 0.0
        self._silences = 0  # calls without an answer since the last one that had one
        self._why = ""
        self._raylet: int | None = None
        self._told_on_disk: set[str] = set()
        self._mapped: weakref.WeakValueDictionary[str, _Object] = weakref.WeakValueDictionary()
        self._kept: dict[str, tuple[float, _Object]] = {}
        self._keeping = threading.Lock()
        # A Ray just started needs a second or two to start its first worker process.
        patience = float(config.get("ray.start-timeout")) if own else self._timeout
        deadline = monotonic() + patience
        probe(address, patience)
        self._environment = environment or {}
        if own is None:
            self._environment = admitted(address, environment, patience)
        self._ours = TOKEN in self._environment
        self._session = Session.enter(
            address, self._environment, lambda call: self._within(deadline - monotonic(), call)
        )
        try:
            self._holder, raylet, self._offers = self._within(deadline - monotonic(), lambda: find_holder(self._ours))
        except BaseException:
            self._session.leave(self._timeout)
            raise
        if "torch" in sys.modules:  # a reader, and not a program that lists or deletes
            from .parts import warm_up

            warm_up()
        self._bell, self._wake = os.pipe2(os.O_CLOEXEC)
        if raylet is not None:
            with contextlib.suppress(ProcessLookupError):
                self._raylet = os.pidfd_open(raylet)
        threading.Thread(target=self._watch, args=(self._raylet,), daemon=True, name="zcinfer-ray-watch").start()

    @classmethod
    def start(cls, registry: Registry, begun: keeper.OwnRay | None = None) -> RayStore:
        """Start a Ray of our own on this machine, which ends with this store or this process.

        Parameters
        ----------
        registry : Registry
        begun : keeper.OwnRay, optional
            It has begun to start. Default: it begins now.
        """
        own = begun
        try:
            refuse_another(None)
            own = begun or own_ray.begin()
            own_ray.wait(own)
            return cls(own.address, registry, own_ray.environment(), own)
        except BaseException:
            if own is not None:
                own.stop()
            raise

    @classmethod
    def open(cls, url: str, registry: Registry | None = None) -> RayStore:
        """Connect to the store of a URL, filled from another registry if one is given."""
        address, _, query = url.removeprefix("ray:").partition("?")
        options = dict(parse_qsl(query))
        environment = own_ray.environment() if options.get("auth") == "own" else None
        return cls(address, registry or Registry(registry_of(url)), environment)

    @property
    def url(self) -> str:
        return store_url(self.address, self.registry, self._ours)

    @property
    def alive(self) -> bool:
        return not self._lost.is_set() and self._session.entered

    @property
    def died(self) -> bool:
        return self._lost.is_set()

    def fetch(self, digest: str) -> Fetched:
        begin = perf_counter()
        # Content under one digest never changes: while some module of it lives, there is nothing to ask.
        found = self._mapped.get(digest)
        if found is None:
            # Offers are for the first load alone: a reference that is kept keeps its object.
            offer, self._offers = self._offers.get(digest), {}
            found = self._mapped[digest] = self._within(self._patience(digest), lambda: self._get(digest, offer))
        self._keep(digest, found)
        description, skeleton = found.head
        fetched = perf_counter()
        try:
            buffer, protection = found.map(MARGIN, description.nbytes)
            base = found.base.map(MARGIN, found.base.nbytes - MARGIN)[0] if found.base is not None else None
        except OSError as error:
            raise StoreUnavailable(f"the weights in Ray at {self.address} cannot be mapped: {error}.") from error
        seconds = {"fetch": fetched - begin, "map": perf_counter() - fetched}
        return Fetched(description, skeleton, buffer, protection, seconds, base, self._is_on_disk(digest, found))

    def make_room(self, digest: str, nbytes: int) -> None:
        self._offers = {}  # who only publishes holds no models
        directory, evict = str(self.registry.directory), bool(config.get("store-eviction"))
        gone = self._within(
            self._timeout + evict * ASKING,
            lambda: ray.get(self._holder.make_room.remote(digest, nbytes, directory, evict)),
        )
        if gone:
            names = {version.digest: str(version) for version in self.registry.names.versions()}
            log.warning(
                "to make room for a model of %s, %s left the shared memory of Ray at %s: nobody used them. They come "
                "back from their archives when they are asked for.",
                format_size(nbytes),
                ", ".join(names.get(digest, digest[:12]) for digest in gone),
                self.address,
            )

    def publish(self, digest: str) -> None:
        try:
            self._publish(digest)
        except ModelNotFound:
            if not config.get("remote"):
                raise
            self.registry.archive(digest)  # fetched from its copy; the holder shares this directory, or tells
            self._publish(digest)
        except ArchiveError:
            self.registry.whole(digest)  # replaced by its copy
            self._publish(digest)

    def _publish(self, digest: str) -> None:
        self._within(self._patience(digest), lambda: self._ask(digest))

    def bring(self, digest: str) -> int:
        if digest in self._mapped:
            return 0
        left = self._retry_at - monotonic()
        if 0 < left <= _RESPITE and self.alive:
            sleep(left)  # who brings a model before it is needed would rather wait than be refused
        found, nbytes = self._within(self._patience(digest), lambda: self._bring(digest))
        self._keep(digest, found)
        self._is_on_disk(digest, found)
        return nbytes

    def forget(self, digest: str) -> None:
        self._offers = {}
        self._kept.pop(digest, None)
        self._within(self._timeout, lambda: ray.get(self._holder.forget.remote(digest)))

    def usage(self) -> tuple[int, int, dict[str, int]]:
        """Capacity of the store, bytes held, and bytes by digest."""
        usage: tuple[int, int, dict[str, int]] = self._within(
            self._timeout, lambda: ray.get(self._holder.usage.remote())
        )
        return usage

    def condition(self) -> Condition:
        # Not as `_within` does: who only looks must not have others refused.
        name = f"ray:{self.address}"
        self._check_raylet()
        if not self.alive:
            why = f"Ray at {self.address} has died" if self.died else f"this process has left Ray at {self.address}"
            return Condition(name, {}, f"{UNAVAILABLE}{why}; models that are loaded stay so", healthy=False)
        if monotonic() >= self._look_at:
            result, error = join_within(LOOKING, lambda: look(self.address, self._holder)) or (None, None)
            if result is not None:
                return of_ray(name, *result)
            self._why = f"no answer within {LOOKING} s" if error is None else first_line(error)
            if error is None:
                self._look_at = monotonic() + PATIENCE  # what hangs is left to hang
        return Condition(name, {}, f"{UNAVAILABLE}{self._why}", healthy=False)

    def budget(self) -> Budget:
        """Capacity and use of this machine's node of Ray, and the models that the holder has put."""
        return self._within(self._timeout, self._budget)

    def _budget(self) -> Budget:
        _, _, models = ray.get(self._holder.usage.remote())
        in_use, evicted = ray.get([self._holder.in_use.remote(), self._holder.evicted.remote()])
        _, found = plasma(self.address)
        return Budget(
            f"shared memory of Ray at {self.address}",
            found.object_store_bytes_avail,
            found.object_store_bytes_used - found.object_store_bytes_fallback,
            models,
            frozenset(in_use),
            found.object_store_bytes_fallback,
            found.spilled_bytes_total,
            evicted,
        )

    def _is_on_disk(self, digest: str, found: _Object) -> bool:
        """Whether Ray had no memory for a model, or for its base, here; told at the first time."""
        on_disk = found.is_on_disk or (found.base is not None and found.base.is_on_disk)
        if on_disk and digest not in self._told_on_disk:
            self._told_on_disk.add(digest)
            log.warning(
                "%s of %s lie in a file on this machine's disk, since Ray's memory here is full (zcinfer ls --store). "
                "Delete models that are not needed, let those go that nobody uses (zcinfer.store-eviction), or give "
                "Ray more memory.",
                format_size(found.nbytes),
                found.head[0].class_name,
            )
        return on_disk

    def _watch(self, raylet: int | None) -> None:
        """Leave Ray the moment its raylet dies, since Ray may end a process that stays; let go of what is kept."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if raylet is not None:
            poll.register(raylet, select.POLLIN)
        found: dict[int, int] = {}
        while self._wake >= 0 and raylet not in found:
            found = dict(poll.poll(self._let_go()))
            if self._bell in found:
                os.read(self._bell, 64)
        if raylet in found:
            self._lost.set()
            # Also how it looks when another program ends the Ray it has started: nothing to be alarmed by.
            log.info("the raylet of Ray at %s is gone; models that are loaded stay so", self.address)
            self._session.leave(self._timeout)
        self._raylet = None
        for descriptor in (self._bell, *(() if raylet is None else (raylet,))):
            os.close(descriptor)

    def _check_raylet(self) -> None:
        """Notice a raylet that has just died: Ray ends a process that then asks it for anything."""
        raylet = self._raylet
        if raylet is not None and not self._lost.is_set():
            with contextlib.suppress(OSError, ValueError):  # closed by the watch meanwhile
                if select.select([raylet], [], [], 0)[0]:
                    self._lost.set()

    def close(self, ending: bool = False) -> None:
        # Nobody writes any more to the memory of a Ray that has ended.
        if not (ending or self._lost.is_set() or self._own is not None):
            self._session.copy_loaded()
        self._lost.set()
        with self._keeping:
            self._kept.clear()
            wake, self._wake = self._wake, -1
        if wake >= 0:
            with contextlib.suppress(BrokenPipeError):  # the watch has ended, as Ray has
                os.write(wake, b"\0")  # closing alone is not heard where a forked process has it open, too
            os.close(wake)
        self._session.leave(self._timeout)
        if self._own is not None:
            self._own.stop()

    def _keep(self, digest: str, found: _Object) -> None:
        """Keep an object for some seconds more: who has loaded a model and dropped it often loads it again."""
        with self._keeping:
            if not self._kept and self._wake >= 0:
                with contextlib.suppress(BrokenPipeError):  # the watch has ended, as Ray has
                    os.write(self._wake, b"\0")
            self._kept[digest] = monotonic(), found

    def _let_go(self) -> float | None:
        """Drop what was kept long enough; milliseconds until there is more to drop, None where nothing is kept."""
        now = monotonic()
        with self._keeping:
            late = [self._kept.pop(digest) for digest, (since, _) in list(self._kept.items()) if now - since >= KEPT]
            next_one = min((since for since, _ in self._kept.values()), default=None)
        del late  # outside the lock: to drop an object takes time
        return None if next_one is None else max(0.0, next_one + KEPT - now) * 1e3 + 1

    def _get(self, digest: str, offer: tuple[Head, Any] | None) -> _Object:
        if offer is not None:
            try:
                return _Object(ray.get(offer[1]), offer[0])
            except ray.exceptions.ObjectLostError:
                pass  # its holder has died since; the next one puts it again
        head, references = self._ask(digest)
        try:
            arrays = ray.get(references)
        except ray.exceptions.ObjectLostError:
            ray.get(self._holder.forget_lost.remote(digest))
            head, references = self._ask(digest)
            arrays = ray.get(references)
        return _Object(arrays, read_head(head))

    def _bring(self, digest: str) -> tuple[_Object, int]:
        head, references = self._ask(digest)
        here = ray.get_runtime_context().get_node_id()
        places = ray.experimental.get_object_locations(references).values()
        nbytes = sum(place["object_size"] for place in places if here not in place["node_ids"])
        return _Object(ray.get(references), read_head(head)), nbytes

    def _ask(self, digest: str) -> tuple[bytes, list[Any]]:
        evict = bool(config.get("store-eviction"))
        answer: tuple[bytes, list[Any]] = ray.get(
            self._holder.fetch.remote(digest, str(self.registry.directory), evict)
        )
        return answer

    def _patience(self, digest: str) -> float:
        """Seconds to wait for a model: the holder may have to read it from a slow disk, the network to carry it."""
        patience = self._timeout + bool(config.get("store-eviction")) * ASKING
        try:
            nbytes = os.stat(self.registry.directory / "archives" / digest / WEIGHTS).st_size
        except OSError:
            # Another machine has the archive. All nodes may ask that one at a time, and there is no other way.
            directory = str(self.registry.directory)
            nbytes = int(self._within(self._timeout, lambda: ray.get(self._holder.size.remote(digest, directory))))
            return patience + nbytes / SLOWEST_NETWORK
        return patience + nbytes / SLOWEST_DISK

    def _within(self, seconds: float, function: Callable[[], T]) -> T:
        self._check_raylet()
        if self._lost.is_set():
            raise StoreUnavailable(f"Ray at {self.address} has died. Start another with zc.connect().")
        if (left := self._retry_at - monotonic()) > 0:
            raise StoreUnavailable(
                f"Ray at {self.address} did not answer a moment ago, and is asked again in {left:.0f} s."
            )
        outcome = join_within(seconds, function)
        if outcome is None:
            # Slow is not dead: what hangs is left to hang, and the next one to ask need not wait as long. A machine
            # that has too much to do answers soon; one that is gone is asked less and less.
            self._retry_at = monotonic() + min(PATIENCE, _RESPITE * 2**self._silences)
            self._silences = min(self._silences + 1, 10)
            raise StoreUnavailable(
                f"Ray at {self.address} has not answered within {max(seconds, 0):.0f} s: {why_silent(self.address)}. "
                "Mend that and call zc.connect() again, or use the store 'file'."
            )
        self._silences = 0
        result, error = outcome
        if error is None:
            return result  # type: ignore[no-any-return]
        cause = getattr(error, "cause", None)
        ours = cause if isinstance(cause, ZcinferError) else error
        if isinstance(ours, ZcinferError):
            raise ours
        raise StoreUnavailable(f"Ray at {self.address} failed: {type(error).__name__}: {first_line(error)}") from error


def store_url(address: str, registry: Registry, ours: bool) -> str:
    """URL of the store in the Ray at ``address``; ``ours``: one that asks for our token."""
    auth = {"auth": "own"} if ours else {}
    return f"ray:{address}?{urlencode({'registry': registry.directory, **auth})}"


class _Object(Plasma):
    """A model's weights in Ray's store, those of its base, and its description and skeleton."""

    def __init__(self, arrays: Sequence[Bytes], head: Head):
        super().__init__(arrays[0])
        self.base = Plasma(arrays[1]) if len(arrays) > 1 else None
        self.head = head
