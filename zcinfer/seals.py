"""Whom to trust: ``seals/<seal>`` in the directory of a registry, one for each archive that this user has written.

A skeleton is a pickle, and opening one runs code from it. Not for finding archives (`registry`).
"""

from __future__ import annotations

from pathlib import Path

from .archive import Archive
from .errors import UntrustedArchive
from .files import sync_directory
from .shared_directory import SharedDirectory


class Seals:
    """Archives, here or elsewhere, that may be opened without being asked.

    Parameters
    ----------
    directory : SharedDirectory
        The registry's.
    """

    def __init__(self, directory: SharedDirectory):
        self._directory = directory

    def add(self, archive: Archive) -> None:
        """Remember that this very archive may be opened, on disk; no field inside an archive can vouch for it."""
        self._directory.make()
        seal = self._directory.part("seals") / archive.seal
        if not seal.exists():
            seal.touch(mode=0o644)
            sync_directory(seal.parent)

    def __contains__(self, archive: Archive) -> bool:
        """Whether this user has written that very archive."""
        seals = self._directory.path / "seals"
        self._directory.check_owners(seals)
        return (seals / archive.seal).exists()

    def open(self, directory: Path, trust: bool = False) -> Archive:
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
        if not trust and archive not in self:
            raise UntrustedArchive(
                f"{directory} was not written by this user's zcinfer. Its skeleton is a pickle: opening it runs "
                "code from it. If you trust where it comes from, put it again with trust=True (--trust)."
            )
        archive.verify()
        return archive
