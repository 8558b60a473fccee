"""Modules of this process: built from a store, and what tells whether one has been written to since.

Not for choosing stores or names (`catalog`), nor for which modules are kept (`residents`).
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import is_
from socket import gethostname
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from . import config, telemetry
from .description import Bytes
from .device_sharing import Lease
from .errors import ArchiveError, ModelNotFound, SettingsError, StoreUnavailable, ZcinferError
from .memory import page_faults
from .parts import first_alone, join
from .residents import Residents
from .sharing import spares, written_pages
from .store import Fetched, FileStore, ModelRef, Store, registry_of
from .stores import is_open, open_store
from .traces import name_frames
from .upload import to_device

log = logging.getLogger("zcinfer")


@dataclass(frozen=True)
class Load:
    """Record of one load in this process.

    Attributes
    ----------
    model : str
        "name@version".
    store : str
        Kind of store it came from: "ray" or "file".
    protection : str
        "copy-on-write" or "read-only".
    seconds : dict of str to float
        Seconds by phase: "connect" and "import" (once a process), "fetch", "map", "join", "to device".
    shared, private : int
        Bytes mapped from the store, and those that this process holds for itself (skeleton, programs).
    """

    model: str
    store: str
    protection: str
    seconds: dict[str, float]
    shared: int
    private: int

    @property
    def load_seconds(self) -> float:
        """Seconds of the load itself, without what a process pays once."""
        return sum(value for phase, value in self.seconds.items() if phase not in ("connect", "import"))


# The last loads of this process, newest last.
loads: deque[Load] = deque(maxlen=1000)


def load_ref(ref: ModelRef, device: torch.device | str | None = None) -> torch.nn.Module:
    """Build a fresh module from the store that the ref names.

    Parameters
    ----------
    ref : ModelRef
    device : torch.device or str, optional
        Moved there; default: left in shared host memory.

    Returns
    -------
    torch.nn.Module
        Its weights are views of shared memory; what is written to them stays in this process.
    """
    return _load(ref, device, share=False).model


class _Loaded(NamedTuple):
    """A module, the mappings that its weights are views of, whether these are read-only, and what it has of a GPU."""

    model: torch.nn.Module
    buffers: tuple[Bytes, ...]
    read_only: bool
    nbytes: int
    leases: tuple[Lease, ...]


def _load(ref: ModelRef, device: torch.device | str | None, share: bool) -> _Loaded:
    # Thousands of new objects call for a garbage collection every few hundred, and none of them is garbage. The one
    # that is due comes after the load.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _build(ref, device, share)
    finally:
        if collecting:
            gc.enable()


def _build(ref: ModelRef, device: torch.device | str | None, share: bool) -> _Loaded:
    seconds: dict[str, float] = {}
    target = device_of(device)
    begin = perf_counter()
    new = not is_open(ref.store)
    try:
        store = open_store(ref.store)
        if new:
            seconds["connect"] = perf_counter() - begin
        fetched = store.fetch(ref.digest)
    except StoreUnavailable as error:
        fetched, store = _from_archive(ref, error)
    except (ModelNotFound, ArchiveError) as error:
        if not (config.get("remote") and ref.store.startswith("ray:")):
            raise
        fetched, store = _from_archive(ref, error)
    seconds |= fetched.seconds
    read_only = fetched.protection == "read-only"
    begin = perf_counter()
    with first_alone(fetched.description):
        for package in fetched.description.requires:
            _import(package)
        imported = perf_counter()
        model = join(fetched.skeleton, fetched.description, fetched.buffer, base=fetched.base, copy_small=read_only)
    joined = perf_counter()
    seconds |= {"import": imported - begin, "join": joined - imported}
    nbytes = 0
    leases: tuple[Lease, ...] = ()
    if target.type != "cpu":
        model, leases, nbytes = to_device(model, fetched, target, share)
        seconds["to device"] = perf_counter() - joined
    kind = store.url.partition(":")[0]
    shared = fetched.description.nbytes + fetched.description.nbytes_in_base
    private = fetched.description.private_nbytes
    loads.append(Load(str(ref), kind, fetched.protection, seconds, shared, private))
    telemetry.count_load(str(ref), _kind(store, ref, fetched), seconds, shared, private)
    if read_only:
        _tell_read_only(ref)
        name_frames(model, str(ref))
    return _Loaded(
        model, (fetched.buffer, *(() if fetched.base is None else (fetched.base,))), read_only, nbytes, leases
    )


def _kind(store: Store, ref: ModelRef, fetched: Fetched) -> str:
    if fetched.is_on_disk or store.url.partition(":")[0] != ref.store.partition(":")[0]:
        return "from disk"
    described = fetched.description
    shared = described.nbytes + described.nbytes_in_base
    return "private" if 2 * described.private_nbytes > shared else "zero-copy"


# Stores whose models are known to be read-only here.
_told_read_only: set[str] = set()


def _tell_read_only(ref: ModelRef) -> None:
    if ref.store in _told_read_only:
        return
    _told_read_only.add(ref.store)
    log.warning(
        "%s is read-only in this process, as all models of its store: the raylet is gone, or has rights that this "
        "process has not (capabilities, its user namespace). A write to weights, as of an optimiser, load_state_dict "
        "or Embedding(max_norm), ends the process with 'Segmentation fault' and a traceback. Write to a "
        "copy.deepcopy() of the model.",
        ref,
    )


def device_of(device: torch.device | str | None) -> torch.device:
    """The device of that name; "cpu" by default. Whether it is there is not asked."""
    try:
        return torch.device(device or "cpu")
    except RuntimeError as error:
        raise SettingsError(f"device is {device!r}: choose one like 'cpu', 'cuda' or 'cuda:1'") from error


def _from_archive(ref: ModelRef, error: ZcinferError) -> tuple[Fetched, Store]:
    """Map the archive itself when Ray does not answer, or has it not, if this machine sees the registry or a copy."""
    directory = registry_of(ref.store)
    if not directory.exists() and config.get("remote"):
        directory = config.registry_directory()
    elif not directory.exists():
        raise StoreUnavailable(
            f"{error} Nor can the archive of {ref} be mapped instead: {gethostname()} has no directory {directory}. "
            "Keep the registry (zcinfer.registry) in a directory that all machines have, or copies where all can read "
            "them (zcinfer.remote)."
        ) from error
    log.warning("%s The archive of %s in %s is mapped instead.", error, ref, directory)
    store = FileStore(directory)
    return store.fetch(ref.digest), store


def _import(package: str) -> None:
    if package not in sys.modules:
        # Errors are left to join, which knows what is missing for what.
        with suppress(ImportError):
            importlib.import_module(package)


_TABLES = ("_parameters", "_buffers", "_modules")


class Resident:
    """A module built in this process, and what tells whether it has been written to since."""

    def __init__(self, ref: ModelRef, device: str, training: str):
        self.name = str(ref)
        self.device = device_of(device)
        self.model, buffers, read_only, self.nbytes, self._leases = _load(ref, device, share=True)
        # What was made of the module, and must go when its weights do
        self.made: dict[Any, Any] = {}
        _by_module[id(self.model)] = self
        # What is left of the store's memory is held by tensors; on a GPU often none, and the store has it back
        self._buffers = [weakref.ref(_whole(buffer)) for buffer in buffers]
        del buffers
        # The copies that it then has of small tensors and buffers are no mapping, which would tell of writes to them.
        self.is_watched = not read_only or self.device.type != "cpu"
        if training == "eval":
            self.model.eval()
        # Attributes, parameters, buffers and submodules of each module, and what they are now.
        self._tables = [
            table.values()
            for module in self.model.modules()
            for table in (vars(module), *(vars(module).get(name, {}) for name in _TABLES))
        ]
        self._lengths, self._held = [*map(len, self._tables)], [*chain.from_iterable(self._tables)]
        self._tensors = [v for v in self._held if isinstance(v, torch.Tensor) and not v.is_inference()]
        self._versions = [tensor._version for tensor in self._tensors]
        self._pages = self._written()

    def is_unchanged(self, faults: int) -> bool:
        """Whether weights, buffers and attributes are what they were when it was built.

        Writes behind torch's back (``.data``, NumPy) leave no other trace than a copied page, and no page is copied
        without a fault: where this process has had none since the module was lent, no page need be looked at. What
        changes inside a list or another object of the user's is not seen.
        """
        return (
            [*map(len, self._tables)] == self._lengths
            and all(map(is_, chain.from_iterable(self._tables), self._held))
            and [tensor._version for tensor in self._tensors] == self._versions
            and (page_faults() == faults >= 0 or self._written() == self._pages)
        )

    def told(self) -> str:
        """Why it must not be used, as far as is known without a look at it; empty where it may."""
        return next(filter(None, (lease.told() for lease in self._leases)), "")

    def trouble(self) -> str:
        """Why what it has computed cannot be trusted; empty where it can."""
        return next(filter(None, (lease.trouble() for lease in self._leases)), "")

    def _written(self) -> int:
        found = (buffer() for buffer in self._buffers)
        return sum(written_pages(buffer) for buffer in found if buffer is not None)


def _whole(buffer: Bytes) -> Bytes:
    """The array that a buffer is a slice of: NumPy's views of a slice keep that, and not the slice."""
    while isinstance(buffer.base, np.ndarray):
        buffer = buffer.base
    return buffer


_by_module: weakref.WeakValueDictionary[int, Resident] = weakref.WeakValueDictionary()


def made_of(model: torch.nn.Module) -> dict[Any, Any]:
    """What is kept with a resident's module and ends with it, such as compiled code; for whom it is lent to."""
    return _by_module[id(model)].made


residents = Residents(Resident, int(config.get("residents")))
spares.append(residents.clear)
