"""Which array a user means: zarr at a path or URL, ``.npy``, a dataset of an HDF5 file, a zarr or dask array.

Not for how it is read (`readers`), nor for what tells it from another (`stamps`); not for targets (`target`).
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr
from zarr.storage import FsspecStore, LocalStore

from .config import local_directory
from .errors import InputError, SettingsError
from .readers import Hdf5Reader, NpyReader, Reader, ZarrReader, datasets_of, first_line
from .stamps import directory_stamp, file_stamp, remote_stamp, unknown_stamp

# Bytes of a block of what has no chunks: a fraction of a second for a small model, and many blocks for a large one.
_BLOCK_BYTES = 8 << 20
_HDF5_ENDINGS = (".h5", ".hdf5", ".he5", ".hdf", ".nc")


@dataclass(frozen=True)
class Source:
    """An input of a job.

    Attributes
    ----------
    array : dask.array.Array
        In its own chunks along one axis.
    stamp : callable
        Gives what tells it from another by now, in JSON types.
    reader : Reader, optional
        Of a file that can be read from any row on.
    """

    array: da.Array
    stamp: Callable[[], dict[str, Any]]
    reader: Reader | None = None

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Of the array."""
        found: tuple[tuple[int, ...], ...] = self.array.chunks
        return found

    def in_blocks(self, rows: int) -> da.Array:
        """The array in blocks of so many rows."""
        return self.array.rechunk({0: rows}) if self.reader is None else _lazy(self.reader, 0, rows)


def open_source(source: Any, name: str, axis: int = 0) -> Source:
    """Find what a user gave.

    Parameters
    ----------
    source : str, path, zarr.Array or dask.array.Array
    name : str
        What to call it in errors.
    axis : int
        Axis that is cut into chunks; of dask arrays any are.

    Returns
    -------
    Source
    """
    if isinstance(source, da.Array):
        if source.ndim and source.shape[0] != source.shape[0]:
            raise InputError(f"{name} is a dask array of an unknown number of rows: call compute_chunk_sizes() on it")
        # Its name says nothing of the files behind it: no two runs are taken to be of the same content.
        return Source(source, unknown_stamp)
    if isinstance(source, zarr.Array):
        return _open_zarr(source, name, axis)
    if not isinstance(source, str | Path):
        raise InputError(
            f"{name} is a {type(source).__name__}: give a path or URL (zarr, .npy, FILE.h5::/DATASET), a zarr array or "
            "a dask array"
        )
    path, inside = _parts(source)
    if inside or _is_hdf5(path):
        return _open_hdf5(path, inside, source, name, axis)
    if _is_npy(path):
        return _open_npy(path, source, name, axis)
    return _open_zarr(source, name, axis)


def directory_of(source: Any) -> Path | None:
    """Directory or file of this machine that a source lies in."""
    if isinstance(source, zarr.Array):
        return Path(source.store.root, source.path).resolve() if isinstance(source.store, LocalStore) else None
    return _local(_parts(source)[0]) if isinstance(source, str | Path) else None


def _parts(source: str | Path) -> tuple[str, str]:
    """``FILE::/DATASET`` in its parts; all others whole."""
    path, separator, inside = str(source).rpartition("::")
    # Other URLs know "::" too: fsspec chains file systems with it.
    remote = "://" in str(source) and not str(source).startswith("file://")
    if separator and inside and (path.endswith(_HDF5_ENDINGS) or not remote) and not os.path.exists(source):
        return path, inside
    return str(source), ""


def _local(text: str) -> Path | None:
    try:
        return local_directory(text, "").resolve()
    except SettingsError:
        return None  # a URL of another kind


def _is_hdf5(path: str) -> bool:
    return path.endswith(_HDF5_ENDINGS) or _begins(path, b"\x89HDF\r\n\x1a\n")


def _is_npy(path: str) -> bool:
    if path.endswith(".npz"):
        raise InputError(f"{path} holds several arrays and cannot be mapped into memory: np.save one of them as .npy")
    return path.endswith(".npy") or _begins(path, b"\x93NUMPY")


def _begins(path: str, magic: bytes) -> bool:
    found = _local(path)
    if found is None or not found.is_file():
        return False
    with open(found, "rb") as file:
        return file.read(len(magic)) == magic


