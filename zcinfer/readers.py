"""Arrays in files, opened where they are read: a task carries a name and a shape, and no handle or content.

Not for which file a user means, nor for what tells one input from another (`sources`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
import zarr

from .errors import InputError


class Reader:
    """An array of a file, with shape and dtype as they were when the job began; what dask slices.

    One that is not there, or is another array by now, is an error: never fill values, never other rows.

    Parameters
    ----------
    url : str
        Path or URL, as all workers see it.
    """

    kind = "array"

    def __init__(self, url: str):
        self.url = url
        with self.open() as array:
            self.shape: tuple[int, ...] = tuple(array.shape)
            self.dtype: np.dtype[Any] = array.dtype
            # What is read together, whichever part of it is asked for.
            self.chunks: tuple[int, ...] = tuple(getattr(array, "chunks", None) or (1,) * len(self.shape))
        self.ndim = len(self.shape)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The array, opened."""
        raise NotImplementedError
        yield

    def __getitem__(self, index: Any) -> Any:
        opened = False
        try:
            with self.open() as array:
                opened = True
                found = tuple(array.shape), array.dtype
                if found == (self.shape, self.dtype):
                    return array[index]
                told = (
                    f"{self.url} was {self.shape} {self.dtype} when the job began, and is {found[0]} {found[1]} on "
                    f"{gethostname()}: start the job anew"
                )
        except InputError:
            raise
        except Exception as error:
            if opened:
                raise  # its content, which is told with the block
            told = (
                f"there is no {self.kind} at {self.url} on {gethostname()} ({first_line(error)}): all workers must "
                "see it, until the job is done"
            )
        # Without a cause: some of zarr's errors do not survive the way between processes.
        raise InputError(told)


class ZarrReader(Reader):
    """A zarr array at a path or any URL that fsspec knows."""

    kind = "zarr array"

    @contextmanager
    def open(self) -> Iterator[Any]:
        yield zarr.open_array(self.url, mode="r")


class NpyReader(Reader):
    """A ``.npy`` file, mapped into memory: what is read of it is a view of the page cache."""

    kind = ".npy file"

    @contextmanager
    def open(self) -> Iterator[Any]:
        # As a plain array: slices of np.memmap take five times as long, and users would be given them.
        yield np.asarray(np.lib.format.open_memmap(self.url, mode="r"))


# Handles of HDF5 are not for several threads: one opens, reads and closes at a time.
_ONE_AT_A_TIME = threading.Lock()


class Hdf5Reader(Reader):
    """A dataset of an HDF5 file; ``FILE::/DATASET``."""

    kind = "HDF5 dataset"

    @contextmanager
    def open(self) -> Iterator[Any]:
        path, _, dataset = self.url.rpartition("::")
        h5py = import_h5py(path)
        with _ONE_AT_A_TIME, h5py.File(path, "r") as file:
            found = file[dataset]
            if not isinstance(found, h5py.Dataset):
                raise InputError(f"{dataset} is a group; the file has {datasets_of(path, file)}")
            yield found


def import_h5py(path: str | Path) -> Any:
    """The module h5py, or how to come by it."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            f"{path} is an HDF5 file, and h5py cannot be imported on {gethostname()} ({error}): pip install "
            "'zcinfer[hdf5]', here and on all workers"
        ) from error
    return h5py


def datasets_of(path: str | Path, file: Any = None) -> str:
    """Names of datasets of an HDF5 file, as a user would give them: some of them."""
    h5py = import_h5py(path)
    if file is None:
        with _ONE_AT_A_TIME, h5py.File(path, "r") as opened:
            return datasets_of(path, opened)
    names: list[str] = []

    def visit(name: str, found: Any) -> bool | None:
        if isinstance(found, h5py.Dataset):
            names.append(f"{path}::/{name}")
        return True if len(names) == 5 else None

    file.visititems(visit)
    return ", ".join(names) or "no datasets"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
