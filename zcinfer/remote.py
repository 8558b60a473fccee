"""Copies of archives at a URL that all machines reach (setting ``zcinfer.remote``), for the day a machine is lost.

::

    URL/<digest>/<upload>/    weights.safetensors, skeleton.pkl, description.json: an archive
    URL/<digest>/<upload>/copy.json    written last: the upload is whole; signed by who wrote it

Two that upload the same at once write two uploads, of which each is whole or not used: object stores cannot rename.
Not for names and versions, and nothing that is whole is removed there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.core import url_to_fs

from .archive import DESCRIPTION, MOST_DESCRIPTION, SKELETON, WEIGHTS, Archive, file_sizes, read_description
from .description import Description
from .errors import ArchiveError, ModelNotFound, RemoteUnavailable, SettingsError, UntrustedArchive, ZcinferError
from .files import create, open_regular, sync_directory, write_file
from .progress import bytes_bar
from .signatures import check_signature, sign

log = logging.getLogger("zcinfer")

COPY = "copy.json"
_MOST_COPY = 4096
_PIECE = 16 << 20
_UPLOAD = re.compile("[0-9a-f]{32}")
# Where a file needs a directory. Elsewhere none is made: object stores make the bucket, too, that a mistyped URL names
_WITH_DIRECTORIES = frozenset(
    ["file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs", "webHDFS", "dbfs"]
)


class Remote:
    """The copies at a URL.

    Parameters
    ----------
    url : str
        Any that fsspec knows; keys and regions are fsspec's configuration. Or the whole path of a directory.

    Attributes
    ----------
    url : str
        The same as a URL, also of a directory.

    Raises
    ------
    SettingsError
        fsspec does not know it, a package for it is missing, or it names no place.

    Examples
    --------
    >>> Remote("memory://doc-models").uploads("0" * 64)
    []
    """

    def __init__(self, url: str):
        self.url = _as_url(url)
        try:
            self._files, root = url_to_fs(self.url)
        except ImportError as error:
            raise SettingsError(
                f"{url!r} needs a package that is not installed: {error}. Install it on every machine."
            ) from error
        except Exception as error:  # each file system has its own
            raise SettingsError(
                f"{url!r} cannot be used for copies of models: {str(error) or type(error).__name__}. Give a URL that "
                "fsspec knows, as s3://bucket/models or file:///shared/models (zcinfer.remote)."
            ) from error
        self._root: str = root.rstrip("/")

    @property
    def directory(self) -> Path | None:
        """The directory that it is, where it is one of this machine's file systems."""
        return Path(self._root or "/") if "file" in _protocols(self._files) else None

    def upload(self, archive: Archive, label: str, advance: Callable[[int], object] = int) -> None:
        """Write a copy of an archive, unless a whole one is there.

        Parameters
        ----------
        archive : Archive
        label : str
            For people who look there.
        advance : callable
            Called with numbers of bytes as they are written.

        Raises
        ------
        RemoteUnavailable
            It cannot be written. Interrupted at any moment, half a copy is never taken for one.
        """
        digest = archive.description.digest
        if any(self.is_whole(digest, upload) for upload in self.uploads(digest)):
            return
        folder = f"{self._root}/{digest}/{uuid4().hex}"
        try:
            with self._told(f"{digest[:12]} cannot be written to {self.url}"):
                if not _WITH_DIRECTORIES.isdisjoint(_protocols(self._files, inner=True)):
                    self._files.makedirs(folder, exist_ok=True)
                for name in (WEIGHTS, SKELETON, DESCRIPTION):
                    self._send(archive.directory / name, f"{folder}/{name}", advance)
                content = {"model": label, "signature": sign(archive.seal)}
                self._files.pipe_file(f"{folder}/{COPY}", json.dumps(content).encode())
        except BaseException:
            with suppress(Exception):
                self._files.rm(folder, recursive=True)
            raise

    def uploads(self, digest: str) -> list[str]:
        """Names of the uploads of an archive; each may be half of one, or anybody's."""
        folder = f"{self._root}/{digest}"
        with self._told(f"{self.url} cannot be listed"):
            self._files.invalidate_cache(folder)  # others write there
            try:
                found = (path.rstrip("/").rpartition("/")[2] for path in self._files.ls(folder, detail=False))
                return sorted(name for name in found if _UPLOAD.fullmatch(name))
            except FileNotFoundError:
                return []

    def is_whole(self, digest: str, upload: str) -> bool:
        """Whether all files of an upload are there, in their sizes, and it is signed with this user's token."""
        try:
            text, description = self._describe(digest, upload, trust=False)
            sizes = file_sizes(description, hashlib.sha256(text).hexdigest())
            with self._told(f"{self.url} cannot be looked at"):
                return all(self._files.size(self._path(digest, upload, n)) == size for n, size in sizes.items())
        except (ArchiveError, RemoteUnavailable):
            return False

    def download(
        self, digest: str, directory: Path, make_room: Callable[[str, int], object], trust: bool = False
    ) -> Archive:
        """Copy an archive from there into ``directory``, which is new; it is compared, and on disk, on return.

        Parameters
        ----------
        digest : str
        directory : pathlib.Path
        make_room : callable
            Called with the digest and bytes, before these are fetched; may refuse them.
        trust : bool
            Take also what is not signed with this user's token.

        Raises
        ------
        ModelNotFound
            There is no copy.
        UntrustedArchive, ArchiveError
            There is none that is signed with this user's token; or that is whole.
        RemoteUnavailable
            The URL cannot be read, or nothing of what is there.
        """
        refused: ZcinferError | None = None
        for upload in self.uploads(digest):
            try:
                return self._download(digest, upload, directory, make_room, trust)
            except (ArchiveError, RemoteUnavailable) as error:  # the next one may be good
                refused = max(refused or error, error, key=_telling)
                shutil.rmtree(directory, ignore_errors=True)
        if refused is not None:
            raise refused
        raise ModelNotFound(f"no copy of {digest[:12]} at {self.url}: put the model again")

    def _download(
        self, digest: str, upload: str, directory: Path, make_room: Callable[[str, int], object], trust: bool
    ) -> Archive:
        text, description = self._describe(digest, upload, trust)
        sizes = file_sizes(description, hashlib.sha256(text).hexdigest())
        make_room(digest, sum(sizes.values()))
        directory.mkdir(mode=0o700, parents=True)
        write_file(directory / DESCRIPTION, text)
        with bytes_bar(f"fetch {digest[:12]}", sum(sizes.values()), None) as advance:
            for name, size in sizes.items():
                self._receive(self._path(digest, upload, name), directory / name, size, advance)
        try:
            archive = Archive(directory)
            archive.verify()
        except ArchiveError as error:
            raise self._spoilt(digest, upload, str(error).replace(f"{directory}/", "")) from error
        sync_directory(directory)
        log.info("%s was fetched from %s", digest[:12], self.url)
        return archive

    def _describe(self, digest: str, upload: str, trust: bool) -> tuple[bytes, Description]:
        """Text and value of an upload's description, when its signature was found good."""
        try:
            signed = self._read(self._path(digest, upload, COPY), _MOST_COPY)
            text = self._read(self._path(digest, upload, DESCRIPTION), MOST_DESCRIPTION)
        except FileNotFoundError as error:
            raise ArchiveError(
                f"{self.url}/{digest}/{upload} is half a copy: its upload was interrupted, or goes on now. Put the "
                "model again on a machine that has it, and remove that folder."
            ) from error
        if not trust:
            check_signature(signed, hashlib.sha256(text).hexdigest(), f"{self.url}/{digest}", upload)
        try:
            description = read_description(text)
        except (ArchiveError, ValueError) as error:
            raise self._spoilt(digest, upload, str(error)[:500]) from error
        if description.digest != digest:
            raise self._spoilt(digest, upload, f"it is of another model, {description.digest[:12]}")
        return text, description

    def _spoilt(self, digest: str, upload: str, why: str) -> ArchiveError:
        return ArchiveError(
            f"the copy {self.url}/{digest}/{upload} is truncated or altered: {why} Remove that folder, and put the "
            "model again on a machine that has it."
        )

    def _path(self, digest: str, upload: str, name: str) -> str:
        return f"{self._root}/{digest}/{upload}/{name}"

    def _read(self, path: str, most: int) -> bytes:
        with self._told(f"{path} cannot be read", missing=True), self._open(path) as file:
            content: bytes = file.read(most + 1)
        if len(content) > most:
            raise ArchiveError(f"{path} has more than {most:,} bytes, which are all that is read of it.")
        return content

    def _open(self, path: str) -> Any:
        # In a directory there may be a pipe in its place, whose writer one would wait for
        return self._files.open(path, "rb") if self.directory is None else open(open_regular(path), "rb")

    def _send(self, source: Path, path: str, advance: Callable[[int], object]) -> None:
        with open(open_regular(source), "rb", buffering=0) as file, self._files.open(path, "wb") as target:
            while piece := file.read(_PIECE):
                target.write(piece)
                advance(len(piece))

    def _receive(self, path: str, target: Path, nbytes: int, advance: Callable[[int], object]) -> None:
        """Copy so many bytes; more are not asked for, and fewer are found when the archive is compared."""
        with create(target) as file:
            with self._told(f"{path} cannot be read"):
                source = self._open(path)
            with source:
                while nbytes > 0:
                    with self._told(f"{path} cannot be read"):
                        piece = source.read(min(nbytes, _PIECE))
                    if not piece:
                        break
                    file.write(piece)
                    nbytes -= len(piece)
                    advance(len(piece))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _told(self, what: str, missing: bool = False) -> Iterator[None]:
        try:
            yield
        except ZcinferError:
            raise
        except Exception as error:  # each file system has its own
            if missing and isinstance(error, FileNotFoundError):
                raise
            what_to_do = "Look at the address (zcinfer.remote), the network, and the rights that fsspec has there."
            if self.directory is not None and isinstance(error, PermissionError):
                what_to_do = (
                    "Give each user a directory (zcinfer.remote): the first to put a model owns its folder there."
                )
            raise RemoteUnavailable(f"{what}: {type(error).__name__}: {error}. {what_to_do}") from error


