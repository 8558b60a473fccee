"""Memory that many processes read and none can change for the others.

A mapping here is either a private one (copy-on-write: a write goes to a page of this process's own) of a file or of
a Plasma object, or, where a Plasma object cannot be mapped a second time, Plasma's own pages made read-only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import mmap
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .description import Bytes

_PAGE = mmap.PAGESIZE

# Where files were found last, by device and inode, and those that a raylet may have open but does not show us. The
# search through /proc takes milliseconds.
_FOUND: dict[tuple[int, int], str] = {}
_HIDDEN: set[tuple[int, int]] = set()

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
if sys.platform == "linux":
    _LIBC.mremap.restype = ctypes.c_void_p
    _LIBC.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value
# Addresses of mappings that nobody uses, by start in the file and length.
_Spare = dict[tuple[int, int], int]
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python has no name for it
# struct pm_scan_arg of <linux/fs.h>: its size, where it says how far the walk came, and regions asked for at a time
_SCAN_BYTES, _WALK_END, _REGIONS = 96, 32, 512
_PAGEMAP_SCAN = 3 << 30 | _SCAN_BYTES << 16 | ord("f") << 8 | 16
_STANDARD_ERROR = 2  # sys.stderr may be no file, as in a notebook


class _Pages:
    """Pages of this process; they, and their ``owner``, are let go of when no array lies on them any more.

    Not an ``mmap.mmap``: that holds a descriptor each, and a process has a thousand.
    """

    def __init__(self, address: int, nbytes: int, owner: Any):
        self._address = address
        self._nbytes = nbytes
        self.owner = owner
        if owner is not None:
            _OWNED[id(self)] = self

    def array(self, offset: int, nbytes: int) -> Bytes:
        """Bytes of the pages (uint8, writable), which keep them."""
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (self._address + offset, False),
        }
        return np.asarray(self)

    def copy(self) -> None:
        """Put copies in the place of the pages, at once, so that they are no other process's any more."""
        address = _LIBC.mmap(None, self._nbytes, _READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        ctypes.memmove(address, self._address, self._nbytes)
        may_move, fixed = 1, 2
        if _LIBC.mremap(address, self._nbytes, self._nbytes, may_move | fixed, self._address) == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# Those of Plasma's objects.
_OWNED: weakref.WeakValueDictionary[int, _Pages] = weakref.WeakValueDictionary()


class _Mapping(_Pages):
    """Pages of a file that were mapped here, and are unmapped, unless their owner has a use for them."""

    def __init__(self, address: int, nbytes: int, owner: Any, start: int):
        super().__init__(address, nbytes, owner)
        self._start = start

    def __del__(self, unmap: Any = _LIBC.munmap, is_ending: Any = sys.is_finalizing) -> None:
        take_back = getattr(self.owner, "take_back", None) if not is_ending() else None
        if take_back is None or not take_back(self._address, (self._start, self._nbytes)):
            unmap(self._address, self._nbytes)


class _ReadOnly(_Pages):
    """Pages of Plasma's own mapping, made read-only, and writable again before it may give them to another object."""

    # First pages of each that there is: a base and its variants, or threads that asked at once, have an array each,
    # over the same pages. Here, and not in the module, since they are needed to the very end of the process.
    _in_use: ClassVar[list[int]] = []
    # Reentrant: a garbage collection in the midst of it may let go of other pages.
    _lock: ClassVar[threading.RLock] = threading.RLock()
    _libc: ClassVar[Any] = _LIBC
    _read_write = _READ_WRITE

    def __init__(self, address: int, nbytes: int, owner: Any):
        super().__init__(address, nbytes, owner)
        with self._lock:
            self._in_use.append(address)
            if _LIBC.mprotect(address, nbytes, mmap.PROT_READ) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def __del__(self) -> None:
        with self._lock:
            self._in_use.remove(self._address)
            if self._address not in self._in_use:
                self._libc.mprotect(self._address, self._nbytes, self._read_write)


def map_file(path: str | Path, offset: int, nbytes: int, owner: Any = None) -> Bytes:
    """Map bytes of a file copy-on-write.

    Parameters
    ----------
    path : path
    offset, nbytes : int
        Where the bytes lie in the file; ``offset`` need not be a multiple of the page size.
    owner : object, optional
        Kept alive as long as the returned array, or any view or tensor made from it.

    Returns
    -------
    numpy.ndarray
        uint8, writable; writes are seen by nobody else and never reach the file.

    Raises
    ------
    OSError
        There is no such file, or it does not have so many bytes.
    """
    if nbytes == 0:
        return np.empty(0, np.uint8)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would have us wait
    try:
        return _map(descriptor, offset, nbytes, owner)
    finally:
        os.close(descriptor)


def _map(descriptor: int, offset: int, nbytes: int, owner: Any, spare: _Spare | None = None) -> Bytes:
    if offset + nbytes > os.fstat(descriptor).st_size:
        raise OSError(f"the file ends before byte {offset + nbytes:,}")  # beyond its end, a read ends the process
    start = offset // _PAGE * _PAGE
    length = offset - start + nbytes
    address = spare.pop((start, length), None) if spare else None
    if address is None:
        # Without a reservation: what nobody writes to needs no memory of its own.
        address = _LIBC.mmap(None, length, _READ_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE, descriptor, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"{nbytes:,} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
    return _Mapping(address, length, owner, start).array(offset - start, nbytes)


def written_pages(buffer: Bytes) -> int:
    """Number of pages of a mapping that this process has written to, and so has copies of.

    Parameters
    ----------
    buffer : numpy.ndarray
        uint8, from `map_file` or `Plasma.map`.

    Notes
    -----
    From ``/proc/self/pagemap``: whoever wrote, torch, NumPy or C, the kernel knows. For 400 MB, 1.5 ms where all pages
    are in use and nothing where none is; before Linux 6.7, 3 and 1.5 ms.
    """
    return _written_pages(buffer.ctypes.data, buffer.nbytes)


def _written_pages(address: int, nbytes: int) -> int:
    first, end = address // _PAGE, -(-(address + nbytes) // _PAGE)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        with suppress(OSError):  # an older kernel
            return _scan(pagemap.fileno(), first * _PAGE, end * _PAGE)
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (end - first)), np.uint64)
    # Bits: 63 present, 62 swapped, 61 of a file or shared. A copied page is anonymous.
    held, backed = entries >> np.uint64(62), (entries >> np.uint64(61)) & np.uint64(1)
    return int(np.count_nonzero((held != 0) & (backed == 0)))


