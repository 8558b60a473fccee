"""Memory that many processes read and none can change for the others.

A mapping here is either a private one (copy-on-write: a write goes to a page of this process's own) of a file or of
a Plasma object, or, where a Plasma object cannot be mapped a second time, Plasma's own pages made read-only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .description import Bytes

_PAGE = mmap.PAGESIZE

# Where files were found last, by device and inode. The search through /proc takes milliseconds.
_FOUND: dict[tuple[int, int], str] = {}
_LIBC = ctypes.CDLL(None, use_errno=True)


class PrivateMapping(mmap.mmap):
    """A copy-on-write mapping that keeps the ``owner`` of the mapped pages alive as long as any view of it."""

    owner: Any = None


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
    """
    if nbytes == 0:
        return np.empty(0, np.uint8)
    start = offset // _PAGE * _PAGE
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapping = PrivateMapping(
            descriptor,
            offset - start + nbytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
        )
    finally:
        os.close(descriptor)
    mapping.owner = owner
    return np.frombuffer(mapping, np.uint8, nbytes, offset - start)


def written_pages(buffer: Bytes) -> int:
    """Number of pages of a mapping that this process has written to, and so has copies of.

    Parameters
    ----------
    buffer : numpy.ndarray
        uint8, from `map_file` or `map_plasma`.

    Notes
    -----
    From ``/proc/self/pagemap``, 3 ms for 400 MB: whoever wrote, torch, NumPy or C, the kernel knows.
    """
    first = buffer.ctypes.data // _PAGE
    count = -(-(buffer.ctypes.data + buffer.nbytes) // _PAGE) - first
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * count), np.uint64)
    # Bits: 63 present, 62 swapped, 61 of a file or shared. A copied page is anonymous.
    held, backed = entries >> np.uint64(62), (entries >> np.uint64(61)) & np.uint64(1)
    return int(np.count_nonzero((held != 0) & (backed == 0)))


def map_plasma(array: Bytes, offset: int, nbytes: int) -> tuple[Bytes, str]:
    """Map a part of an array from Ray's store so that writes stay in this process.

    Parameters
    ----------
    array : numpy.ndarray
        uint8, as ``ray.get`` returned it: a view of pages that Plasma mapped read-write into every reader. It is kept
        alive as long as what is returned, or any view or tensor made from it.
    offset, nbytes : int
        The part. Only whole pages can be protected: there must be a page of the array in front of it, and its
        last page must hold nothing of value.

    Returns
    -------
    buffer : numpy.ndarray
        uint8, the same bytes.
    protection : str
        "copy-on-write"; or "read-only", where the raylet's open file is out of reach (another user or process
        namespace): a write to it then ends this process.
    """
    address = array.ctypes.data + offset
    area = _area_of(address)
    if area is not None:
        start, file_offset, device, inode = area
        source = _open_file_of_raylet(device, inode)
        if source is not None:
            return map_file(source, file_offset + address - start, nbytes, owner=array), "copy-on-write"
    return _read_only(array, offset, nbytes), "read-only"


def file_behind(array: Bytes) -> tuple[int, int] | None:
    """Device and inode of the file that ``array`` lies in."""
    area = _area_of(array.ctypes.data)
    return area[2:] if area is not None else None


def raylet_of(array: Bytes) -> int | None:
    """Process id of the raylet whose store ``array`` lies in; None where it cannot be seen."""
    area = _area_of(array.ctypes.data)
    source = _open_file_of_raylet(*area[2:]) if area is not None else None
    return int(source.split("/")[2]) if source is not None else None


def _area_of(address: int) -> tuple[int, int, int, int] | None:
    """Start, file offset, device and inode of the mapping that ``address`` lies in."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, offset, device, inode = line.split(maxsplit=5)[:5]
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                major, minor = (int(part, 16) for part in device.split(":"))
                return start, int(offset, 16), os.makedev(major, minor), int(inode)
    return None


def _open_file_of_raylet(device: int, inode: int) -> str | None:
    """Path under /proc of the arena's file, unlinked long ago but still open in the raylet."""
    found = _FOUND.get((device, inode), "")
    if found and _is_file(found, device, inode):
        return found
    for process in _raylets():
        try:
            paths = [f"{process}/fd/{descriptor}" for descriptor in os.listdir(f"{process}/fd")]
        except OSError:
            continue  # another user's, or gone
        for path in paths:
            if _is_file(path, device, inode) and os.access(path, os.R_OK):
                _FOUND[device, inode] = path
                return path
    return None


def _is_file(path: str, device: int, inode: int) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False  # closed, or its process is gone
    # st_dev of a tmpfs is what maps shows; on overlay file systems only the inode agrees.
    return (status.st_dev, status.st_ino) == (device, inode)


def _raylets() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text() == "raylet\n":
                yield str(process)
        except OSError:
            continue


def _read_only(array: Bytes, offset: int, nbytes: int) -> Bytes:
    """Make pages of ``array`` read-only until it is released, since Plasma then reuses them."""
    address = array.ctypes.data + offset
    start = address // _PAGE * _PAGE
    end = (address + nbytes) // _PAGE * _PAGE
    _protect(start, end - start, mmap.PROT_READ)
    weakref.finalize(array, _protect, start, end - start, mmap.PROT_READ | mmap.PROT_WRITE)
    # Torch has no read-only tensors, and warns of arrays that are; what guards the pages is the hardware.
    pages: Any = (ctypes.c_ubyte * nbytes).from_address(address)
    pages.owner = array
    buffer: Bytes = np.frombuffer(pages, np.uint8)
    return buffer


def _protect(address: int, nbytes: int, protection: int) -> None:
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
