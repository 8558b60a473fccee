"""What a job reads: zarr arrays by path or URL, or dask arrays; and what tells one input from another.

Not for targets (`target`).
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from socket import gethostname
from typing import Any

import dask.array as da
import numpy as np
import zarr
from zarr.storage import LocalStore

from .config import local_directory
from .errors import InputError, SettingsError


class _Source:
    """A zarr array that is opened where it is read. One that is not there is an error, and not all fill values."""

    def __init__(self, url: str, array: Any):
        self.url = url
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype

    def __getitem__(self, index: Any) -> Any:
        try:
            array: Any = zarr.open_array(self.url, mode="r")
        except Exception as error:
            raise InputError(
                f"there is no zarr array at {self.url} on {gethostname()} ({_first_line(error)}): all workers must "
                "see it, until the job is done"
            ) from error
        return array[index]


def open_source(source: Any, name: str, axis: int = 0) -> da.Array:
    """A source as a dask array, a file's in its chunks along one axis; ``name`` is what to call it in errors."""
    if isinstance(source, da.Array):
        if source.ndim and source.shape[0] != source.shape[0]:
            raise InputError(f"{name} is a dask array of an unknown number of rows: call compute_chunk_sizes() on it")
        return source
    directory = directory_of(source)
    if isinstance(source, zarr.Array):
        found: Any = source
    elif isinstance(source, str | Path):
        try:
            found = zarr.open(str(source), mode="r")
        except Exception as error:
            raise InputError(f"{name}: there is no zarr array at {source} ({_first_line(error)})") from error
    else:
        raise InputError(f"{name} is a {type(source).__name__}: give the path or URL of a zarr array, or a dask array")
    if isinstance(found, zarr.Group):
        inside = ", ".join(f"{source}/{key}" for key, _ in list(found.arrays())[:5]) or "it has no arrays"
        raise InputError(f"{name}: {source} is a zarr group; give one of its arrays: {inside}")
    if found.ndim == 0:
        raise InputError(f"{name}: {source} is a single number: the rows are along axis 0")
    if directory is None and isinstance(source, zarr.Array):
        return da.from_zarr(found)  # of a store that has no path
    return da.from_array(
        _Source(str(directory or source), found),
        chunks=tuple(found.chunks[a] if a in (axis, axis + found.ndim) else n for a, n in enumerate(found.shape)),
        name=False,
        meta=np.empty((0,) * found.ndim, found.dtype),
    )


def stamp(source: Any, array: Any) -> dict[str, Any]:
    """What tells this input from another, in JSON types."""
    if isinstance(source, da.Array):
        # Its name says nothing of the files behind it: no two runs are taken to be of the same content.
        return {"dask": uuid.uuid4().hex}
    found: dict[str, Any] = {"url": str(source), "shape": list(array.shape), "dtype": str(array.dtype)}
    directory = directory_of(source)
    if directory is not None:
        # zarr replaces files, so that a directory changes with each chunk written into it.
        changed = max(os.stat(place).st_mtime_ns for place, _, _ in os.walk(directory))
        found |= {"url": str(directory), "modified": changed}
    return found


def directory_of(source: Any) -> Path | None:
    """Directory of this machine that a source lies in."""
    if isinstance(source, zarr.Array):
        return Path(source.store.root, source.path).resolve() if isinstance(source.store, LocalStore) else None
    try:
        return local_directory(str(source), "").resolve() if isinstance(source, str | Path) else None
    except SettingsError:
        return None  # a URL of another kind


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
