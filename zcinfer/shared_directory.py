"""A directory that processes of one user write to at the same time: its locks, its temporary directories, its owner.

For the registry. What is written is first written to a directory of its own here, and renamed into place under a lock:
others see it whole or not at all, and what a process that died has left goes with the next one. Not for what lies in
it, nor for single files (`files`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import check_owner, private_directory
from .errors import SettingsError, StoreFull
from .files import make_directory
from .sizes import format_size


class SharedDirectory:
    """The directory of a registry.

    Parameters
    ----------
    path : path
        Created with mode 0700 when first written to.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def make(self) -> None:
        """Make it if it is missing; refuse one that others can write to."""
        private_directory(self.path)

    def part(self, name: str) -> Path:
        """A directory in it, made if it is missing."""
        found = self.path / name
        make_directory(found, 0o755)
        return found

    def check_owners(self, *parts: Path) -> None:
        """Refuse one that others can write to, or a part of it, where they can come to that."""
        check_owner(self.path)
        with suppress(FileNotFoundError):
            if self.path.stat().st_mode & 0o011:
                for part in parts:
                    check_owner(part)

    def free(self) -> int:
        """Bytes that its disk has to give."""
        return shutil.disk_usage(self.path).free

    def full(self, nbytes: int, why: str = "") -> StoreFull:
        """The error that says that so many bytes do not fit, and what to do."""
        return StoreFull(
            f"a model of {format_size(nbytes)} does not fit on the disk of {self.path}, which has "
            f"{format_size(self.free())} to give{why}. Delete what is not needed (zcinfer rm NAME), or set "
            "DASK_ZCINFER__REGISTRY to a larger disk."
        )

    @contextmanager
    def told_where(self, nbytes: int | None = None) -> Iterator[None]:
        """Have errors of writing, of so many bytes if that is known, say where and what to do."""
        try:
            yield
        except OSError as error:
            # Others have written meanwhile, or there is a quota
            if nbytes is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.full(nbytes, f" ({error.strerror})") from error
            raise self._unwritable(error) from error

    @contextmanager
    def lock(self, name: str = ".lock") -> Iterator[None]:
        """Hold a lock among all processes; not twice in one thread, which would wait for itself."""
        self.make()
        try:
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A new directory in it, on the same file system, gone afterwards; those of dead processes go too."""
        # Each is locked by who uses it, in a step that nobody else sees half done.
        with self.lock(".lock-temporary"):
            for left in self.path.glob(".tmp-*"):
                descriptor = _claim(left)
                if descriptor is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(descriptor)
            directory = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.path))
            claimed = _claim(directory)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            if claimed is not None:
                os.close(claimed)

    def _unwritable(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"the registry {self.path} cannot be written to: {error}. Set zcinfer.registry to one that can."
        )


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
