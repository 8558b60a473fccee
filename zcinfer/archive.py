"""A model on disk: one directory, never changed once it is complete.

``weights.safetensors``
    The flat buffer, one entry a storage, so that any safetensors reader finds the weights under their names.
``skeleton.pkl``
    The module without its tensors. A pickle: opening a model runs code from it.
``description.json``
    The table and the digests of the other two. Its own SHA-256, the *seal*, stands for the whole archive; the header
    of the weights repeats it.

Not for names and versions, nor for whom to trust: see `names` and `seals`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .description import Bytes, Description, altered_storages
from .errors import ArchiveError
from .files import FileBytes, copy_file, create, open_regular, parse_json, read_whole, sync_directory, write_file
from .sharing import map_file

if TYPE_CHECKING:
    from .parts import Parts

FORMAT = 3
WEIGHTS, SKELETON, DESCRIPTION, VERIFIED = "weights.safetensors", "skeleton.pkl", "description.json", "verified.json"

# The header fills whole pages: data begins on one, and there is always a page in front of it (see `sharing`).
MARGIN = 4096
_WRITE = 16 << 20  # at a time, so that progress is seen
_MAX_HEADER = 100_000_000  # safetensors' own limit
MOST_DESCRIPTION = 1 << 26  # of 200,000 tensors; what parses it takes some times that
_MAX_STAMP = 4096
_MAX_MESSAGE = 500  # characters of what was found, which may be a name of any length
_SAFETENSORS_DTYPE = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Archive:
    """A complete archive in ``directory``.

    Parameters
    ----------
    directory : pathlib.Path
    ours : bool
        Nobody else can write there: then its own note that it was compared before is believed, and renewed. Outside
        the registry who has written the archive may have written that, too.

    Raises
    ------
    ArchiveError
        A file is missing or truncated, or the description is malformed. Contents are compared by `skeleton` and
        `verify`, not here.
    """

    def __init__(self, directory: Path, ours: bool = True):
        self.directory = directory
        self._ours = ours
        try:
            text = read_whole(directory / DESCRIPTION, MOST_DESCRIPTION)
            with open(open_regular(directory / WEIGHTS), "rb", buffering=0) as file:
                header = int.from_bytes(FileBytes(file.fileno(), 0, 8).read(), "little")
                found = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ArchiveError(f"{directory} is not a complete archive of a model: {error}") from error
        self.seal = hashlib.sha256(text).hexdigest()
        # What was written or compared before need not be looked through again.
        stamp = self._stamp()
        self._checked = stamp if ours and stamp == _read_stamp(directory / VERIFIED) else None
        try:
            self.description = read_description(text, check=self._checked is None)
        except (ArchiveError, ValueError) as error:
            raise ArchiveError(
                f"{directory / DESCRIPTION} is truncated or altered: {str(error)[:_MAX_MESSAGE]}. Publish the model "
                "again."
            ) from error
        self._data_start = 8 + header
        expected = self._data_start + self.description.nbytes
        if not MARGIN - 8 <= header <= _MAX_HEADER or found != expected:
            raise ArchiveError(
                f"{directory / WEIGHTS} is truncated or altered: it has {found} bytes, {expected} were written. "
                "Publish the model again."
            )

    def skeleton(self) -> bytes:
        """The skeleton's bytes, compared with their digest.

        Raises
        ------
        ArchiveError
            They are not what was written.
        """
        try:
            skeleton = read_whole(self.directory / SKELETON, self.description.skeleton_nbytes)
        except OSError as error:
            raise ArchiveError(
                f"{self.directory / SKELETON} cannot be read: {error}. Publish the model again."
            ) from error
        if hashlib.sha256(skeleton).hexdigest() != self.description.skeleton_sha256:
            raise ArchiveError(f"{self.directory / SKELETON} was altered: its digest differs. Publish the model again.")
        return skeleton

    def weights(self) -> Bytes:
        """The flat buffer as a copy-on-write mapping of the file (uint8).

        Raises
        ------
        ArchiveError
            It is not what was written (see `check`).
        """
        return self.padded_weights()[MARGIN:]

    def padded_weights(self) -> Bytes:
        """As `weights`, with `MARGIN` bytes of no meaning in front."""
        self.check()
        return self._map()

    def read_ahead(self) -> int:
        """Read the weights once, so that the page cache has them; returns the bytes that came from elsewhere for it."""
        self.check()
        before = _storage_read()
        try:
            with open(open_regular(self.directory / WEIGHTS), "rb", buffering=0) as file:
                piece = bytearray(1 << 22)
                while file.readinto(piece):
                    pass
        except OSError as error:
            raise self._unreadable(error) from error
        return _storage_read() - before

    def check(self) -> None:
        """Compare all contents with their digests, unless the weights are the very file that was written or compared
        before (same inode, size and times) and the description is the same.

        Raises
        ------
        ArchiveError
            As `verify`.
        """
        stamp = self._stamp()
        if stamp != self._checked:
            self.verify()
            self._checked = stamp

    def verify(self) -> None:
        """Compare all contents with their digests.

        Raises
        ------
        ArchiveError
            Naming the file, and the storages that differ. It is compared anew then by whoever opens it.
        """
        stamp = self._stamp()
        try:
            self.description.check()
            self.skeleton()
            with open(open_regular(self.directory / WEIGHTS), "rb", buffering=0) as file:
                self._compare(file.fileno())
        except OSError as error:
            raise self._unreadable(error) from error
        except ArchiveError:
            self._checked = None
            if self._ours:
                with contextlib.suppress(OSError):
                    (self.directory / VERIFIED).unlink()
            raise
        if self._ours:
            # In a registry we may only read it is compared again by the next process.
            with contextlib.suppress(OSError):
                write_file(self.directory / VERIFIED, json.dumps(stamp).encode())

    def _compare(self, descriptor: int) -> None:
        if FileBytes(descriptor, 0, self._data_start).read() != _safetensors_header(self.description, self.seal):
            raise ArchiveError(
                f"{self.directory / DESCRIPTION}, or the header of {WEIGHTS}, was altered: they do not agree. "
                "Publish the model again."
            )
        buffer = FileBytes(descriptor, self._data_start, self.description.nbytes)
        altered = altered_storages(buffer, self.description)
        for start, end in _gaps(self.description):
            if buffer[start:end].read() != bytes(end - start):
                altered.append(f"the padding at byte {start}")
        if altered:
            raise ArchiveError(
                f"{self.directory / WEIGHTS} was altered: the content of {', '.join(altered[:5])[:_MAX_MESSAGE]} "
                f"({len(altered)} of {len(self.description.storages)} storages) differs from its digest. "
                "Publish the model again."
            )

    def _map(self) -> Bytes:
        try:
            return map_file(self.directory / WEIGHTS, self._data_start - MARGIN, MARGIN + self.description.nbytes)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _stamp(self) -> list[int | str]:
        try:
            status = os.stat(self.directory / WEIGHTS)
        except OSError as error:
            raise self._unreadable(error) from error
        return [self.seal, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]

    def _unreadable(self, error: Exception) -> ArchiveError:
        return ArchiveError(f"{self.directory / WEIGHTS} cannot be read any more: {error}. Publish the model again.")


def read_description(text: bytes, check: bool = True) -> Description:
    """Value of a description's file; checked unless it was before.

    Raises
    ------
    ArchiveError, ValueError
        It is malformed, or of another format.
    """
    value = parse_json(text)
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise ArchiveError(f"it is not of format {FORMAT}, the one that this version reads")
    return Description.from_json(value, check)


def file_sizes(description: Description, seal: str) -> dict[str, int]:
    """Bytes of the files that a description with that seal is of."""
    weights = len(_safetensors_header(description, seal)) + description.nbytes
    return {SKELETON: description.skeleton_nbytes, WEIGHTS: weights}


def write_archive(parts: Parts, directory: Path, advance: Callable[[int], object] = int) -> Archive:
    """Write the parts of a model into ``directory``, which is new or empty; it is complete, and on disk, on return.

    ``advance`` is called with numbers of bytes as they are written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(parts.description)}, indent=1).encode()
    header = _safetensors_header(parts.description, hashlib.sha256(text).hexdigest())
    with create(directory / WEIGHTS) as file:
        file.write(header)
        for piece in parts.pieces():
            for start in range(0, len(piece), _WRITE):
                advance(file.write(piece[start : start + _WRITE]))
        file.flush()
        os.fsync(file.fileno())
    write_file(directory / SKELETON, parts.skeleton)
    write_file(directory / DESCRIPTION, text)
    archive = Archive(directory)
    write_file(directory / VERIFIED, json.dumps(archive._stamp()).encode())
    sync_directory(directory)
    return archive


