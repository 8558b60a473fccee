"""The registry: a directory of archives and of the names they go by. It is the truth; stores are caches over it.

::

    archives/<digest>/     one archive each, complete or absent (renamed into place)
    bases/<digest>         digest of the model that this one shares storages with in memory; its archive is whole
    names/<name>.json      the versions of one name, replaced atomically
    seals/<seal>           archives this user has written anywhere: they may be opened without being asked

Not for memory: nothing here knows Ray, or loads a model.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from . import config
from .archive import DESCRIPTION, SKELETON, WEIGHTS, Archive, copy_archive, write_archive
from .config import check_owner, private_directory
from .errors import ArchiveError, ModelNotFound, SettingsError, StoreFull, UntrustedArchive
from .files import parse_json, read_whole, sync_directory, write_file
from .sizes import format_size

if TYPE_CHECKING:
    from .description import Description
    from .parts import Parts

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,199}")
_DIGEST = re.compile("[0-9a-f]{64}")
_MOST = 1 << 24  # bytes of the versions of one name


@dataclass(frozen=True)
class Version:
    """One version of one name."""

    name: str
    version: int
    digest: str
    created: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Registry:
    """The models of one directory.

    Parameters
    ----------
    directory : path
        Created with mode 0700 when first written to.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def make_room(self, digest: str, nbytes: int) -> None:
        """Raise `StoreFull` if an archive of that size, not yet here, would not fit on the disk."""
        private_directory(self.directory)
        if nbytes > shutil.disk_usage(self.directory).free and not self._is_complete(digest):
            raise self._full(nbytes)

    def _full(self, nbytes: int, why: str = "") -> StoreFull:
        free = shutil.disk_usage(self.directory).free
        return StoreFull(
            f"a model of {format_size(nbytes)} does not fit on the disk of {self.directory}, which has "
            f"{format_size(free)} to give{why}. Delete what is not needed (zcinfer rm NAME), or set "
            "DASK_ZCINFER__REGISTRY to a larger disk."
        )

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

    def _add(self, described: Description, write: Callable[[Path], Archive], name: str, base: str | None) -> Version:
        check_name(name)
        with self._told_where(described.nbytes + described.skeleton_nbytes):
            return self._add_named(described.digest, write, name, base)

    @contextmanager
    def _told_where(self, nbytes: int | None = None) -> Iterator[None]:
        """Have errors of writing, of so many bytes if that is known, say where and what to do."""
        try:
            yield
        except OSError as error:
            # Others have written meanwhile, or there is a quota
            if nbytes is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(nbytes, f" ({error.strerror})") from error
            raise SettingsError(
                f"the registry {self.directory} cannot be written to: {error}. Set zcinfer.registry to one that can."
            ) from error

    def _add_named(self, digest: str, write: Callable[[Path], Archive], name: str, base: str | None) -> Version:
        with self._temporary() as temporary:
            written = None if self._is_complete(digest) else write(temporary / "archive")
            with self._lock():
                if written is not None:
                    self._install(written, digest)
                elif not self._is_complete(digest):  # removed by another process a moment ago
                    self._install(write(temporary / "archive"), digest)
                # No chains, whatever became of the base meanwhile: its own base, and one that is a base stays whole.
                base = (self._base_digest(base) or base) if base is not None else None
                if base is not None and base != digest and not self._is_base(digest):
                    self.local(base)  # or it was removed meanwhile
                    self._write_base(digest, base, temporary)
                versions, last = self._read_versions(name)
                if versions and versions[-1].digest == digest:
                    return versions[-1]
                created = datetime.now(UTC).isoformat(timespec="seconds")
                versions.append(Version(name, last + 1, digest, created))
                self._write_versions(name, versions, last + 1)
                return versions[-1]

    def save(self, write: Callable[[Path], Archive], directory: Path) -> Archive:
        """Write an archive to any new directory, complete or not at all, and remember that we wrote it."""
        if directory.exists():
            raise SettingsError(f"{directory} exists: an archive is written to a new directory")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
            archive = write(Path(temporary) / "archive")
            self.trust(archive)
            os.rename(archive.directory, directory)
            sync_directory(directory.parent)
        return Archive(directory)

    def resolve(self, name: str) -> Version:
        """The version that ``name`` ("bert", "bert@2") means now.

        Raises
        ------
        ModelNotFound
            With the nearest names.
        """
        base, at, number = name.partition("@")
        check_name(base)
        if at and not number:
            raise SettingsError(f"{name!r} names no version: write {base!r}, or {base}@1")
        versions = self._versions(base)
        if not versions:
            names = self.names()
            near = difflib.get_close_matches(base, names, n=3, cutoff=0.5) or names[:5]
            known = f"Did you mean {', '.join(repr(n) for n in near)}?" if near else "It is empty: publish one first."
            raise ModelNotFound(f"no model {base!r} in the registry {self.directory}. {known}")
        if not number:
            return versions[-1]
        for version in versions:
            if str(version.version) == number:
                return version
        raise ModelNotFound(f"no version {number} of {base!r}: there are {', '.join(str(v.version) for v in versions)}")

    def archive(self, digest: str) -> Archive:
        """The archive with that digest; one that is not here comes from the URL of copies, if that is set.

        Raises
        ------
        ModelNotFound
            It is not here, nor there.
        ArchiveError
            It is truncated or altered; or (`UntrustedArchive`) its copy is not one of this user's.
        RemoteUnavailable
            The URL of copies cannot be read.
        """
        if not self._archive_directory(digest).exists() and config.get("remote"):
            self._restore(digest)
        return self.local(digest)

    def local(self, digest: str) -> Archive:
        """As `archive`, but of this directory alone."""
        directory = self._archive_directory(digest)
        self._check_owners(directory.parent, directory, *(directory / n for n in (WEIGHTS, SKELETON, DESCRIPTION)))
        if not directory.exists():
            raise ModelNotFound(
                f"no archive {digest[:12]} in the registry {self.directory}: it was deleted, or is another's"
            )
        archive = Archive(directory)
        if archive.description.digest != digest:
            raise ArchiveError(f"{directory} holds another model than its name says. Publish the model again.")
        return archive

    def _restore(self, digest: str) -> None:
        """Bring an archive here from the URL of copies: once, however many processes ask."""
        from .remote import Remote  # and fsspec, for those who use it

        copies = Remote(str(config.get("remote")))
        with self._told_where(), self._lock(".lock-restore"):
            if self._archive_directory(digest).exists():
                return
            with self._temporary() as temporary:
                try:
                    found = copies.download(digest, temporary / "archive", self.make_room)
                except ModelNotFound as error:
                    raise ModelNotFound(
                        f"no archive {digest[:12]} in the registry {self.directory}, and {error}"
                    ) from error
                with self._lock():
                    self._install(found, digest)

    @contextmanager
    def copied(self, url: str, trust: bool = False) -> Iterator[Path]:
        """The directory of an archive for a while, fetched from ``URL/<digest>``; it may then be opened, if it is one
        of this user's.
        """
        from .remote import Remote

        place, _, digest = url.rstrip("/").rpartition("/")
        self._archive_directory(digest)
        with self._temporary() as temporary:
            copies, target = Remote(place), temporary / "archive"
            with self._told_where():
                try:
                    self.trust(copies.download(digest, target, self.make_room))
                except UntrustedArchive:
                    if not trust:
                        raise
                    copies.download(digest, target, self.make_room, trust=True)
            yield target

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
        named = {version.digest for version in self.versions()}
        return named | {base for base in map(self._base_digest, named) if base}

    def nbytes(self) -> dict[str, int]:
        """Bytes on the disk of each archive, by digest."""
        found: dict[str, int] = {}
        for file in (self.directory / "archives").glob("*/*"):
            with suppress(OSError):  # gone meanwhile
                found[file.parent.name] = found.get(file.parent.name, 0) + file.lstat().st_size
        return found

    def names(self) -> list[str]:
        """All names that have versions, sorted."""
        found = (self.directory / "names").glob("*.json")
        # What is no name's file, as one that no name can have, is not ours.
        names = sorted(name for path in found if is_name(name := unquote(path.stem)) and path == self._names_file(name))
        return [name for name in names if self._versions(name)]

    def versions(self) -> list[Version]:
        """All versions of all names."""
        return [version for name in self.names() for version in self._versions(name)]

    def remove(self, name: str, digest: str | None = None) -> list[str]:
        """Forget a name (or one version, "bert@2", if it still is ``digest``); returns the digests without a name."""
        base, _, number = name.partition("@")
        with self._lock():
            gone = self.resolve(name)
            if digest is not None and gone.digest != digest:
                raise ModelNotFound(f"{name} is another model here ({gone.digest[:12]}, not {digest[:12]})")
            versions, last = self._read_versions(base)
            kept = [version for version in versions if number and version.version != gone.version]
            # The file stays: a number that was given once never names another model.
            self._write_versions(base, kept, last)
            used = self.digests()
            # Also what a process that died while it removed or added has left.
            orphans = sorted({path.name for path in (self.directory / "archives").iterdir()} - used)
            for digest in orphans:
                # Renamed first: a reader finds the archive whole or not at all. Mappings of it stay valid.
                with self._temporary() as temporary, suppress(FileNotFoundError):
                    os.rename(self.directory / "archives" / digest, temporary / "deleted")
                (self.directory / "bases" / digest).unlink(missing_ok=True)
        return orphans

    def trust(self, archive: Archive) -> None:
        """Remember that this very archive may be opened; no field inside an archive can vouch for it."""
        private_directory(self.directory)
        (self._part("seals") / archive.seal).touch(mode=0o644)

    def knows(self, archive: Archive) -> bool:
        """Whether this user has written that very archive."""
        self._check_owners(self.directory / "seals")
        return (self.directory / "seals" / archive.seal).exists()

    def open_trusted(self, directory: Path, trust: bool = False) -> Archive:
        """Open an archive outside the registry, check that we know its seal or are told to ``trust`` it, and compare
        all its contents.

        Raises
        ------
        UntrustedArchive
            This user has not written it.
        ArchiveError
            It is truncated or altered.
        """
        archive = Archive(directory, ours=False)
        if not trust and not self.knows(archive):
            raise UntrustedArchive(
                f"{directory} was not written by this user's zcinfer. Its skeleton is a pickle: opening it runs "
                "code from it. If you trust where it comes from, put it again with trust=True (--trust)."
            )
        archive.verify()
        return archive

    def _archive_directory(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):  # it may come from elsewhere, and must not lead there
            raise ModelNotFound(f"{digest[:80]!r} is no digest of a model")
        return self.directory / "archives" / digest

    def _part(self, name: str) -> Path:
        """A directory in the registry, made if it is missing."""
        found = self.directory / name
        found.mkdir(mode=0o755, exist_ok=True)
        return found

    def _check_owners(self, *parts: Path) -> None:
        """Refuse a registry that others can write to, or a part of it, where they can come to that."""
        check_owner(self.directory)
        with suppress(FileNotFoundError):
            if self.directory.stat().st_mode & 0o011:
                for part in parts:
                    check_owner(part)

    def _install(self, archive: Archive, digest: str) -> None:
        self.trust(archive)
        target = self._archive_directory(digest)
        if not self._is_complete(digest):
            shutil.rmtree(target, ignore_errors=True)
            self._part("archives")
            os.rename(archive.directory, target)
            sync_directory(target.parent)

    def _base_digest(self, digest: str) -> str:
        try:
            found = read_whole(self.directory / "bases" / digest, 64).decode() if digest else ""
        except (OSError, ValueError):
            return ""
        return found if _DIGEST.fullmatch(found) else ""

    def _is_base(self, digest: str) -> bool:
        return any(self._base_digest(path.name) == digest for path in (self.directory / "bases").glob("*"))

    def _write_base(self, digest: str, base: str, temporary: Path) -> None:
        write_file(temporary / "base", base.encode())
        os.replace(temporary / "base", self._part("bases") / digest)

    def _is_complete(self, digest: str) -> bool:
        try:
            found = self.local(digest)
            found.skeleton()
            found.check()
        except (ModelNotFound, ArchiveError):
            return False
        return True

    def _names_file(self, name: str) -> Path:
        return self.directory / "names" / f"{quote(name, safe='')}.json"

    def _versions(self, name: str) -> list[Version]:
        return self._read_versions(name)[0]

    def _read_versions(self, name: str) -> tuple[list[Version], int]:
        """Versions of a name, oldest first, and the last number that was given."""
        path = self._names_file(name)
        self._check_owners(path.parent, path)
        try:
            found = parse_json(read_whole(path, _MOST))
            last = found["last"]
            versions = [_version(name, value) for value in found["versions"]]
            numbers = [0, *(version.version for version in versions), last]
            if type(last) is not int or not all(a < b for a, b in pairwise(numbers[:-1])) or numbers[-2] > last:
                raise ValueError(f"its versions are {numbers[1:-1]}, the last is {last}")
            return versions, last
        except FileNotFoundError:
            return [], 0
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise ArchiveError(
                f"{path}, the versions of {name!r}, cannot be read: {str(error)[:500]}. Remove the file."
            ) from error

    def _write_versions(self, name: str, versions: list[Version], last: int) -> None:
        path = self._names_file(name)
        self._part("names")
        with self._temporary() as temporary:
            content = {"last": last, "versions": [asdict(version) for version in versions]}
            write_file(temporary / "names", json.dumps(content, indent=1).encode())
            os.replace(temporary / "names", path)
            sync_directory(path.parent)

    @contextmanager
    def _lock(self, name: str = ".lock") -> Iterator[None]:
        private_directory(self.directory)
        try:
            descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(
                f"the registry {self.directory} cannot be written to: {error}. Set zcinfer.registry to one that can."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A directory on the registry's file system, gone afterwards; those of dead processes go too."""
        # Each is locked by who uses it, in a step that nobody else sees half done.
        with self._lock(".lock-temporary"):
            for left in self.directory.glob(".tmp-*"):
                descriptor = _claim(left)
                if descriptor is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(descriptor)
            directory = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.directory))
            claimed = _claim(directory)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            if claimed is not None:
                os.close(claimed)


def _claim(directory: Path) -> int | None:
    """Descriptor of a directory that is locked until it is closed or this process ends; None: another has it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # gone meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _version(name: str, value: dict[str, Any]) -> Version:
    version = Version(**value)
    if type(version.version) is not int or version.name != name or not _DIGEST.fullmatch(version.digest):
        raise ValueError(f"{value} is no version of it")
    datetime.fromisoformat(version.created)
    return version


def is_name(name: str) -> bool:
    """Whether a model can have that name."""
    # Every slash takes three characters of a file's name, which has 255 at most.
    return bool(_NAME.fullmatch(name)) and len(quote(name, safe="")) <= 240


def check_name(name: str) -> None:
    """Refuse names that could not be told from versions, or typed."""
    if not is_name(name):
        raise SettingsError(
            f"{name!r} cannot be a model's name: use letters, digits and . _ - / , beginning with a letter or digit, "
            "200 at most"
        )
