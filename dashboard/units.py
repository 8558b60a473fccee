"""Figures as a person reads them: thousands separators, units, no more digits than are known."""

from __future__ import annotations

from zcinfer.sizes import format_size

__all__ = ["about", "count", "duration", "format_size", "load_time", "percent", "plural", "rate", "share"]


def count(number: float) -> str:
    """A whole number with thousands separators.

    Examples
    --------
    >>> count(3412.0)
    '3,412'
    """
    return f"{number:,.0f}"


def plural(number: float, word: str) -> str:
    """A number of things.

    Examples
    --------
    >>> plural(1, "block"), plural(3412, "block")
    ('1 block', '3,412 blocks')
    """
    return f"{count(number)} {word}" + ("" if number == 1 else "s")


def percent(part: float, whole: float) -> str:
    """A share; 100 % only where nothing is left, 0 % where there is nothing.

    Examples
    --------
    >>> percent(9_999, 10_000), percent(1, 10_000), percent(0, 0)
    ('99 %', 'under 1 %', '0 %')
    """
    if whole <= 0 or part <= 0:
        return "0 %"
    share = int(100 * part / whole + 1e-9)
    return f"{share} %" if share else "under 1 %"


def duration(seconds: float) -> str:
    """A time that has passed.

    Examples
    --------
    >>> duration(0.4), duration(72), duration(7500), duration(200_000)
    ('0.4 s', '1 min 12 s', '2 h 5 min', '2 d 7 h')
    """
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, below, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {smaller}"
    return f"{whole} s"


def about(seconds: float) -> str:
    """A time to come, as precise as one can know it.

    Examples
    --------
    >>> about(3), about(43), about(100), about(740), about(8000)
    ('a few seconds', 'about 45 seconds', 'about 2 minutes', 'about 12 minutes', 'about 2 h 15 min')
    """
    if seconds < 7.5:
        return "a few seconds"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} seconds"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} minutes"
    if minutes < 24 * 60:
        return f"about {minutes // 60} h {5 * (minutes % 60 // 5 + (minutes % 5 > 2)) % 60} min"
    return f"about {round(minutes / 60 / 24, 1):g} days"


def rate(per_second: float) -> str:
    """Rows a second.

    Examples
    --------
    >>> rate(423_118.2), rate(3.44), rate(0)
    ('423,118 rows/s', '3.4 rows/s', '0 rows/s')
    """
    return f"{per_second:,.1f} rows/s" if 0 < per_second < 10 else f"{per_second:,.0f} rows/s"


def load_time(seconds: float) -> str:
    """The time of a load.

    Examples
    --------
    >>> load_time(0.0000051), load_time(0.0027), load_time(0.412), load_time(3.21)
    ('5 µs', '2.7 ms', '412 ms', '3.2 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def share(part: float, whole: float) -> float:
    """Percent of a whole, for the width of a bar.

    Examples
    --------
    >>> share(1, 3), share(1, 0)
    (33.333, 0.0)
    """
    return round(100 * part / whole, 3) if whole else 0.0
