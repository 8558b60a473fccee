"""Names in, refs out: what is published, and which store this process uses.

One store is current in a process: the one `connect` chose. `models`, `delete` and `resolve` work on the registry alone
and start no Ray. Torch is not imported here (`publishing` has put, load and save).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config
from .archive import Archive
from .description import Description
from .errors import ArchiveError, ModelNotFound, SettingsError, StoreUnavailable, ZcinferError
from .names import Version
from .registry import Registry
from .store import Budget, FileStore, ModelRef, Store, disk_budget, registry_of
from .stores import drop_store, keep_store, open_store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("zcinfer")

# Called before a model is made ready for readers, which they may refuse.
guards: list[Callable[[], object]] = []

_current: Store | None = None
_lock = threading.RLock()


def connect(store: str | None = None) -> Store:
    """Choose the store that this process uses, and start it if need be.

    Parameters
    ----------
    store : str, optional
        - ``"ray"``: the Ray of setting ``zcinfer.ray.address`` or ``RAY_ADDRESS``; else that of the Dask cluster this
          process is a client of; else one of our own, started here and ended with this process
        - ``"ray:HOST:PORT"``: that Ray
        - ``"file"``: memory-mapped archives of the registry; no Ray
        - ``"file:DIR"``: the same with ``DIR`` as the registry

        Default: the setting ``zcinfer.store`` ("ray"); a store already chosen is kept.

    Returns
    -------
    Store

    Raises
    ------
    StoreUnavailable
        No Ray answers at the address.
    SettingsError
        No such kind of store.

    Examples
    --------
    >>> connect("file").url.startswith("file:")
    True
    """
    global _current
    with _lock:
        if _current is not None and not _current.alive:
            disconnect()
        if store is None:
            if _current is not None:
                return _current
            store = str(config.get("store"))
        kind, _, rest = store.partition(":")
        if kind == "ray" and "?" in rest:
            chosen: Store = open_store(store)  # a URL, as another program printed it
        elif kind == "file":
            directory = config.registry_at(rest, "the store's directory") if rest else config.registry_directory()
            chosen = FileStore(directory)
        elif kind == "ray":
            if not rest and _current is not None and _current.url.startswith("ray:"):
                return _current
            chosen = _open_ray(rest)
        else:
            raise SettingsError(f"no store {store!r}: choose 'ray', 'ray:HOST:PORT', 'file' or 'file:DIR'")
        if _current is not None and _current.url != chosen.url:
            drop_store(_current)
        keep_store(chosen)
        _current = chosen
        # Registered last, to run first: before what started a Ray of our own ends it.
        atexit.unregister(_disconnect)
        atexit.register(_disconnect, ending=True)
        return chosen


def disconnect() -> None:
    """Let go of the current store; a Ray that we started ends. What is loaded stays loaded.

    Called at the end of the program by itself.

    Examples
    --------
    >>> _ = connect("file")
    >>> disconnect()

    Notes
    -----
    What is loaded from a Ray that goes on is copied, into memory of this process: drop it before, if it is not needed.
    """
    _disconnect(ending=False)


def _disconnect(ending: bool) -> None:
    global _current
    with _lock:
        if _current is not None:
            drop_store(_current, ending)
            _current = None


def current() -> Store | None:
    """The store that `connect` chose, if it can be used."""
    return _current if _current is not None and _current.alive else None


def registry() -> Registry:
    """The registry of the current store, else that of the settings."""
    return _current.registry if _current is not None else Registry(config.registry_directory())


def resolve(model: str | ModelRef) -> ModelRef:
    """The ref that a name ("bert", or "bert@2" for an older version) means now; refs are themselves.

    Raises
    ------
    ModelNotFound
        With the nearest names.
    """
    if isinstance(model, ModelRef):
        return model
    if not isinstance(model, str):
        raise SettingsError(f"a model is given by its name or its ModelRef, found {type(model).__name__}: put it first")
    return ref_of(registry().names.resolve(model))


def ref_of(version: Version) -> ModelRef:
    """The ref of a version in the registry."""
    found = registry()
    nbytes = found.archive(version.digest).description.nbytes
    url = _current.url if _current is not None else FileStore(found.directory).url
    return ModelRef(version.name, version.version, version.digest, nbytes, url)


def ready(model: str | ModelRef) -> ModelRef:
    """The ref of a model that is ready in the current store, for the readers of this process and of workers."""
    if _in_dask_worker():
        # A worker takes what its task's ref says; it never chooses a store, or starts one, for itself.
        return resolve(model)
    for check in guards:
        check()
    store = connect()
    ref = replace(resolve(model), store=store.url)
    store.publish(ref.digest)
    return ref


def archive(ref: ModelRef) -> Archive:
    """The archive of a model in the registry."""
    return registry().archive(ref.digest)


def describe(ref: ModelRef) -> tuple[Description, bytes]:
    """Description and skeleton of a model, without its weights."""
    try:
        return _read(registry_of(ref.store), ref.digest)
    except (ModelNotFound, ArchiveError):
        # Its registry is on another machine; the store has it all the same.
        fetched = open_store(ref.store).fetch(ref.digest)
        return fetched.description, fetched.skeleton


@lru_cache(maxsize=64)
def _read(directory: Path, digest: str) -> tuple[Description, bytes]:
    found = Registry(directory).local(digest)
    return found.description, found.skeleton()


def models() -> pd.DataFrame:
    """Table of all published models, one row a version.

    Returns
    -------
    pandas.DataFrame
        Columns name, version, nbytes (bytes of weights), tensors (number), shared and private (bytes that all
        readers have in common, and that each has for itself), own and base (of the shared bytes those that no other
        model has, and those that lie in the base's memory), why (what of the model cannot be shared), class, created,
        digest. Models whose archive is damaged have ``nbytes`` 0 and the reason as ``class``. Notebooks show sizes in
        words.

    Examples
    --------
    >>> import torch, zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(2, 3), "doc-models")
    >>> table = models().set_index("name")
    >>> int(table.loc["doc-models", "tensors"])
    2
    """
    from .model_table import ModelTable  # and pandas

    found = registry()
    rows = []
    for version in found.names.versions():
        try:
            described, base = found.local(version.digest).description, found.base(version.digest)
            nbytes, private = described.nbytes, described.private_nbytes
            why = "; ".join(what for what, _ in described.private)
            own = described.over(base.description).nbytes if base is not None else nbytes
            sizes = (nbytes, len(described.tensors), nbytes, private, own, nbytes - own, why, described.class_name)
        except ZcinferError as error:
            sizes = (0, 0, 0, 0, 0, 0, "", f"damaged: {error}")
        rows.append((version.name, version.version, *sizes, version.created, version.digest))
    columns = [
        "name",
        "version",
        "nbytes",
        "tensors",
        "shared",
        "private",
        "own",
        "base",
        "why",
        "class",
        "created",
        "digest",
    ]
    return ModelTable(rows, columns=columns)


def budgets() -> list[Budget]:
    """How full the registry's disk is, and the current store where that is not the same.

    Returns
    -------
    list of Budget

    Examples
    --------
    >>> import zcinfer as zc
    >>> _ = zc.connect("file")
    >>> budgets()[0].used <= budgets()[0].capacity
    True
    """
    found, store = [disk_budget(registry())], current()
    if store is not None and not isinstance(store, FileStore):
        found.append(store.budget())
    return found


def delete(model: str | ModelRef) -> None:
    """Forget a name and all its versions ("bert@2", or a ref: that version alone).

    Who has a model loaded keeps it; the archive and the shared memory go once nobody uses them.

    Parameters
    ----------
    model : str or ModelRef

    Raises
    ------
    ModelNotFound
        Nothing has that name; or the ref's version is not, or no longer, what the ref says.

    Examples
    --------
    >>> import torch, zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(2, 3), "doc-delete")
    >>> delete("doc-delete")
    >>> "doc-delete" in set(models()["name"])
    False
    """
    name, digest = (str(model), model.digest) if isinstance(model, ModelRef) else (model, None)
    orphans = registry().remove(name, digest)
    store = current()
    if store is not None:
        try:
            for orphan in orphans:
                store.forget(orphan)
        except StoreUnavailable as error:
            log.warning("%s is deleted, but its shared memory is not yet free: %s", name, error)


def _open_ray(address: str) -> Store:
    address = address or str(config.get("ray.address") or "") or os.environ.get("RAY_ADDRESS", "")
    found = Registry(config.registry_directory())
    client = dask_client()
    url: str | None = client.get_metadata(["zcinfer-store"], None) if client is not None and not address else None
    from . import own_ray

    # Ray takes a second to import and seconds to start: both at once
    begun = own_ray.begin() if not address and url is None and "ray" not in sys.modules else None
    try:
        from .ray_store import RayStore
    except BaseException:
        if begun is not None:
            begun.stop()
        raise
    if address:
        return RayStore(address, found)
    if url is not None:
        # The Ray that an earlier client has connected the cluster to, if it still answers; the registry is ours.
        try:
            return RayStore.open(url, found)
        except StoreUnavailable as error:
            log.info("the cluster's last store is gone (%s); starting another", error)
    store = RayStore.start(found, begun)
    if client is not None:
        client.set_metadata(["zcinfer-store"], store.url)
    return store


def dask_client() -> Any:
    """The current Dask client, without importing distributed for those who do not use it."""
    module = sys.modules.get("distributed.client")
    if module is None:
        return None
    try:
        client = module.default_client()
    except ValueError:
        return None
    # One that found no scheduler stays the current one, and would fail whatever it is asked. (One that has lost its
    # scheduler knows it still.)
    found_none = client.status == "connecting" and not client._scheduler_identity
    return None if found_none else client


def _in_dask_worker() -> bool:
    module = sys.modules.get("distributed.worker")
    if module is None:
        return False
    try:
        module.get_worker()
    except ValueError:
        return False
    return True
