"""Files below a URL, or in a directory given by its path: listed, read and written, each within a time.

For copies (`remote`), which are written once under names of their own: object stores cannot rename, and nothing here
replaces a file. What is written to a directory is on its disk on return. Not for what the files say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.spec import AbstractBufferedFile

from .deadline import Outcome, join_within
from .errors import ArchiveError, RemoteUnavailable, ZcinferError
from .files import create, make_directory, open_regular, sync_directory
from .places import Place

T = TypeVar("T")

# Bytes that are read or written at a time
_PIECE = 16 << 20
# Seconds in which an answer comes, and one more for each so many bytes of it
_PATIENCE, _SLOWEST = 60.0, 250e3
# Seconds that may be spent on tidying up after an error
_LEAVING = 10.0
# Bytes that are read beyond what was asked for
_AHEAD = 1 << 20
# Parts that an object store takes for one file
_MOST_PARTS = 9000


class RemoteFiles:
    """The files of one place. Paths are relative to it.

    Parameters
    ----------
    place : Place

    Examples
    --------
    >>> RemoteFiles(Place.of("memory://doc-files")).names("no-such-folder")
    []
    """

    def __init__(self, place: Place):
        self._place, self._files = place, place.files

    def names(self, folder: str) -> list[str]:
        """Names of what is in a folder; of one that is not there, none.

        Raises
        ------
        RemoteUnavailable
            It cannot be listed, or its bucket is not there.
        """
        path, bucket = self._path(folder), self._place.bucket

        def ask() -> list[str] | None:
            self._files.invalidate_cache(path)  # others write there
            try:
                found = self._files.ls(path, detail=False)
            except FileNotFoundError:
                return [] if bucket is None or self._is_there(bucket) else None
            return [name.rstrip("/").rpartition("/")[2] for name in found]

        found = self._tried(f"{self._place.url} cannot be listed", ask)
        if found is None:
            raise RemoteUnavailable(
                f"{self._place.url} cannot be listed: there is no bucket {bucket!r}. None is ever made: look at the "
                "address (zcinfer.remote), or make it."
            )
        return found

    def _is_there(self, bucket: str) -> bool:
        """Whether a bucket is there, as far as one is let to see that."""
        with suppress(PermissionError):
            try:
                self._files.info(bucket)
            except FileNotFoundError:
                return False
        return True

    def size(self, path: str) -> int | None:
        """Bytes of a file."""
        found: int | None = self._tried(
            f"{self._url(path)} cannot be looked at", lambda: self._files.size(self._path(path))
        )
        return found

    def read(self, path: str, most: int) -> bytes:
        """Content of a small file.

        Raises
        ------
        FileNotFoundError
        ArchiveError
            It has more than ``most`` bytes.
        RemoteUnavailable
            It cannot be read.
        """

        def ask() -> bytes:
            with self._open(path) as file:
                content: bytes = file.read(most + 1)
            return content

        content = self._tried(f"{self._url(path)} cannot be read", ask, most, missing=True)
        if len(content) > most:
            raise ArchiveError(f"{self._url(path)} has more than {most:,} bytes, which are all that is read of it.")
        return content

    def receive(self, path: str, target: Path, nbytes: int, advance: Callable[[int], object]) -> None:
        """Copy so many bytes of a file to a new one here, which is on the disk on return; or as many as there are.

        ``advance`` is called with numbers of bytes as they are written.
        """
        what = f"{self._url(path)} cannot be read"
        with create(target) as file:
            with closing(self._tried(what, lambda: self._open(path))) as source:
                while nbytes > 0:
                    wanted = min(nbytes, _PIECE)
                    piece = self._tried(what, partial(source.read, wanted), wanted)
                    if not piece:
                        break
                    file.write(piece)
                    nbytes -= len(piece)
                    advance(len(piece))
            file.flush()
            os.fsync(file.fileno())

    def make_folder(self, folder: str) -> None:
        """Make a folder for files, where files need one."""
        if self._place.has_directories:
            self._tried(f"{self._url(folder)} cannot be written", lambda: self._make_directory(self._path(folder)))

    def _make_directory(self, path: str) -> None:
        if self._place.directory is None:
            self._files.makedirs(path, exist_ok=True)
        else:
            make_directory(Path(path))

    def send(self, source: Path, path: str, advance: Callable[[int], object]) -> None:
        """Copy a file from here; ``advance`` is called with numbers of bytes as they are written.

        Raises
        ------
        RemoteUnavailable
            It cannot be written. Nothing has its name then, but in a directory.
        """
        with open(open_regular(source), "rb", buffering=0) as file:
            nbytes = os.fstat(file.fileno()).st_size
            with self._writing(path, nbytes) as write:
                while piece := file.read(_PIECE):
                    write(piece)
                    advance(len(piece))

    def write(self, path: str, content: bytes) -> None:
        """A new small file."""
        with self._writing(path, len(content)) as write:
            write(content)

    def remove(self, folder: str) -> None:
        """Remove a folder that cannot be finished, if that can be done soon."""
        join_within(_LEAVING, lambda: self._files.rm(self._path(folder), recursive=True))

    @contextmanager
    def _writing(self, path: str, nbytes: int) -> Iterator[Callable[[bytes], object]]:
        """The function that writes to a new file, which is whole afterwards, or in most places not there."""
        place, what = self._path(path), f"{self._url(path)} cannot be written"
        if self._place.directory is not None:
            file = self._tried(what, lambda: create(Path(place)))
            with closing(file):
                yield lambda piece: self._tried(what, lambda: file.write(piece), len(piece))
                self._tried(what, lambda: _sync(file), nbytes)
            self._tried(what, lambda: sync_directory(Path(place).parent))
            return
        block = -(-max(nbytes, 1) // (_MOST_PARTS * _PIECE)) * _PIECE
        file = self._tried(what, lambda: self._files.open(place, "wb", block_size=block))
        try:
            yield lambda piece: self._tried(what, lambda: file.write(piece), block)
            self._tried(what, file.close, block)
        except BaseException:
            join_within(_LEAVING, lambda: _abandon(file))
            raise

    def _open(self, path: str) -> Any:
        # In a directory there may be a pipe in its place, whose writer one would wait for
        if self._place.directory is not None:
            return open(open_regular(self._path(path)), "rb")
        return self._files.open(self._path(path), "rb", block_size=_AHEAD)

    def _path(self, path: str) -> str:
        return f"{self._place.root}/{path}"

    def _url(self, path: str) -> str:
        return f"{self._place.url}/{path}"

    def _tried(self, what: str, function: Callable[[], T], nbytes: int = 0, missing: bool = False) -> T:
        """Result of a call that handles so many bytes; `RemoteUnavailable` where it fails, or takes too long."""
        seconds = _PATIENCE + nbytes / _SLOWEST
        silent: Outcome = None, TimeoutError(f"no answer within {seconds:.0f} s")
        result, error = join_within(seconds, function) or silent
        if error is None:
            found: T = result
            return found
        if isinstance(error, ZcinferError) or (missing and isinstance(error, FileNotFoundError)):
            raise error
        what_to_do = "Look at the address (zcinfer.remote), the network, and the rights that fsspec has there."
        if self._place.directory is not None and isinstance(error, PermissionError):
            what_to_do = "Give each user a directory (zcinfer.remote): the first to put a model owns its folder there."
        raise RemoteUnavailable(f"{what}: {type(error).__name__}: {error}. {what_to_do}") from error


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _abandon(file: Any) -> None:
    """Give up a file that is not finished: to close it would give half of it its name."""
    if isinstance(file, AbstractBufferedFile):
        file.closed = True  # nor is it to be closed by the garbage collector
        file.discard()  # else the parts that an object store has of it would be kept, and paid for
    else:
        file.close()
