"""What of a directory would be there after a loss of power: the files and names that were synchronised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


class Synced:
    """The files, by their numbers, and the names in each directory, as they were when they were last synchronised."""

    def __init__(self) -> None:
        self.files: set[int] = set()
        self.names: dict[int, set[str]] = {}

    def missing(self, directory: Path) -> list[str]:
        """What would not be there of a directory, with its own name; temporary files and locks do not count."""
        lost = []
        for path in (directory, *directory.rglob("*")):
            if any(part.startswith(".") for part in path.relative_to(directory.parent).parts):
                continue
            if path.name not in self.names.get(path.parent.stat().st_ino, set()):
                lost.append(f"the name {path}")
            if path.is_file() and path.stat().st_size and path.stat().st_ino not in self.files:
                lost.append(f"the content of {path}")
        return lost


@contextmanager
def synced() -> Iterator[Synced]:
    """Watch what is synchronised in this process; all of it still is."""
    fsync, found = os.fsync, Synced()

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        number = os.fstat(descriptor).st_ino
        if path.is_dir():
            found.names[number] = set(os.listdir(path))
        else:
            found.files.add(number)

    with patch("os.fsync", watched):
        yield found
