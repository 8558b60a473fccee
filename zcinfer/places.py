"""Where copies lie: the file system and the folder that a URL means, and what fsspec would take it for by mistake.

Not for what is read and written there (`remote_files`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from .config import shown
from .errors import SettingsError

# Where a file needs a directory. Elsewhere none is made: object stores make the bucket, too, that a mistyped URL names
_WITH_DIRECTORIES = frozenset(
    ["file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs", "webHDFS", "dbfs"]
)
# Where what is missing may be the bucket itself
_WITH_BUCKETS = frozenset(["s3", "s3a", "gs", "gcs"])


@dataclass(frozen=True)
class Place:
    """A folder of a file system.

    Attributes
    ----------
    url : str
        For people: a URL, also of a directory, without a password.
    files : fsspec.AbstractFileSystem
    root : str
        The folder, as that knows it.
    """

    url: str
    files: Any
    root: str

    @classmethod
    def of(cls, url: str) -> Place:
        """The place of a URL, any that fsspec knows, or of a directory given by its whole path.

        Raises
        ------
        SettingsError
            fsspec does not know it, a package for it is missing, or it names no place.

        Examples
        --------
        >>> Place.of("/shared/models/").url
        'file:///shared/models'
        """
        whole = _as_url(url)
        try:
            files, root = url_to_fs(whole)
        except ImportError as error:
            raise SettingsError(
                f"{shown(url)!r} needs a package that is not installed: {error}. Install it on every machine."
            ) from error
        except Exception as error:  # each file system has its own
            raise SettingsError(
                f"{shown(url)!r} cannot be used for copies of models: {str(error) or type(error).__name__}. Give a "
                "URL that fsspec knows, as s3://bucket/models or file:///shared/models (zcinfer.remote)."
            ) from error
        return cls(shown(whole), files, root.rstrip("/"))

    @property
    def directory(self) -> Path | None:
        """The directory that it is, where it is one of this machine's file systems."""
        return Path(self.root or "/") if "file" in _protocols(self.files) else None

    @property
    def has_directories(self) -> bool:
        """Whether a file there needs a directory that was made before."""
        return not _WITH_DIRECTORIES.isdisjoint(_protocols(self.files, inner=True))

    @property
    def bucket(self) -> str | None:
        """The bucket of an object store, which has to be there."""
        is_in_one = not _WITH_BUCKETS.isdisjoint(_protocols(self.files, inner=True))
        return self.root.lstrip("/").partition("/")[0] if is_in_one else None


def _as_url(given: str) -> str:
    """What fsspec takes for the current directory, and what it would take for a part of names, is refused."""
    scheme, is_url, place = given.partition("://") if "://" in given else ("file", "", given)
    place = place.rstrip("/")
    local = scheme.rpartition("::")[2] in ("file", "local")
    if not place or (local and not place.startswith(("/", "~"))):
        raise SettingsError(
            f"{shown(given)!r} names no place for copies of models: give a URL, as s3://bucket/models or "
            "file:///shared/models, or the whole path of a directory (zcinfer.remote)."
        )
    if not local and ("?" in place or "#" in place):
        raise SettingsError(
            f"{shown(given)!r} has options in it, which would become part of the copies' names. Give the place alone "
            "(zcinfer.remote), and options in fsspec's configuration, as FSSPEC_S3_ENDPOINT_URL or a file in "
            "~/.config/fsspec."
        )
    if is_url:
        return f"{scheme}://{place}"
    try:
        return f"file://{Path(place).expanduser()}"  # fsspec takes the %20 of as_uri for what it looks like
    except RuntimeError as error:
        raise SettingsError(
            f"{shown(given)!r} cannot be used for copies of models: {error} (zcinfer.remote)"
        ) from error


def _protocols(files: Any, inner: bool = False) -> set[str]:
    """Names of a file system; with ``inner``, also of those that it is a cache of, or a part."""
    found = getattr(files, "protocol", ())
    names = {found} if isinstance(found, str) else set(found)
    below = getattr(files, "fs", None) if inner else None
    return names | _protocols(below, inner) if below is not None else names
