"""Overlapping slices as chunks: the right samples, compact, and of the chunks that they need alone."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zcinfer.segments import as_chunks


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_chunks_of_any_places(data: st.DataObject) -> None:
    x = np.arange(40).reshape(2, 20)
    cuts = sorted(data.draw(st.lists(st.integers(0, 20), max_size=6)))
    lengths = tuple(int(n) for n in np.diff([0, *cuts, 20]))
    place = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda p: (min(p), max(p)))
    places = data.draw(st.lists(place, min_size=1, max_size=5))
    axis = data.draw(st.integers(0, 1))
    y = as_chunks(da.from_array(x if axis else x.T, chunks=(2, lengths) if axis else (lengths, 2)), axis, places)
    assert y.chunks[axis] == tuple(b - a for a, b in places)
    found = y.compute(scheduler="sync")
    assert np.array_equal(found if axis else found.T, np.concatenate([x[:, a:b] for a, b in places], 1))


@pytest.mark.parametrize("dtype", ["f4", ">i2", "?", "c8"])
def test_dtype_is_kept(dtype: str) -> None:
    places = [(0, 4), (3, 6), (8, 8), (2, 10)]
    y = as_chunks(da.from_array(np.arange(10).astype(dtype), chunks=4), 0, places)
    assert y.dtype == dtype
    for (start, stop), piece in zip(places, dask.compute(*y.to_delayed(), scheduler="sync"), strict=True):
        assert piece.dtype == dtype
        assert np.array_equal(piece, np.arange(10)[start:stop].astype(dtype))


@pytest.mark.parametrize("length", [3, 6, 7, 24])
def test_each_is_a_compact_array(length: int) -> None:
    x = da.from_array(np.zeros((2, 24)), chunks=(2, length)) + 1
    y = as_chunks(x, 1, [(0, 8), (6, 14), (12, 18), (23, 24)])
    for piece in dask.compute(*y.to_delayed().ravel(), scheduler="sync"):
        assert piece.flags.c_contiguous
        assert piece.base is None or piece.base.nbytes == piece.nbytes


def test_each_needs_its_own_chunks_alone() -> None:
    seen: list[int] = []

    def source(block_id: tuple[int, ...] = ()) -> np.ndarray:
        seen.append(block_id[0])
        return np.full(10, block_id[0])

    x = da.map_blocks(source, chunks=((10,) * 10,), dtype=int, meta=np.empty(0, int))
    y = as_chunks(x, 0, [(0, 10), (5, 25), (40, 50), (39, 52), (70, 70)])
    needed = [[0], [0, 1, 2], [4], [3, 4, 5], []]
    for number, chunks in enumerate(needed):
        seen.clear()
        y.blocks[number].compute(scheduler="sync")
        assert sorted(seen) == chunks


def test_same_slices_have_the_same_keys() -> None:
    x = da.zeros(20, chunks=5)
    names = [as_chunks(y, 0, places).name for y in (x, x, x + 1) for places in ([(0, 7)], [(0, 8)])]
    assert len(set(names)) == 4
    assert names[:2] == names[2:4]
