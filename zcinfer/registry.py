"""The registry: a directory of archives and of the names they go by. It is the truth; stores are caches over it.

::

    archives/<digest>/     one archive each, complete or absent (renamed into place)
    bases/<digest>         digest of the model that this one shares storages with in memory; its archive is whole
    names/<name>.json      the versions of one name (`names`)
    seals/<seal>           archives this user has written anywhere (`seals`)

Not for memory: nothing here knows Ray, or loads a model.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import config
from .archive import DESCRIPTION, SKELETON, WEIGHTS, Archive, copy_archive, write_archive
from .description import is_digest
from .errors import ArchiveError, ModelNotFound, RemoteUnavailable, SettingsError, StoreError
from .files import make_directory, read_whole, sync_directory, write_file
from .names import Names, Version, check_name
from .seals import Seals
from .shared_directory import SharedDirectory

if TYPE_CHECKING:
    from .description import Description
    from .parts import Parts


log = logging.getLogger("zcinfer")


class Registry:
    """The models of one directory.

    Parameters
    ----------
    directory : path
        Created with mode 0700 when first written to.

    Attributes
    ----------
    directory : pathlib.Path
    names : Names
        Which digest a name means. A model gets a name by `add` or `adopt`, and loses it by `remove`.
    seals : Seals
        Which archives may be opened.
    shared : SharedDirectory
        Locks and temporary directories.
    """

    def __init__(self, directory: str | Path):
        self.shared = SharedDirectory(directory)
        self.directory = self.shared.path
        self.names = Names(self.shared)
        self.seals = Seals(self.shared)

    def make_room(self, digest: str, nbytes: int) -> None:
        """Raise `StoreFull` if an archive of that size, not yet here, would not fit on the disk."""
        self.shared.make()
        if nbytes > self.shared.free() and not self._is_complete(digest):
            raise self.shared.full(nbytes)

    def add(self, parts: Parts, name: str, base: str | None = None, advance: Callable[[int], object] = int) -> Version:
        """Write the parts' archive unless it is there, and make it the newest version of ``name``.

        The same content again is no new version. Interrupted at any moment, nothing is half-published. With the
        digest of a ``base``, memory is shared with that; its archive stays as long as this one. ``advance`` is called
        with numbers of bytes as they are written.
        """
        return self._add(parts.description, lambda place: write_archive(parts, place, advance), name, base)

    def adopt(self, archive: Archive, name: str, base: str | None = None) -> Version:
        """As `add`, with a copy of an archive that lies elsewhere."""
        return self._add(archive.description, lambda place: copy_archive(archive, place), name, base)

    def take(self, fetched: Archive, name: str, base: str | None = None) -> Version:
        """As `add`, with an archive that `copied` gives, which is moved."""

        def move(place: Path) -> Archive:
            os.rename(fetched.directory, place)
            return Archive(place)

        return self._add(fetched.description, move, name, base)

    def _add(self, described: Description, write: Callable[[Path], Archive], name: str, base: str | None) -> Version:
        check_name(name)
        with self.shared.told_where(described.nbytes + described.skeleton_nbytes):
            return self._add_named(described.digest, write, name, base)

    def _add_named(self, digest: str, write: Callable[[Path], Archive], name: str, base: str | None) -> Version:
        with self.shared.temporary() as temporary:
            written = None if self._is_complete(digest) else write(temporary / "archive")
            with self.shared.lock():
                if written is not None:
                    self._install(written, digest)
                elif not self._is_complete(digest):  # removed by another process a moment ago
                    self._install(write(temporary / "archive"), digest)
                # No chains, whatever became of the base meanwhile: its own base, and one that is a base stays whole.
                base = (self._base_digest(base) or base) if base is not None else None
                if base is not None and base != digest and not self._is_base(digest):
                    self.local(base)  # or it was removed meanwhile
                    self._write_base(digest, base, temporary)
                return self.names.add(name, digest)

    def save(self, write: Callable[[Path], Archive], directory: Path) -> Archive:
        """Write an archive to any new directory, complete or not at all, and remember that we wrote it."""
        if directory.exists():
            raise SettingsError(f"{directory} exists: an archive is written to a new directory")
        make_directory(directory.parent)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
            archive = write(Path(temporary) / "archive")
            self.seals.add(archive)
            os.rename(archive.directory, directory)
            sync_directory(directory.parent)
        return Archive(directory)

    def archive(self, digest: str) -> Archive:
        """The archive with that digest; one that is not here, or was cut, comes from the URL of copies, if that is set.

        Raises
        ------
        ModelNotFound
            It is not here, nor there.
        ArchiveError
            It is truncated or altered; or (`UntrustedArchive`) its copy is not one of this user's.
        RemoteUnavailable
            The URL of copies cannot be read.
        """
        self._archive_directory(digest)
        try:
            return self.local(digest)
        except (ModelNotFound, ArchiveError) as missing:
            self._repair(digest, missing)
        return self.local(digest)

    def whole(self, digest: str) -> tuple[Archive, bytes]:
        """As `archive`, compared (see `Archive.check`), with its skeleton; one that was altered is replaced as well."""
        found = self.archive(digest)
        try:
            found.check()
            return found, found.skeleton()
        except ArchiveError as altered:
            self._repair(digest, altered)
        found = self.local(digest)
        return found, found.skeleton()

    def local(self, digest: str) -> Archive:
        """As `archive`, but of this directory alone."""
        directory = self._archive_directory(digest)
        self.shared.check_owners(
            directory.parent, directory, *(directory / n for n in (WEIGHTS, SKELETON, DESCRIPTION))
        )
        if not directory.exists():
            raise ModelNotFound(
                f"no archive {digest[:12]} in the registry {self.directory}: it was deleted, or is another's"
            )
        archive = Archive(directory)
        if archive.description.digest != digest:
            raise ArchiveError(f"{directory} holds another model than its name says. Publish the model again.")
        return archive

    def _repair(self, digest: str, found: ModelNotFound | ArchiveError) -> None:
        """Put a copy in the place of an archive that is missing or damaged; or raise what was found of it."""
        url, is_missing = config.get("remote"), isinstance(found, ModelNotFound)
        if not url and is_missing:
            raise found
        if not url:
            names = [version.name for version in self.names.versions() if version.digest == digest]
            raise ArchiveError(
                f"{found} No copies are kept (zcinfer.remote): zc.put(MODEL, {names[0] if names else 'NAME'!r}), in a "
                "program that has it or with the archive of a zc.save, puts it in its place."
            ) from found
        try:
            is_new = self._restore(digest)
        except (ModelNotFound, ArchiveError, StoreError) as error:
            if isinstance(error, ModelNotFound) and is_missing:
                raise ModelNotFound(
                    f"no archive {digest[:12]} in the registry {self.directory}, and {error}"
                ) from error
            if is_missing:
                raise
            raise ArchiveError(f"{found} Nor is its copy to be had: {error}") from error
        if is_new and not is_missing:
            log.warning("%s It was replaced by its copy at %s.", found, config.shown(str(url)))

    def _restore(self, digest: str) -> bool:
        """Bring an archive here from the URL of copies: once, however many processes ask."""
        from .remote import Remote  # and fsspec, for those who use it

        copies = Remote(str(config.get("remote")))
        # By the digest's beginning: other models hardly ever wait, and there are not ever more of these files
        with self.shared.told_where(), self.shared.lock(f".lock-restore-{digest[:2]}"):
            if self._is_complete(digest):
                return False
            with self.shared.temporary() as temporary:
                found = copies.download(digest, temporary / "archive", self.make_room)
                with self.shared.lock():
                    self._install(found, digest)
        return True

    @contextmanager
    def copied(self, url: str, trust: bool = False) -> Iterator[Archive]:
        """An archive for a while, fetched from ``URL/<digest>`` and compared.

        Its seal is known if it is one of this user's, and it can then be kept (`take`).
        """
        from .remote import Remote

        place, _, digest = url.rstrip("/").rpartition("/")
        self._archive_directory(digest)
        with self.shared.temporary() as temporary:
            copies, target = Remote(place), temporary / "archive"
            with self.shared.told_where():
                try:
                    found = copies.download(digest, target, self.make_room)
                    self.seals.add(found)
                except (ArchiveError, RemoteUnavailable):  # of another upload, perhaps
                    if not trust:
                        raise
                    found = copies.download(digest, target, self.make_room, trust=True)
            yield found

    def base(self, digest: str) -> Archive | None:
        """The archive of the model that this one shares storages with in memory."""
        digest = self._base_digest(digest)
        if self._base_digest(digest):
            return None  # never written so: it would lead in a circle
        try:
            found = self.local(digest) if digest else None
            if found is not None:
                found.check()
        except (ModelNotFound, ArchiveError):
            return None  # the archive itself is whole
        return found

    def digests(self) -> set[str]:
        """Of all models that are in use: those that have names, and their bases."""
        named = {version.digest for version in self.names.versions()}
        return named | {base for base in map(self._base_digest, named) if base}

    def nbytes(self) -> dict[str, int]:
        """Bytes on the disk of each archive, by digest."""
        found: dict[str, int] = {}
        for file in (self.directory / "archives").glob("*/*"):
            with suppress(OSError):  # gone meanwhile
                found[file.parent.name] = found.get(file.parent.name, 0) + file.lstat().st_size
        return found

    def remove(self, name: str, digest: str | None = None) -> list[str]:
        """Forget a name (or one version, "bert@2", if it still is ``digest``); returns the digests without a name."""
        with self.shared.lock():
            self.names.remove(name, digest)
            used = self.digests()
            # Also what a process that died while it removed or added has left.
            orphans = sorted({path.name for path in (self.directory / "archives").iterdir()} - used)
            for digest in orphans:
                # Renamed first: a reader finds the archive whole or not at all. Mappings of it stay valid.
                with self.shared.temporary() as temporary, suppress(FileNotFoundError):
                    os.rename(self.directory / "archives" / digest, temporary / "deleted")
                (self.directory / "bases" / digest).unlink(missing_ok=True)
        return orphans

    def _archive_directory(self, digest: str) -> Path:
        if not is_digest(digest):  # it may come from elsewhere, and must not lead there
            raise ModelNotFound(f"{digest[:80]!r} is no digest of a model")
        return self.directory / "archives" / digest

    def _install(self, archive: Archive, digest: str) -> None:
        self.seals.add(archive)
        target = self._archive_directory(digest)
        if not self._is_complete(digest):
            self.shared.part("archives")
            if os.path.lexists(target):  # who has it mapped keeps it
                os.rename(target, archive.directory.with_name("damaged"))
            os.rename(archive.directory, target)
            sync_directory(target.parent)

    def _base_digest(self, digest: str) -> str:
        try:
            found = read_whole(self.directory / "bases" / digest, 64).decode() if digest else ""
        except (OSError, ValueError):
            return ""
        return found if is_digest(found) else ""

    def _is_base(self, digest: str) -> bool:
        return any(self._base_digest(path.name) == digest for path in (self.directory / "bases").glob("*"))

    def _write_base(self, digest: str, base: str, temporary: Path) -> None:
        write_file(temporary / "base", base.encode())
        bases = self.shared.part("bases")
        os.replace(temporary / "base", bases / digest)
        sync_directory(bases)

    def _is_complete(self, digest: str) -> bool:
        try:
            found = self.local(digest)
            found.skeleton()
            found.check()
        except (ModelNotFound, ArchiveError):
            return False
        return True
