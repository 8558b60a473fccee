"""Windows of time series as rows: a specification that the tasks which use it expand. Not an array.

An array of windows is a view, ``size / step`` times as large as what it shows, and becomes that large wherever Dask
measures, spills or sends it. So what lies between tasks is *segments*: the samples of one block of windows and no
others. The windows of a segment are a view that never leaves its task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.layers import ArrayValuesDep

from .errors import InputError, SettingsError
from .expansion import Block, Prepare, Spec
from .rows import Array, only, refuse_masked
from .segments import as_chunks
from .sources import Source, open_source


def windows(
    x: Any,
    size: int,
    step: int = 1,
    axis: int = -1,
    *,
    history: int = 0,
    prepare: Prepare | None = None,
    dtype: Any = None,
    block_rows: int | None = None,
) -> Windows:
    """Windows along an axis of an array, to be used as rows.

    Parameters
    ----------
    x : numpy.ndarray, or a source as for `run`
        For example ``(channels, time)``; any number of axes, in any chunks of known lengths.
    size, step : int
        Samples of a window, and from the beginning of one window to that of the next. Windows that would reach over
        the end of ``x`` are left out.
    axis : int
        Axis of the samples.
    history : int
        Samples before a block's first window that ``prepare`` gets to see.
    prepare : callable, optional
        ``prepare(segment, history) -> samples``, called in the task, once a block, before windows are cut. ``segment``
        is ``x`` along ``axis`` from ``history`` samples before the block's first window to the end of its last,
        read-only. Returned is what windows are cut from: as long without those ``history`` samples, other axes
        unchanged. The number it is told is the one asked for, except near the beginning of ``x``, where there are
        fewer samples: none in the first block.
    dtype : dtype, optional
        Of what ``prepare`` returns. Default: that of ``x``.
    block_rows : int, optional
        Windows of a block. Default: as many as begin in one chunk of ``x`` along ``axis`` (the longest one), and no
        fewer than make each sample be read about twice at most.

    Returns
    -------
    Windows

    Raises
    ------
    SettingsError
        A number is no number of samples, or there is no such axis.
    InputError
        ``x`` cannot be used, is too short, or its chunks are not known.

    Notes
    -----
    The result does not depend on the blocks if each sample that ``prepare`` returns depends on itself and on the
    ``history`` samples before it. For the first ``ceil(history / step)`` windows there are fewer.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> strain = da.zeros((2, 2048 * 60), chunks=(2, 2048 * 16))

    Of two detectors at 2,048 Hz, windows of 1.5 s every 0.25 s:

    >>> w = windows(strain, size=3072, step=512)
    >>> w
    Windows(235 rows of (2, 3072) float64, in 4 blocks)
    >>> w.segments().chunks
    ((2,), (35328, 35328, 35328, 24576))

    Of the differences between neighbouring samples; the first sample of all has no neighbour before it:

    >>> def differences(segment, history):
    ...     return np.diff(segment) if history else np.diff(segment, prepend=segment[:, :1])
    >>> windows(strain, 3072, 512, history=1, prepare=differences).to_dask()
    dask.array<windows, shape=(235, 2, 3072), dtype=float64, chunksize=(64, 2, 3072), chunktype=numpy.ndarray>
    """
    return Windows(x, size, step, axis, history, prepare, dtype, block_rows)


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """Windows of an array, which tasks expand: made by `windows`, whose parameters are its first fields.

    Attributes
    ----------
    source : numpy.ndarray or dask.array.Array
        ``x``, opened; a dask array in one chunk along all other axes.
    opened : Source, optional
        Where it is from; None: from memory.
    spec : Spec
    length : int
        Samples along the axis.
    """

    x: Any
    size: int
    step: int = 1
    axis: int = -1
    history: int = 0
    prepare: Prepare | None = None
    dtype: Any = None
    block_rows: int | None = None
    source: Any = field(init=False)
    opened: Source | None = field(init=False)
    spec: Spec = field(init=False)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        numbers = {"size": 1, "step": 1, "history": 0} | ({"block_rows": 1} if self.block_rows is not None else {})
        for name, least in numbers.items():
            _settle(self, name, _number(name, getattr(self, name), least))
        if self.prepare is not None and not callable(self.prepare):
            raise SettingsError(f"prepare is a {type(self.prepare).__name__}: give a function (segment, history)")
        if not isinstance(self.axis, int | np.integer):
            raise SettingsError(f"axis is {self.axis!r}: give the number of the axis of samples")
        opened = None if isinstance(self.x, np.ndarray) else open_source(self.x, "x", axis=self.axis)
        source = self.x if opened is None else opened.array
        _settle(self, "opened", opened)
        _settle(self, "axis", _axis(self.axis, source.ndim))
        _settle(self, "source", _in_one_chunk_but(self.axis, source))
        _settle(self, "length", source.shape[self.axis])
        _settle(self, "dtype", source.dtype if self.dtype is None else _dtype(self.dtype))
        if self.prepare is None and (self.history or self.dtype != source.dtype):
            raise SettingsError("history= and dtype= are for prepare=, and there is none: give it, or leave them out")
        _settle(self, "spec", Spec(self.size, self.step, self.axis, self.history, self.prepare, self.dtype))
        if self.size + self.history > self.length:
            history = f" and {self.history:,} of history" if self.history else ""
            raise InputError(
                f"x has {self.length:,} samples along axis {self.axis}: too few for a window of {self.size:,}{history}"
            )

    def __repr__(self) -> str:
        rows = f"({', '.join(map(str, self.shape[1:]))})"
        return f"Windows({len(self):,} rows of {rows} {self.dtype}, in {len(self.chunks[0]):,} blocks)"

    def __len__(self) -> int:
        return int((self.length - self.size) // self.step + 1)

    def __getitem__(self, index: Any) -> Any:
        return self.__array__()

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise InputError(
            f"{self!r} is not an array: as one it would take {len(self) * self.row_nbytes:,} bytes. Give it to predict "
            "or run as it is; w.to_dask() makes a dask array of it, w.head(n) the first rows"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, ...)``: a row has the axes of ``x``, with ``size`` samples."""
        shape = self.source.shape
        return (len(self), *shape[: self.axis], self.size, *shape[self.axis + 1 :])

    @property
    def ndim(self) -> int:
        """Axes, that of the rows included."""
        return len(self.shape)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * int(self.dtype.itemsize)

    @property
    def is_lazy(self) -> bool:
        """Whether the samples are yet to be read or computed."""
        return not isinstance(self.source, np.ndarray)

    @cached_property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Rows of each block, and all other axes in one chunk: as a dask array would have them."""
        return (self._lengths(None), *((n,) for n in self.shape[1:]))

    def blocks(self, rows: int | Sequence[int] | None = None) -> tuple[Block, ...]:
        """The blocks: their windows, and the samples that these need.

        Parameters
        ----------
        rows : int or sequence of int, optional
            Windows of a block, or of each block. Default: ``block_rows``.

        Returns
        -------
        tuple of Block

        Raises
        ------
        InputError
            Lengths that do not add up to the number of windows.
        """
        return tuple(map(self.spec.block, *self._places(rows)))

    def segments(self, rows: int | Sequence[int] | None = None) -> da.Array:
        """The samples of each block, lazily, as the chunks of one array.

        Parameters
        ----------
        rows : int or sequence of int, optional
            As for `blocks`.

        Returns
        -------
        dask.array.Array
            Axes as in ``x``; chunk i along the axis is samples ``start`` to ``stop`` of block i, a compact array.
            Samples that several blocks need are in several chunks.
        """
        blocks = self.blocks(rows)
        source = self.source
        if not self.is_lazy:
            longest = max(block.rows for block in blocks) * self.step
            source = da.from_array(source, chunks=tuple(longest if a == self.axis else -1 for a in range(source.ndim)))
        return as_chunks(source, self.axis, [(block.start, block.stop) for block in blocks])

    def head(self, rows: int) -> Array:
        """The first rows, computed.

        Returns
        -------
        numpy.ndarray
            ``(rows, ...)``, read-only.
        """
        block = self.spec.block(0, min(rows, len(self)))
        return self.spec.expand(np.asarray(self.source[self.spec.along(block.start, block.stop)]))

    def in_blocks(self, rows: int) -> Windows:
        """The same, in blocks of so many windows."""
        return replace(self, block_rows=rows)

    def stamp(self) -> dict[str, Any]:
        """What tells them from others, in JSON types; for windows of a source of jobs."""
        assert self.opened is not None
        return self.opened.stamp() | {"windows": self.spec.identity()}

    def to_dask(self, rows: int | Sequence[int] | None = None) -> da.Array:
        """A dask array of the windows; its blocks count, are spilled and are sent as ``size / step`` times the samples.

        Parameters
        ----------
        rows : int or sequence of int, optional
            As for `blocks`.

        Returns
        -------
        dask.array.Array
            ``(rows, ...)``; blocks are read-only views.
        """
        found, (firsts, lengths) = self.segments(rows), self._places(rows)
        every = range(1, self.ndim)
        # The blocks of rows are the chunks along the axis; all other axes have one chunk, and are not the result's.
        axes = tuple(0 if a == self.axis else self.ndim + a for a in range(found.ndim))
        return da.blockwise(
            partial(_expand, self.spec),
            (0, *every),
            ArrayValuesDep((lengths,), {(i,): first for i, first in enumerate(firsts)}),
            (0,),
            found,
            axes,
            new_axes={a: self.shape[a] for a in every},
            dtype=self.dtype,
            meta=np.empty((0,) * self.ndim, self.dtype),
            align_arrays=False,
            name=f"windows-{tokenize(found.name, lengths, self.spec.identity())}",
        )

    def _lengths(self, rows: int | Sequence[int] | None) -> tuple[int, ...]:
        if rows is None:
            rows = self.block_rows or self._rows_of_a_chunk()
        if isinstance(rows, int | np.integer):
            whole, rest = divmod(len(self), _number("rows", rows, 1))
            return (int(rows),) * whole + ((rest,) if rest else ())
        if sum(rows) != len(self):
            raise InputError(f"there are {len(self):,} windows, and {sum(rows):,} rows beside them")
        return tuple(int(n) for n in rows)

    def _places(self, rows: int | Sequence[int] | None) -> tuple[list[int], tuple[int, ...]]:
        """First window and number of windows of each block."""
        lengths = self._lengths(rows)
        return np.cumsum([0, *lengths])[:-1].tolist(), lengths

    def _rows_of_a_chunk(self) -> int:
        chunk = max(self.source.chunks[self.axis]) if self.is_lazy else self.length
        overlap = max(0, self.size - self.step) + self.history
        return min(len(self), max(1, max(chunk, overlap) // self.step))


def _expand(spec: Spec, first: int, segment: Any) -> Array:
    return spec.expand(only(segment), first)


def _settle(windows: Windows, name: str, value: Any) -> None:
    object.__setattr__(windows, name, value)


def _number(name: str, value: Any, least: int) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least:
        return int(value)
    samples = name in ("size", "step", "history")
    what = "a number of samples, for example int(1.5 * 2048) for 1.5 s at 2,048 Hz" if samples else "a number of rows"
    raise SettingsError(f"{name} is {value!r}: give {what}" + f", {least} or more" * isinstance(value, int))


def _axis(axis: int, ndim: int) -> int:
    if ndim == 0:
        raise InputError("x is a single number: windows need an axis of samples")
    if not -ndim <= axis < ndim:
        raise SettingsError(f"axis is {axis!r}, and x has {ndim} axes: give one from {-ndim} to {ndim - 1}")
    return int(axis) % ndim


def _dtype(dtype: Any) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(dtype)
        return found
    except TypeError as error:
        raise SettingsError(f"dtype is {dtype!r}: {error}") from error


def _in_one_chunk_but(axis: int, source: Any) -> Any:
    refuse_masked(source if isinstance(source, np.ndarray) else source._meta, "x")
    if isinstance(source, np.ndarray):
        return source
    if any(length != length for lengths in source.chunks for length in lengths):
        raise InputError("the lengths of the chunks of x are not known: call compute_chunk_sizes() on it first")
    cut = {a: -1 for a, lengths in enumerate(source.chunks) if a != axis and len(lengths) > 1}
    return source.rechunk(cut) if cut else source
