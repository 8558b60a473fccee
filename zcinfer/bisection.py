"""Which rows fail: what failed is halved until single rows do. Each part that works is computed once, and kept.

Knows nothing of models: it is given what computes rows. Not for what becomes of the rows that failed (`records`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from traceback import format_exception
from typing import Generic, TypeVar

from .errors import BlockError

T = TypeVar("T")


@dataclass(frozen=True)
class Failed:
    """Rows that failed. Text alone: an exception would hold what its frames do, the batch and all of its activations.

    Attributes
    ----------
    start, stop : int
        One row that failed by itself; or more, that failed together while each half of them worked.
    error : str
        In a line.
    traceback : str
        Whole.
    """

    start: int
    stop: int
    error: str
    traceback: str

    @property
    def together(self) -> bool:
        """Whether the rows failed only together, so that there are results of them."""
        return self.stop - self.start > 1


@dataclass(frozen=True)
class Salvage(Generic[T]):
    """What is left of rows of which some failed.

    Attributes
    ----------
    parts : list of (int, int, result)
        Rows that worked, from start to stop, in order; they do not overlap.
    failed : list of Failed
        In order.
    """

    parts: list[tuple[int, int, T]]
    failed: list[Failed]


class TooManyFailed(Exception):
    """More failed than was allowed. Not for users: who allowed it says so in words of its own."""

    def __init__(self, failed: list[Failed]):
        super().__init__(f"{len(failed)} failures")
        self.failed = failed


def salvage(
    compute: Callable[[int, int], T],
    rows: int,
    batch_rows: int,
    most: int,
    hopeless: Callable[[BlockError], bool] = lambda error: False,
) -> Salvage[T]:
    """Compute rows; where that fails, find out which ones do, and compute all others.

    Parameters
    ----------
    compute : callable
        ``compute(start, stop)`` gives the results of these rows, or raises `BlockError`.
    rows : int
    batch_rows : int
        Rows that are computed at once: above it, parts are cut between batches, so that all batches but those that fail
        are what they would have been.
    most : int
        Failures to stop at, when there are more.
    hopeless : callable, optional
        Whether after an error nothing more can be computed; it is then raised.

    Returns
    -------
    Salvage
        Nothing failed: one part, and one call. Else each failure costs at most two calls a halving, of which there are
        ``log2(rows)``.

    Raises
    ------
    TooManyFailed

    Examples
    --------
    >>> def compute(start, stop):
    ...     if 5 in range(start, stop):
    ...         raise BlockError("row 5 is bad")
    ...     return list(range(start, stop))
    >>> found = salvage(compute, 8, batch_rows=4, most=10)
    >>> found.parts
    [(0, 4, [0, 1, 2, 3]), (4, 5, [4]), (6, 8, [6, 7])]
    >>> [(failed.start, failed.error) for failed in found.failed]
    [(5, 'row 5 is bad')]
    """
    parts: list[tuple[int, int, T]] = []
    failed: list[Failed] = []

    def keep(start: int, stop: int, told: tuple[str, str]) -> None:
        failed.append(Failed(start, stop, *told))
        if len(failed) > most:
            raise TooManyFailed(failed)

    def part(start: int, stop: int) -> None:
        try:
            parts.append((start, stop, compute(start, stop)))
            return
        except BlockError as error:
            if hopeless(error):
                raise
            told = next(iter(str(error).splitlines()), ""), "".join(format_exception(error))
        if stop - start == 1:
            return keep(start, stop, told)
        before = len(failed)
        middle = _middle(start, stop, batch_rows)
        part(start, middle)
        part(middle, stop)
        if len(failed) == before:
            keep(start, stop, told)

    part(0, rows)
    return Salvage(parts, failed)


def _middle(start: int, stop: int, batch_rows: int) -> int:
    batches = -(-(stop - start) // batch_rows)
    return start + batches // 2 * batch_rows if batches > 1 else (start + stop) // 2
