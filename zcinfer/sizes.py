"""Numbers of bytes as people write and read them."""

from __future__ import annotations

from typing import Any

from .errors import SettingsError


def parse_size(text: Any, what: str) -> int:
    """Bytes of a size as people write it ("4 GiB", or a number).

    Examples
    --------
    >>> parse_size("2 kB", "memory_limit")
    2000
    """
    from dask.utils import parse_bytes  # a tenth of a second, for those who write one

    try:
        return int(parse_bytes(text))
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{what} is {text!r}: give bytes, as 4000000000, '4 GB' or '4 GiB'") from error


def format_size(nbytes: int) -> str:
    """A number of bytes as people read it.

    Examples
    --------
    >>> format_size(438_000_000), format_size(12)
    ('438.0 MB', '12 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes} B"
