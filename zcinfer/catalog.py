"""The verbs on models: connect, put, load, models, save, delete. Names in, refs and modules out.

One store is current in a process: the one `connect` chose. `put`, `models`, `save` and `delete` work on the registry
alone and start no Ray.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import config
from .archive import Archive
from .description import Description
from .errors import ModelNotFound, SettingsError, ZcinferError
from .loading import drop_store, keep_store, load_ref, open_store, residents
from .parts import join, split
from .registry import Registry, Version
from .store import FileStore, ModelRef, Store

if TYPE_CHECKING:
    import pandas as pd

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
        if kind == "file":
            directory = config.local_directory(rest, "the store's directory") if rest else config.registry_directory()
            chosen: Store = FileStore(directory)
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
        atexit.unregister(disconnect)
        atexit.register(disconnect)
        return chosen


def disconnect() -> None:
    """Let go of the current store; a Ray that we started ends."""
    global _current
    with _lock:
        if _current is not None:
            residents.clear()
            drop_store(_current)
            _current = None


def put(model: torch.nn.Module | str | Path, name: str | None = None, *, trust: bool = False) -> ModelRef:
    """Publish a model.

    Parameters
    ----------
    model : torch.nn.Module or path
        A module (it is not changed), or the directory of an archive that `save` wrote.
    name : str, optional
        Default: the class's name in lower case, or the archive directory's.
    trust : bool
        Open an archive that this user has not written. A skeleton is a pickle: opening one runs code from it.

    Returns
    -------
    ModelRef
        The same content under the same name gives the same ref, from any process.

    Raises
    ------
    SplitError
        The model cannot be taken apart; the message names the attribute.
    ArchiveError
        The archive is truncated, altered, or not known to this user and not trusted.
    StoreFull
        It does not fit into the shared memory of the connected store.

    Examples
    --------
    >>> ref = put(torch.nn.Linear(2, 3).eval(), "doc-linear")
    >>> ref.nbytes > 24, ref == put(load("doc-linear"), "doc-linear")
    (True, True)
    """
    registry = _registry()
    if isinstance(model, str | Path):
        path = Path(model)
        if not path.is_dir():
            raise ModelNotFound(f"no archive at {path}: pass a module, or the directory of an archive that save wrote")
        opened = Archive(path) if trust else registry.open_trusted(path)
        opened.verify()
        name = name or path.name
        model = join(opened.skeleton(), opened.description, opened.weights())
    parts = split(model)
    name = name or type(model).__name__.lower()
    # Before anything is written, so that nothing has to be taken back.
    registry.make_room(parts.description.digest, parts.description.nbytes)
    if _current is not None:
        _current.make_room(parts.description.digest, parts.description.nbytes)
    version = registry.add(parts, name)
    if _current is not None:
        _current.publish(version.digest)
    return _ref(registry, version)


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
    registry = _registry()
    return _ref(registry, registry.resolve(model))


def ready(model: str | ModelRef) -> ModelRef:
    """The ref of a model that is ready in the current store, for the readers of this process and of workers."""
    if _in_dask_worker():
        # A worker takes what its task's ref says; it never chooses a store, or starts one, for itself.
        return resolve(model)
    store = connect()
    ref = replace(resolve(model), store=store.url)
    store.publish(ref.digest)
    return ref


def archive(ref: ModelRef) -> Archive:
    """The archive of a model in the registry."""
    return _registry().archive(ref.digest)


@lru_cache(maxsize=64)
def _read(directory: Path, digest: str) -> tuple[Description, bytes]:
    found = Registry(directory).archive(digest)
    return found.description, found.skeleton()


def describe(ref: ModelRef) -> tuple[Description, bytes]:
    """Description and skeleton of a model, without its weights."""
    if _in_dask_worker():
        fetched = open_store(ref.store).fetch(ref.digest)
        return fetched.description, fetched.skeleton
    return _read(_registry().directory, ref.digest)


def load(model: str | ModelRef, device: str | torch.device | None = None) -> torch.nn.Module:
    """Build a fresh module from the current store.

    Parameters
    ----------
    model : str or ModelRef
        A name means its newest version.
    device : str or torch.device, optional
        Moved there; default: left in shared host memory.

    Returns
    -------
    torch.nn.Module
        In the mode it was published in. Its weights are views of shared memory; writes stay in this process.
    """
    return load_ref(ready(model), device)


def models() -> pd.DataFrame:
    """Table of all published models, one row a version.

    Returns
    -------
    pandas.DataFrame
        Columns name, version, nbytes (bytes of weights), tensors (number), shared and private (bytes that all
        readers have in common, and that each has for itself), class, created, digest. Models whose archive is damaged
        have ``nbytes`` 0 and the reason as ``class``.
    """
    import pandas as pd

    registry = _registry()
    rows = []
    for version in registry.versions():
        try:
            found = registry.archive(version.digest).description
            sizes = (found.nbytes, len(found.tensors), found.nbytes, found.skeleton_nbytes, found.class_name)
        except ZcinferError as error:
            sizes = (0, 0, 0, 0, f"damaged: {error}")
        rows.append((version.name, version.version, *sizes, version.created, version.digest))
    columns = ["name", "version", "nbytes", "tensors", "shared", "private", "class", "created", "digest"]
    return pd.DataFrame(rows, columns=columns)


def save(model: torch.nn.Module | str | ModelRef, path: str | Path) -> Path:
    """Write an archive of a model anywhere, without registering it.

    Parameters
    ----------
    model : torch.nn.Module, str or ModelRef
    path : path
        A new directory.

    Returns
    -------
    pathlib.Path
    """
    registry = _registry()
    if not isinstance(model, torch.nn.Module):
        opened = registry.archive(resolve(model).digest)
        model = join(opened.skeleton(), opened.description, opened.weights())
    return registry.save(split(model), Path(path).expanduser().absolute()).directory


def delete(model: str | ModelRef) -> None:
    """Forget a name and all its versions ("bert@2": that version alone).

    Who has a model loaded keeps it; the archive and the shared memory go once nobody uses them.
    """
    registry = _registry()
    orphans = registry.remove(str(model) if isinstance(model, ModelRef) else model)
    if _current is not None:
        for digest in orphans:
            _current.forget(digest)


def _registry() -> Registry:
    return _current.registry if _current is not None else Registry(config.registry_directory())


def _ref(registry: Registry, version: Version) -> ModelRef:
    nbytes = registry.archive(version.digest).description.nbytes
    url = _current.url if _current is not None else FileStore(registry.directory).url
    return ModelRef(version.name, version.version, version.digest, nbytes, url)


def _open_ray(address: str) -> Store:
    address = address or str(config.get("ray.address") or "") or os.environ.get("RAY_ADDRESS", "")
    if not address:
        url = _store_of_cluster()
        if url is not None:
            return open_store(url)
    from .ray_store import RayStore  # a second of imports, for those who use it

    registry = Registry(config.registry_directory())
    if address:
        return RayStore(address, registry)
    store = RayStore.start(registry)
    client = _dask_client()
    if client is not None:
        client.set_metadata(["zcinfer-store"], store.url)
    return store


def _store_of_cluster() -> str | None:
    """URL of the Ray that an earlier client of our Dask cluster has connected it to, if it still answers."""
    from .errors import StoreUnavailable

    client = _dask_client()
    url: str | None = client.get_metadata(["zcinfer-store"], None) if client is not None else None
    if url is not None:
        try:
            open_store(url)
        except StoreUnavailable:
            return None
    return url


def _dask_client() -> Any:
    """The current Dask client, without importing distributed for those who do not use it."""
    worker = sys.modules.get("distributed.client")
    if worker is None:
        return None
    try:
        return worker.default_client()
    except ValueError:
        return None


def _in_dask_worker() -> bool:
    worker = sys.modules.get("distributed.worker")
    if worker is None:
        return False
    try:
        worker.get_worker()
    except ValueError:
        return False
    return True
