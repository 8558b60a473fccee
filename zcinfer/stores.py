"""The stores this process has open, by URL. Not for choosing one (`catalog`)."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from time import monotonic

from .errors import SettingsError, StoreUnavailable
from .store import FileStore, Store

# Seconds for which a store that did not answer is not asked again: each question costs its time limit.
PATIENCE = 60.0

_open: dict[str, Store] = {}
_refused: dict[str, tuple[float, str]] = {}
_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def is_open(url: str) -> bool:
    """Whether this process has that store open."""
    return url in _open


def opened() -> dict[str, Store]:
    """The stores that this process has open, by URL."""
    return dict(_open)


def refused() -> dict[str, str]:
    """Why stores are not opened at present, by URL."""
    return {url: reason for url, (until, reason) in dict(_refused).items() if monotonic() < until}


def open_store(url: str) -> Store:
    """The store of a URL; opened once a process.

    Raises
    ------
    StoreUnavailable
        It does not answer, or did not a moment ago.
    """
    store = _open.get(url)
    if store is not None and store.alive:
        return store
    with _locks[url]:
        store = _open.get(url)
        if store is not None and store.alive:
            return store
        if store is not None and store.died:
            # Its service has died: to connect to what is left of it would end this process, or hang.
            del _open[url]
            _refused[url] = monotonic() + PATIENCE, f"The store {url.partition('?')[0]} has died."
            store.close()
        until, reason = _refused.get(url, (0.0, ""))
        if monotonic() < until:
            raise StoreUnavailable(reason)
        try:
            _open[url] = _new(url)
        except StoreUnavailable as error:
            _refused[url] = monotonic() + PATIENCE, str(error)
            raise
        return _open[url]


def keep_store(store: Store) -> None:
    """Have `open_store` return this store for its URL."""
    _open[store.url] = store


def drop_store(store: Store, ending: bool = False) -> None:
    """Close a store and forget it; what is loaded stays what it is, unless the process ends."""
    if _open.get(store.url) is store:
        del _open[store.url]
    store.close(ending)


def close_all() -> None:
    """Close all stores of this process, which ends."""
    while _open:
        _open.popitem()[1].close(ending=True)


def _leave_to_parent() -> None:
    # A forked child has the parent's connections to Ray, and none of the threads that serve them.
    for url in [url for url in _open if url.startswith("ray:")]:
        del _open[url]
        _refused[url] = (
            float("inf"),
            "This process was forked from one that is in Ray and cannot follow: use spawn.",
        )


os.register_at_fork(after_in_child=_leave_to_parent)


def _new(url: str) -> Store:
    kind, _, rest = url.partition(":")
    if kind == "file":
        return FileStore(rest)
    if kind == "ray":
        from .ray_store import RayStore  # a second of imports, for those who use it

        return RayStore.open(url)
    raise SettingsError(f"{url!r} is no store's URL: it begins with 'ray:' or 'file:'")
