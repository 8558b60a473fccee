"""The names of a registry, and the versions of each: ``names/<name>.json``, replaced atomically.

A version is a number and a digest. Not for what a digest stands for (`registry`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from .description import is_digest
from .errors import ArchiveError, ModelNotFound, SettingsError
from .files import parse_json, read_whole, sync_directory, write_file
from .shared_directory import SharedDirectory

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,199}")
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


class Names:
    """Names and versions in the directory of a registry.

    Parameters
    ----------
    directory : SharedDirectory
        The registry's. Who adds or removes holds its lock.
    """

    def __init__(self, directory: SharedDirectory):
        self._directory = directory

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
        versions, _ = self._read(base)
        if not versions:
            names = self.all()
            near = difflib.get_close_matches(base, names, n=3, cutoff=0.5) or names[:5]
            known = f"Did you mean {', '.join(repr(n) for n in near)}?" if near else "It is empty: publish one first."
            raise ModelNotFound(f"no model {base!r} in the registry {self._directory.path}. {known}")
        if not number:
            return versions[-1]
        for version in versions:
            if str(version.version) == number:
                return version
        raise ModelNotFound(f"no version {number} of {base!r}: there are {', '.join(str(v.version) for v in versions)}")

    def all(self) -> list[str]:
        """All names that have versions, sorted."""
        found = (self._directory.path / "names").glob("*.json")
        # What is no name's file, as one that no name can have, is not ours.
        names = sorted(name for path in found if is_name(name := unquote(path.stem)) and path == self._file(name))
        return [name for name in names if self._read(name)[0]]

    def versions(self) -> list[Version]:
        """All versions of all names."""
        return [version for name in self.all() for version in self._read(name)[0]]

    def add(self, name: str, digest: str) -> Version:
        """Make a digest the newest version of a name; it is no new one if it is the newest already."""
        versions, last = self._read(name)
        if versions and versions[-1].digest == digest:
            return versions[-1]
        created = datetime.now(UTC).isoformat(timespec="seconds")
        versions.append(Version(name, last + 1, digest, created))
        self._write(name, versions, last + 1)
        return versions[-1]

    def remove(self, name: str, digest: str | None = None) -> None:
        """Forget a name, or one version ("bert@2"), if it still is ``digest``."""
        base, _, number = name.partition("@")
        gone = self.resolve(name)
        if digest is not None and gone.digest != digest:
            raise ModelNotFound(f"{name} is another model here ({gone.digest[:12]}, not {digest[:12]})")
        versions, last = self._read(base)
        kept = [version for version in versions if number and version.version != gone.version]
        # The file stays: a number that was given once never names another model.
        self._write(base, kept, last)

    def _file(self, name: str) -> Path:
        return self._directory.path / "names" / f"{quote(name, safe='')}.json"

    def _read(self, name: str) -> tuple[list[Version], int]:
        """Versions of a name, oldest first, and the last number that was given."""
        path = self._file(name)
        self._directory.check_owners(path.parent, path)
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

    def _write(self, name: str, versions: list[Version], last: int) -> None:
        path = self._file(name)
        self._directory.part("names")
        with self._directory.temporary() as temporary:
            content = {"last": last, "versions": [asdict(version) for version in versions]}
            write_file(temporary / "names", json.dumps(content, indent=1).encode())
            os.replace(temporary / "names", path)
            sync_directory(path.parent)


def _version(name: str, value: dict[str, Any]) -> Version:
    version = Version(**value)
    if type(version.version) is not int or version.name != name or not is_digest(version.digest):
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
