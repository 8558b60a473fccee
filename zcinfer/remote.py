"""Copies of archives at a URL that all machines reach (setting ``zcinfer.remote``), for the day a machine is lost.

::

    URL/<digest>/<upload>/    weights.safetensors, skeleton.pkl, description.json: an archive
    URL/<digest>/<upload>/copy.json    written last: the upload is whole; signed by who wrote it

Two that upload the same at once write two uploads, of which each is whole or not used: object stores cannot rename.
Not for names and versions, nor for how files come there (`remote_files`), and nothing that is whole is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from .archive import DESCRIPTION, MOST_DESCRIPTION, SKELETON, WEIGHTS, Archive, file_sizes, read_description
from .description import Description
from .errors import ArchiveError, ModelNotFound, RemoteUnavailable, UntrustedArchive, ZcinferError
from .files import sync_directory, write_file
from .places import Place
from .progress import bytes_bar
from .remote_files import RemoteFiles
from .signatures import check_signature, sign

log = logging.getLogger("zcinfer")

COPY = "copy.json"
_MOST_COPY = 4096
_UPLOAD = re.compile("[0-9a-f]{32}")


class Remote:
    """The copies at a URL.

    Parameters
    ----------
    url : str
        Any that fsspec knows; keys and regions are fsspec's configuration. Or the whole path of a directory.

    Attributes
    ----------
    place : Place
    url : str
        Of the place, for people.

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
        self.place = Place.of(url)
        self.url = self.place.url
        self._files = RemoteFiles(self.place)

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
        folder = f"{digest}/{uuid4().hex}"
        try:
            self._files.make_folder(folder)
            for name in (WEIGHTS, SKELETON, DESCRIPTION):
                self._files.send(archive.directory / name, f"{folder}/{name}", advance)
            content = {"model": label, "signature": sign(archive.seal)}
            self._files.write(f"{folder}/{COPY}", json.dumps(content).encode())
        except BaseException:
            self._files.remove(folder)
            raise

    def uploads(self, digest: str) -> list[str]:
        """Names of the uploads of an archive; each may be half of one, or anybody's."""
        return sorted(filter(_UPLOAD.fullmatch, self._files.names(digest)))

    def is_whole(self, digest: str, upload: str) -> bool:
        """Whether all files of an upload are there, in their sizes, and it is signed with this user's token."""
        try:
            text, description = self._describe(digest, upload, trust=False)
            sizes = file_sizes(description, hashlib.sha256(text).hexdigest())
            return all(self._files.size(f"{digest}/{upload}/{name}") == size for name, size in sizes.items())
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
                self._files.receive(f"{digest}/{upload}/{name}", directory / name, size, advance)
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
            signed = self._files.read(f"{digest}/{upload}/{COPY}", _MOST_COPY)
            text = self._files.read(f"{digest}/{upload}/{DESCRIPTION}", MOST_DESCRIPTION)
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


def _telling(error: ZcinferError) -> int:
    """How much an error says: of what was written and is spoilt more than of what cannot be read, or is another's."""
    return (UntrustedArchive, RemoteUnavailable, ArchiveError).index(type(error))