def _open_hdf5(text: str, inside: str, source: str | Path, name: str, axis: int) -> Source:
    path = _file(text, name, "HDF5")
    if path.is_dir():
        raise InputError(f"{name}: {text} is a directory and no HDF5 file; a zarr array in it is {text}/{inside}")
    if not inside:
        found = _tried(lambda: datasets_of(path), f"{name}: {source} cannot be read as HDF5")
        raise InputError(f"{name}: {source} is an HDF5 file; give one of its datasets: {found}")
    reader = _tried(lambda: Hdf5Reader(f"{path}::{inside}"), f"{name}: there is no HDF5 dataset at {source}")
    _refuse_single(reader, source, name)
    lazy = _lazy(reader, axis, _block_length(reader, axis))
    return Source(lazy, partial(file_stamp, path, "::/" + inside.strip("/"), reader), reader)


def _open_npy(text: str, source: str | Path, name: str, axis: int) -> Source:
    path = _file(text, name, ".npy")
    reader = _tried(lambda: NpyReader(str(path)), f"{name}: there is no .npy file at {source}")
    _refuse_single(reader, source, name)
    return Source(_lazy(reader, axis, _block_length(reader, axis)), partial(file_stamp, path, "", reader), reader)


def _open_zarr(source: str | Path | zarr.Array[Any], name: str, axis: int) -> Source:
    if isinstance(source, zarr.Array):
        found: Any = source
    else:
        found = _tried(lambda: zarr.open(str(source), mode="r"), f"{name}: there is no zarr array at {source}")
    if isinstance(found, zarr.Group):
        inside = ", ".join(f"{source}/{key}" for key in _keys(found)) or "it has no arrays, or does not list them"
        raise InputError(f"{name}: {source} is a zarr group; give one of its arrays: {inside}")
    _refuse_single(found, source, name)
    axis = axis if -found.ndim <= axis < found.ndim else 0  # refused by who asks for it, in words of its own
    length = (found.shards or found.chunks)[axis]
    directory = directory_of(source)
    if directory is not None:
        lazy = _lazy(ZarrReader(str(directory)), axis, length)
        return Source(lazy, partial(directory_stamp, directory, found))
    if isinstance(source, zarr.Array):
        # Workers get its store with it, and what that knows of passwords.
        lazy = da.from_zarr(source).rechunk({axis: length})
    else:
        lazy = _lazy(ZarrReader(str(source)), axis, length)
    return Source(lazy, partial(remote_stamp, found) if isinstance(found.store, FsspecStore) else unknown_stamp)


def _keys(group: zarr.Group) -> list[str]:
    try:
        return sorted(key for key, _ in group.arrays())[:5]
    except Exception:  # of a server that does not list
        return []


def _block_length(reader: Reader, axis: int) -> int:
    """Length of a block of a file that has no chunks, or small ones: whole chunks in any case."""
    axis %= reader.ndim
    chunk = reader.chunks[axis]
    nbytes = math.prod(n for a, n in enumerate(reader.shape) if a != axis) * reader.dtype.itemsize
    return max(1, _BLOCK_BYTES // max(1, nbytes * chunk)) * chunk


def _lazy(reader: Reader, axis: int, length: int) -> da.Array:
    """An array of blocks along one axis, each read where it is needed."""
    return da.from_array(
        reader,
        chunks=tuple(length if a in (axis, axis + reader.ndim) else n for a, n in enumerate(reader.shape)),
        name=False,
        meta=np.empty((0,) * reader.ndim, reader.dtype),
        # With Dask's own, all workers import dask.array, and with it xarray and pandas: a second, and 60 MB of each.
        getitem=operator.getitem,
    )


def _refuse_single(array: Any, source: Any, name: str) -> None:
    if array.ndim == 0:
        raise InputError(f"{name}: {source} is a single number: the rows are along axis 0")


def _file(text: str, name: str, kind: str) -> Path:
    path = _local(text)
    if path is None:
        raise InputError(
            f"{name}: {text} is remote, and {kind} is read from mounted file systems alone: copy it to one"
        )
    return path


def _tried(function: Callable[[], Any], otherwise: str) -> Any:
    try:
        return function()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{otherwise} ({first_line(error)})") from error