def copy_archive(archive: Archive, directory: Path) -> Archive:
    """Copy an archive into ``directory``, which is new; it is complete, and on disk, on return.

    Raises
    ------
    ArchiveError
        It is truncated or altered, or became another while it was copied.
    """
    directory.mkdir(mode=0o700, parents=True)
    for name in (WEIGHTS, SKELETON, DESCRIPTION):
        try:
            source = open_regular(archive.directory / name)
        except OSError as error:
            raise ArchiveError(f"{archive.directory / name} cannot be read any more: {error}") from error
        copy_file(source, directory / name)
    copied = Archive(directory)
    if copied.seal != archive.seal:
        raise ArchiveError(f"{archive.directory} became another archive while it was copied: try again")
    copied.verify()
    return copied


def _safetensors_header(description: Description, seal: str) -> bytes:
    """Header of a safetensors file: the storages as entries, and the padding as entries of its own."""
    whole = {spec.storage: spec for spec in description.tensors if spec.whole}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "zcinfer": description.digest, "seal": seal}}
    for number, storage in enumerate(description.storages):
        tensor = whole.get(number)
        dtype = _SAFETENSORS_DTYPE.get(tensor.dtype) if tensor else None
        shape = list(tensor.size) if tensor and dtype else [storage.nbytes]
        header[storage.name] = _entry(dtype or "U8", shape, storage.offset, storage.offset + storage.nbytes)
    for start, end in _gaps(description):
        header[f"zcinfer.pad.{start}"] = _entry("U8", [end - start], start, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % MARGIN)
    return len(text).to_bytes(8, "little") + text


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _gaps(description: Description) -> Iterator[tuple[int, int]]:
    """Start and end of each padding of the flat buffer."""
    position = 0
    for storage in description.storages:
        if storage.offset > position:
            yield position, storage.offset
        position = storage.offset + storage.nbytes
    yield position, description.nbytes


def _storage_read() -> int:
    """Bytes that this thread has had fetched from disks and file servers; 0 where the system does not tell."""
    try:
        lines = Path("/proc/thread-self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def _read_stamp(path: Path) -> Any:
    try:
        return parse_json(read_whole(path, _MAX_STAMP))
    except (OSError, ValueError):
        return None