def _scan(pagemap: int, start: int, end: int) -> int:
    """Pages that are there, or swapped, and are of no file, by the kernel's own count (``PAGEMAP_SCAN``)."""
    of_file, present, swapped = 1 << 2, 1 << 3, 1 << 4
    regions = np.zeros((_REGIONS, 3), np.uint64)
    found = 0
    while start < end:
        request = bytearray(
            struct.pack(
                "12Q",
                *(_SCAN_BYTES, 0, start, end, 0, regions.ctypes.data, _REGIONS, 0),
                *(of_file, of_file, present | swapped, present | swapped),
            )
        )
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request)
        found += int((regions[:count, 1] - regions[:count, 0]).sum()) // _PAGE
        (start,) = struct.unpack_from("Q", request, _WALK_END)
    return found


# What drops that which is only kept for later, so that it need not be copied.
spares: list[Callable[[], None]] = []


def copy_mapped() -> None:
    """Make all that is mapped of objects this process's own, at the same addresses: it is about to let go of them.

    Who is in Ray no more holds none of its objects. Their memory is then given to others, and would change.

    Raises
    ------
    OSError
        There is not enough memory.
    """
    for drop in spares:
        drop()
    found = [pages for reference in _OWNED.valuerefs() if (pages := reference()) is not None]
    for pages in {pages._address: pages for pages in found}.values():
        pages.copy()


