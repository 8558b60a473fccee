"""Lazy slices of a dask array along one axis, which may overlap, as the chunks of one array.

What goes from one worker to another are the pieces that a slice lacks, and never whole chunks. Not for what is done
with the slices (`expansion`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from .rows import Array


def as_chunks(x: da.Array, axis: int, places: Sequence[tuple[int, int]]) -> da.Array:
    """Slices of an array, each of which becomes a chunk.

    Parameters
    ----------
    x : dask.array.Array
        In one chunk along all other axes.
    axis : int
        Counted from the first.
    places : sequence of (int, int)
        Start and stop of each slice along the axis; in any order, empty ones included.

    Returns
    -------
    dask.array.Array
        Axes as in ``x``; chunk i along the axis is slice i, a compact array.

    Examples
    --------
    >>> import dask.array as da
    >>> y = as_chunks(da.arange(10, chunks=4), 0, [(0, 5), (3, 8)])
    >>> y.chunks, y.compute().tolist()
    (((5, 5),), [0, 1, 2, 3, 4, 3, 4, 5, 6, 7])
    """
    token = tokenize(x.name, axis, list(places))
    name = f"segments-{token}"
    tasks = {task.key: task for task in _tasks(x, axis, places, name, f"piece-{token}")}
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[x])
    lengths = tuple(stop - start for start, stop in places)
    chunks = tuple(lengths if a == axis else length for a, length in enumerate(x.chunks))
    return da.Array(graph, name, chunks, meta=x._meta)


def _tasks(x: da.Array, axis: int, places: Sequence[tuple[int, int]], name: str, piece: str) -> Iterator[Task]:
    def key(name: str, number: int, *more: int) -> tuple[Any, ...]:
        return (name, *(number if a == axis else 0 for a in range(x.ndim)), *more)

    bounds = np.cumsum([0, *x.chunks[axis]])
    for number, (start, stop) in enumerate(places):
        if start == stop:
            shape = tuple(0 if a == axis else n for a, n in enumerate(x.shape))
            yield Task(key(name, number), np.empty, shape, x.dtype)
            continue
        begin, end = int(np.searchsorted(bounds, start, "right")) - 1, int(np.searchsorted(bounds, stop, "left"))
        pieces = []
        for chunk, (low, high) in enumerate(pairwise(bounds[begin : end + 1].tolist()), begin):
            whole, source = start <= low and high <= stop, TaskRef(key(x.name, chunk))
            if low == high:
                continue
            if whole:
                pieces.append(source)
                continue
            # A task of its own, which runs where the chunk is.
            index = (*(slice(None),) * axis, slice(max(start, low) - low, min(stop, high) - low))
            cut = Task(key(piece, number, chunk), _cut, source, index)
            yield cut
            pieces.append(TaskRef(cut.key))
        yield Task(key(name, number), _join, axis, *pieces)


def _cut(chunk: Array, index: tuple[slice, ...]) -> Array:
    return chunk[index].copy()  # a view would keep the whole chunk in memory


def _join(axis: int, *pieces: Array) -> Array:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces, axis, dtype=pieces[0].dtype)  # which would lose its byte order