def _as_url(given: str) -> str:
    """What is shown to people: ``URL/<digest>`` can be put. What fsspec takes for the current directory is refused."""
    scheme, is_url, place = given.partition("://") if "://" in given else ("file", "", given)
    place = place.rstrip("/")
    if not place or (scheme.rpartition("::")[2] in ("file", "local") and not place.startswith(("/", "~"))):
        raise SettingsError(
            f"{given!r} names no place for copies of models: give a URL, as s3://bucket/models or "
            "file:///shared/models, or the whole path of a directory (zcinfer.remote)."
        )
    if is_url:
        return f"{scheme}://{place}"
    try:
        return f"file://{Path(place).expanduser()}"  # fsspec takes the %20 of as_uri for what it looks like
    except RuntimeError as error:
        raise SettingsError(f"{given!r} cannot be used for copies of models: {error} (zcinfer.remote)") from error


def _protocols(files: Any, inner: bool = False) -> set[str]:
    """Names of a file system; with ``inner``, also of those that it is a cache of, or a part."""
    found = getattr(files, "protocol", ())
    names = {found} if isinstance(found, str) else set(found)
    below = getattr(files, "fs", None) if inner else None
    return names | _protocols(below, inner) if below is not None else names


def _telling(error: ZcinferError) -> int:
    """How much an error says: of what was written and is spoilt more than of what cannot be read, or is another's."""
    return (UntrustedArchive, RemoteUnavailable, ArchiveError).index(type(error))
