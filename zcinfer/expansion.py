"""What a task does with a segment, the samples of one block of windows: it shows them as rows. NumPy alone.

Not for graphs (`segments`), nor for what a user says (`windowing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .canonical import Canonical
from .errors import BlockError
from .rows import Array, refuse_masked

Prepare = Callable[[Array, int], Array]


@dataclass(frozen=True)
class Block:
    """Neighbouring windows, and the samples that they need.

    Attributes
    ----------
    first, rows : int
        Number of the first window; how many there are.
    start, stop : int
        Samples of ``x`` along the axis, those of the history included.
    history : int
        How many of these lie before the first window.
    """

    first: int
    rows: int
    start: int
    stop: int
    history: int


@dataclass(frozen=True)
class Spec:
    """What a task needs to know in order to expand a segment: all of `Windows` but the source.

    Attributes
    ----------
    size, step, axis, history, prepare, dtype
        As for `windows`; the axis counted from the first, the dtype that of the windows.
    """

    size: int
    step: int
    axis: int
    history: int
    prepare: Prepare | None
    dtype: np.dtype[Any]

    def block(self, first: int, rows: int) -> Block:
        """The samples that ``rows`` windows from number ``first`` on need."""
        if rows == 0:
            return Block(first, 0, 0, 0, 0)
        begin = first * self.step
        history = min(self.history, begin)
        return Block(first, rows, begin - history, begin + (rows - 1) * self.step + self.size, history)

    def along(self, start: int | None, stop: int | None = None, step: int | None = None) -> tuple[slice, ...]:
        """Index of samples along the axis."""
        return (*(slice(None),) * self.axis, slice(start, stop, step))

    def expand(self, segment: Array, first: int = 0) -> Array:
        """The windows of a segment.

        Parameters
        ----------
        segment : numpy.ndarray
            Samples ``block.start`` to ``block.stop`` of a block.
        first : int
            Number of the block's first window, which tells how much history there is.

        Returns
        -------
        numpy.ndarray
            ``(rows, ...)``: a read-only view of the segment, or of what ``prepare`` made of it.

        Raises
        ------
        BlockError
            ``prepare`` failed, or returned something else than was agreed.
        """
        refuse_masked(segment, "x")
        if segment.shape[self.axis] == 0:
            return np.empty((0, *segment.shape[: self.axis], self.size, *segment.shape[self.axis + 1 :]), self.dtype)
        history = self.block(first, 1).history
        samples = segment[self.along(history)] if self.prepare is None else self._prepared(segment, history, first)
        every = sliding_window_view(samples, self.size, axis=self.axis)[self.along(None, None, self.step)]
        return np.moveaxis(every, (self.axis, -1), (0, self.axis + 1))

    def _prepared(self, segment: Array, history: int, first: int) -> Array:
        assert self.prepare is not None
        # Others may use the same memory: the caller's array, the tasks that have the same chunk.
        segment = segment.view()
        segment.flags.writeable = False
        expected = segment[self.along(history)].shape
        last = first + (expected[self.axis] - self.size) // self.step
        what = f"windows {first:,}–{last:,}: prepare ({getattr(self.prepare, '__name__', self.prepare)})"
        try:
            found = self.prepare(segment, history)
        except Exception as error:
            raise BlockError(
                f"{what} failed on {segment.shape} with a history of {history:,}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, np.ndarray):
            raise BlockError(f"{what} returned a {type(found).__name__}, expected a NumPy array")
        refuse_masked(found, "what prepare returned")
        if found.shape != expected:
            raise BlockError(
                f"{what} returned {found.shape}, expected {expected}: the segment {segment.shape} without the "
                f"{history:,} samples of history along axis {self.axis}"
            )
        if found.dtype != self.dtype:
            raise BlockError(
                f"{what} returned {found.dtype}, expected {self.dtype}: say dtype={str(found.dtype)!r} to windows"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """What tells these windows from others of the same array, in JSON types; the same in every process."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("size", "step", "axis", "history")}
        if self.prepare is not None:
            canonical = Canonical()
            canonical.add(self.prepare)
            found |= {"prepare": canonical.hexdigest(), "dtype": self.dtype.str}
        return found
