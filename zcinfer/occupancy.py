"""What of a file is mapped by readers of this machine: so the holder knows which models are in use.

No reader says that it uses a model, and none can forget to say that it does no more: the kernel knows, also of readers
that were killed. Not for other machines, and not for processes that this one cannot see.
"""

from __future__ import annotations

from pathlib import Path

from .sharing import parse_mapping


def mapped_spans(device: int, inode: int) -> list[tuple[int, int]]:
    """Start and end, in the file, of each mapping that a reader has of it (see `sharing`).

    Parameters
    ----------
    device, inode : int
        Of the file.

    Returns
    -------
    list of tuple of int
        In bytes. Left out are Plasma's own mappings, writable and shared, which every client has of all of the arena.

    Notes
    -----
    A millisecond or less a process.
    """
    spans: set[tuple[int, int]] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text().splitlines()
        except OSError:
            continue  # gone, or another user's, who cannot be in a Ray of ours
        for line in lines:
            found = parse_mapping(line)
            if found.file == (device, inode) and found.rights[1] + found.rights[3] != "ws":
                spans.add((found.offset, found.offset + found.end - found.start))
    return sorted(spans)


def is_mapped(byte: int, spans: list[tuple[int, int]]) -> bool:
    """Whether that byte of a file is in one of the spans.

    Examples
    --------
    >>> is_mapped(5, [(0, 4), (5, 9)]), is_mapped(9, [(0, 4), (5, 9)])
    (True, False)
    """
    return any(start <= byte < end for start, end in spans)