class Plasma:
    """An array from Ray's store, and where its pages lie.

    Parameters
    ----------
    array : numpy.ndarray
        uint8, as ``ray.get`` returned it: a view of pages that Plasma mapped read-write into every reader. It is kept
        alive as long as this, what `map` returned, or any view or tensor made from that.

    Attributes
    ----------
    nbytes : int
        Of the array.
    file : tuple of int or None
        Device and inode of the file that the array lies in.
    start : int
        Of the array in that file, in bytes.
    is_on_disk : bool
        That file is not in /dev/shm: Plasma makes others where its memory is full.
    """

    def __init__(self, array: Bytes):
        self._array = array
        self.nbytes = array.nbytes
        area = _area_of(array.ctypes.data)
        self.file = area.file if area is not None else None
        self.start = area.offset + array.ctypes.data - area.start if area is not None else 0
        self.is_on_disk = self.file is not None and self.file[0] != os.stat("/dev/shm").st_dev
        self._spare: _Spare = {}

    def __del__(self, unmap: Any = _LIBC.munmap) -> None:
        for (_, nbytes), address in self._spare.items():
            unmap(address, nbytes)

    def take_back(self, address: int, part: tuple[int, int]) -> bool:
        """Keep a mapping that nobody uses any more for the next `map` of the same part, if it is as new.

        Pages of a new mapping are found one after the other, when they are first read: 10 to 40 ms for 400 MB.
        """
        if part in self._spare or _written_pages(address, part[1]):
            return False
        self._spare[part] = address
        return True

    def raylet(self) -> int | None:
        """Process id of the raylet whose store it is; None where that cannot be seen."""
        if self.file is None:
            return None
        source = _open_file_of_raylet(*self.file)
        if source is None:
            return None
        path, descriptor = source
        os.close(descriptor)
        return int(path.split("/")[2])

    def map(self, offset: int, nbytes: int) -> tuple[Bytes, str]:
        """Map a part so that writes stay in this process.

        Parameters
        ----------
        offset, nbytes : int
            The part. Only whole pages can be protected: there must be a page of the array in front of it, and its
            last page must hold nothing of value.

        Returns
        -------
        buffer : numpy.ndarray
            uint8, the same bytes.
        protection : str
            "copy-on-write"; or "read-only", where the raylet's open file is out of reach (this process has fewer
            capabilities, or a user namespace of its own): a write to it then ends this process, and all its threads
            are traced on standard error.
        """
        source = _open_file_of_raylet(*self.file) if self.file is not None else None
        if source is None:
            return _read_only(self, self._array, offset, nbytes), "read-only"
        _, descriptor = source
        try:
            return _map(descriptor, self.start + offset, nbytes, self, self._spare), "copy-on-write"
        finally:
            os.close(descriptor)


class Area(NamedTuple):
    """A line of /proc/PID/maps: addresses, rights ("rw-p"), place in the file, and the file's device and inode."""

    start: int
    end: int
    rights: str
    offset: int
    file: tuple[int, int]


def parse_mapping(line: str) -> Area:
    """The area that a line of /proc/PID/maps tells of."""
    span, rights, offset, device, inode = line.split(maxsplit=5)[:5]
    start, end = span.split("-")
    major, minor = device.split(":")
    file = os.makedev(int(major, 16), int(minor, 16)), int(inode)
    return Area(int(start, 16), int(end, 16), rights, int(offset, 16), file)


def _area_of(address: int) -> Area | None:
    """The mapping of this process that ``address`` lies in."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            area = parse_mapping(line)
            if area.start <= address < area.end:
                return area
    return None


def _open_file_of_raylet(device: int, inode: int) -> tuple[str, int] | None:
    """The arena's file, unlinked long ago but still open in the raylet: its path under /proc, and a descriptor."""
    found = _FOUND.get((device, inode))
    descriptor = _open(found, device, inode) if found is not None else None
    if found is not None and descriptor is not None:
        return found, descriptor
    if (device, inode) in _HIDDEN:
        return None
    hidden = False
    for process in _raylets():
        try:
            for number in os.listdir(f"{process}/fd"):
                path = f"{process}/fd/{number}"
                descriptor = _open(path, device, inode) if _is_file(path, device, inode) else None
                if descriptor is not None:
                    _FOUND[device, inode] = path
                    return path, descriptor
        except PermissionError:
            hidden = True
        except OSError:
            continue  # gone
    if hidden:
        _HIDDEN.add((device, inode))
    return None


def _open(path: str, device: int, inode: int) -> int | None:
    try:
        # Its number may be another program's by now, and a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # closed, its process is gone, or another user's
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino) == (device, inode):
        return descriptor
    os.close(descriptor)
    return None


def _is_file(path: str, device: int, inode: int) -> bool:
    # Looked at before it is opened: to open a pipe or a device may do more than open it.
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False  # closed
    # st_dev of a tmpfs is what maps shows; on overlay file systems only the inode agrees.
    return (status.st_dev, status.st_ino) == (device, inode)


def _raylets() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text() == "raylet\n":
                yield str(process)
        except OSError:
            continue


def _read_only(owner: Plasma, array: Bytes, offset: int, nbytes: int) -> Bytes:
    """Bytes of ``array``, whose pages are read-only as long as they are in use."""
    # Ray has a fault told by the Python thread that it occurs in, and torch writes large tensors in threads of its own.
    faulthandler.enable(_STANDARD_ERROR, all_threads=True)
    address = array.ctypes.data + offset
    start = address // _PAGE * _PAGE
    end = (address + nbytes) // _PAGE * _PAGE
    # Torch has no read-only tensors, and warns of arrays that are; what guards the pages is the hardware.
    return _ReadOnly(start, end - start, owner).array(address - start, nbytes)
