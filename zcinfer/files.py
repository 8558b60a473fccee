"""Small files that others may have made or spoilt: never waited for, read up to a limit, replaced as a whole.

For archives, the registry's names, and what else is read before anybody has vouched for it. Not for arrays, and not for
whom to trust (`seals`).
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

# Bytes of JSON that a list or an object must have on the average: ours have 30, and each takes 80 bytes of memory.
_SPARSEST = 16
_PIECE = 1 << 20


def open_regular(path: str | Path) -> int:
    """Descriptor of a file, open for reading.

    Raises
    ------
    OSError
        There is none; or it is a pipe, a device or a socket, which one may wait for without end.
    """
    # Looked at first: to open a device may do more than open it.
    if stat.S_ISREG(os.stat(path).st_mode):
        # It may be a pipe by now, which would have us wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_whole(path: str | Path, limit: int) -> bytes:
    """Content of a file.

    Raises
    ------
    OSError
        It is none that can be read, or has more than ``limit`` bytes.

    Examples
    --------
    >>> read_whole("/dev/zero", 1000)
    Traceback (most recent call last):
    OSError: [Errno 22] it is no regular file: '/dev/zero'
    """
    with open(open_regular(path), "rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > limit:
            raise OSError(errno.EFBIG, f"it has {nbytes:,} bytes, and at most {limit:,} are read", str(path))
        content = FileBytes(file.fileno(), 0, nbytes + 1).read()
    if len(content) != nbytes:
        raise OSError(errno.EIO, f"it has {nbytes:,} bytes, but gives {len(content):,}", str(path))
    return content


def parse_json(content: bytes) -> Any:
    """Value of JSON in UTF-8.

    Raises
    ------
    ValueError
        It is none; or what Python would take, but no other reader, or what is there to exhaust one: a key twice, NaN,
        half a surrogate pair, hardly anything but brackets, nesting without end.

    Examples
    --------
    >>> parse_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' is there twice
    """
    if (content.count(b"[") + content.count(b"{")) * _SPARSEST > len(content) + 1000:
        raise ValueError("it is hardly anything but brackets")
    try:
        value = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_refused)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a pair
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is there twice")
        found[name] = value
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def create(path: Path) -> Any:
    """A new file, open for writing bytes; nobody else can write to it, and no link is followed."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o644))


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically; what was there, or what is new, is there after a loss of power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    temporary.unlink(missing_ok=True)  # a dead process may have had our number
    with create(temporary) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def copy_file(descriptor: int, target: Path) -> None:
    """Copy what an open file has now to a new one, which is on disk on return. The descriptor is closed."""
    with open(descriptor, "rb", buffering=0) as source, create(target) as file:
        left = os.fstat(descriptor).st_size
        while left > 0 and (piece := source.read(min(left, _PIECE))):
            file.write(piece)
            left -= len(piece)
        file.flush()
        os.fsync(file.fileno())


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Make a directory unless it is there, and those above it that are missing; they are on disk on return."""
    missing = list(takewhile(lambda above: not above.exists(), (path, *path.parents)))
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing:
        with suppress(PermissionError):  # one may write to it, and not list it
            sync_directory(made.parent)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk, where its file system can be asked for that."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class FileBytes:
    """Bytes of an open file, read when they are asked for.

    What is mapped would end the process where the file is cut meanwhile; this gives fewer bytes. And where one would
    have to wait (/proc/kmsg is a regular file too), Python's files give None; this raises `OSError`.

    Parameters
    ----------
    descriptor : int
        Stays the caller's.
    start, nbytes : int
    """

    def __init__(self, descriptor: int, start: int, nbytes: int):
        self._descriptor, self._start, self.nbytes = descriptor, start, nbytes

    def __getitem__(self, part: slice) -> FileBytes:
        start, stop, _ = part.indices(self.nbytes)
        return FileBytes(self._descriptor, self._start + start, max(0, stop - start))

    def read(self) -> bytes:
        """All of them, or as many as there are."""
        pieces, left = [], self.nbytes
        while left > 0 and (piece := os.pread(self._descriptor, left, self._start + self.nbytes - left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)
