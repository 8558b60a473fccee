"""Windows equal NumPy's on the whole array for every chunking, and between tasks are no larger than their samples."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster, wait
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from zcinfer.errors import BlockError, InputError, SettingsError
from zcinfer.rows import Array, rows_of
from zcinfer.windowing import Windows, windows

DTYPES = ("int8", "uint16", ">i4", "float32", "float64", "complex64", "bool")


def ramp(*shape: int, dtype: str = "float64") -> Array:
    return (np.arange(np.prod(shape)) * 7 % 251).reshape(shape).astype(dtype)


def whole(x: Array, size: int, step: int, axis: int) -> Array:
    """What NumPy shows of the whole array, rows first; and the same one window at a time."""
    axis %= x.ndim
    every = sliding_window_view(x, size, axis=axis)[(*(slice(None),) * axis, slice(None, None, step))]
    found = np.moveaxis(every, (axis, -1), (0, axis + 1))
    slow = [x.take(range(i, i + size), axis) for i in range(0, x.shape[axis] - size + 1, step)]
    assert np.array_equal(found, np.stack(slow))
    return found


def values(w: Windows, rows: Any = None) -> list[Array]:
    """The windows of each block, as a task would have them."""
    found = []
    pieces = dask.compute(*w.segments(rows).to_delayed().ravel(), scheduler="sync")
    for segment, block in zip(pieces, w.blocks(rows), strict=True):
        assert segment.shape[w.axis] == block.stop - block.start
        found.append(w.spec.expand(segment, block.first))
    return found


@st.composite
def parts(draw: st.DrawFn, total: int, least: int = 1) -> tuple[int, ...]:
    """Lengths that add up to a total."""
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=6)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    return tuple(n for n in lengths if n >= least) or (total,)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    ndim = draw(st.integers(1, 3))
    axis = draw(st.integers(-ndim, ndim - 1))
    length = draw(st.integers(1, 40))
    shape = tuple(length if a == axis % ndim else draw(st.integers(1, 4)) for a in range(ndim))
    size, step = draw(st.integers(1, length)), draw(st.integers(1, 12))
    x = ramp(*shape, dtype=draw(st.sampled_from(DTYPES)))
    rows = (length - size) // step + 1
    return {
        "x": x,
        "size": size,
        "step": step,
        "axis": axis,
        "chunks": tuple(draw(parts(n, least=draw(st.integers(0, 1)))) for n in shape),
        "rows": draw(st.one_of(st.none(), st.integers(1, 50), parts(rows, least=0))),
        "history": draw(st.integers(0, length - size)),
    }


# Equal to NumPy


@given(cases())
@settings(max_examples=150, deadline=None)
def test_every_chunking_equals_numpy_on_the_whole(case: dict[str, Any]) -> None:
    x, size, step, axis, rows = (case[name] for name in ("x", "size", "step", "axis", "rows"))
    expected = whole(x, size, step, axis)
    for source in (x, da.from_array(x, chunks=case["chunks"])):
        w = windows(source, size, step, axis)
        found = values(w, rows)
        assert np.array_equal(np.concatenate(found), expected)
        assert all(block.dtype == x.dtype for block in found)
        assert (w.shape, len(w), w.dtype, w.ndim) == (expected.shape, len(expected), x.dtype, expected.ndim)
        assert w.row_nbytes == expected[0].nbytes
        assert w.chunks[0] == tuple(map(len, values(w)))
        assert np.array_equal(w.head(3), expected[:3])
        lazy = w.to_dask(rows)
        assert (lazy.shape, lazy.dtype) == (expected.shape, x.dtype)
        assert np.array_equal(lazy.compute(scheduler="sync"), expected)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_blocks_read_no_more_than_they_need(case: dict[str, Any]) -> None:
    x, size, step, axis, history = (case[name] for name in ("x", "size", "step", "axis", "history"))
    w = windows(da.from_array(x, chunks=case["chunks"]), size, step, axis, history=history, prepare=trimmed)
    length = x.shape[axis]
    for rows in (case["rows"], None):
        blocks = w.blocks(rows)
        for block in blocks:
            if block.rows:
                assert block.start == block.first * step - block.history
                assert block.stop == (block.first + block.rows - 1) * step + size
                assert block.history == min(history, block.first * step)
            else:
                assert block.start == block.stop
        assert sum(block.rows for block in blocks) == len(w)
        read = sum(block.stop - block.start for block in blocks)
        assert read <= length + (len(blocks) - 1) * (max(0, size - step) + history)
    # Of one length, but for the last: as a zarr target needs them.
    assert {block.rows for block in w.blocks()[:-1]} <= {w.blocks()[0].rows}
    # By default, a chunk's samples, or no fewer than the overlap: each sample is read twice at most, and gaps are free.
    longest = max(*case["chunks"][axis], max(0, size - step) + history, step)
    assert w.blocks()[0].rows == min(len(w), longest // step)


def trimmed(segment: Array, history: int) -> Array:
    return segment[history:]


@pytest.mark.parametrize("kind", ["path", "str", "zarr", "memory"])
@pytest.mark.parametrize("axis", [0, -1])
def test_zarr_is_read_in_its_chunks_along_the_axis(tmp_path: Path, kind: str, axis: int) -> None:
    x = ramp(40, 40)
    array = zarr.create_array(
        zarr.storage.MemoryStore() if kind == "memory" else tmp_path / "x.zarr", data=x, chunks=(10, 8)
    )
    source = {"path": tmp_path / "x.zarr", "str": str(tmp_path / "x.zarr")}.get(kind, array)
    w = windows(source, 3, 2, axis)
    assert w.source.chunks[axis] == {0: (10,) * 4, -1: (8,) * 5}[axis]
    assert w.source.chunks[axis + 1] == (40,)
    assert np.array_equal(w.to_dask().compute(scheduler="sync"), whole(x, 3, 2, axis))


def test_masks_are_not_lost_in_silence() -> None:
    hidden = da.zeros(20, chunks=20).map_blocks(np.ma.asarray, meta=np.empty(0))
    with pytest.raises(InputError, match="x is a masked array"):
        windows(hidden, 3).to_dask().compute(scheduler="sync")
    with pytest.raises(InputError, match="what prepare returned is a masked array"):
        windows(ramp(20), 3, prepare=lambda s, h: np.ma.asarray(s)).head(1)


def test_strange_numbers_and_memory_layouts() -> None:
    x = np.asfortranarray(ramp(3, 30))[:, ::-1]
    x.flags.writeable = False
    w = windows(x, np.int64(4), np.uint8(3), np.int32(-1))
    assert (type(w.size), type(w.step), w.axis) == (int, int, 1)
    assert np.array_equal(w.head(99), whole(x, 4, 3, 1))


# History


def fir(segment: Array, history: int) -> Array:
    """Each sample with the five before it, weighted; before the beginning are zeros."""
    length = segment.shape[-1] - history
    padded = np.concatenate([np.zeros((*segment.shape[:-1], 5), segment.dtype), segment], -1)
    terms = [(k + 1) * padded[..., 5 + history - k : 5 + history - k + length] for k in range(6)]
    return np.sum(terms, axis=0, dtype=np.int64)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_filters_with_history_do_not_depend_on_the_blocks(case: dict[str, Any]) -> None:
    x = np.moveaxis(case["x"], case["axis"], -1).real.astype(np.int16)
    if x.shape[-1] < case["size"] + 5:
        x = np.concatenate([x] * 6, -1)
    chunks = (*x.shape[:-1], -(-x.shape[-1] // 2))
    w = windows(da.from_array(x, chunks=chunks), case["size"], case["step"], history=5, prepare=fir, dtype="int64")
    rows = case["rows"] if np.sum(case["rows"] or 1) == len(w) else 3
    assert w.dtype == np.int64
    assert np.array_equal(np.concatenate(values(w, rows)), whole(fir(x, 0), case["size"], case["step"], -1))
    assert np.array_equal(w.to_dask(rows).compute(scheduler="sync"), w.to_dask().compute(scheduler="sync"))


def test_prepare_is_told_how_much_history_there_is() -> None:
    told = []

    def prepare(segment: Array, history: int) -> Array:
        told.append((segment[0].tolist(), history))
        return segment[:, history:]

    x = np.arange(12)[None]
    found = values(windows(x, 3, 2, history=3, prepare=prepare), 1)
    assert [(segment[0], segment[-1], history) for segment, history in told] == [
        (0, 2, 0), (0, 4, 2), (1, 6, 3), (3, 8, 3), (5, 10, 3)
    ]  # fmt: skip
    assert np.array_equal(np.concatenate(found), whole(x, 3, 2, 1))


def test_prepare_cannot_change_the_samples_of_others() -> None:
    def prepare(segment: Array, history: int) -> Array:
        segment *= 2
        return segment

    x = ramp(2, 20)
    with pytest.raises(BlockError, match=r"windows 0–0: prepare \(prepare\) failed.*read-only"):
        windows(x, 3, prepare=prepare).head(1)
    assert np.array_equal(x, ramp(2, 20))
    assert x.flags.writeable


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda s, h: s,
            r"returned \(2, 7\), expected \(2, 4\): the segment \(2, 7\) without the 3 samples of history",
        ),
        (lambda s, h: s[0, h:], r"returned \(4,\), expected \(2, 4\)"),
        (lambda s, h: s[:, h:].astype("f4"), "returned float32, expected float64: say dtype='float32' to windows"),
        (lambda s, h: list(s), "returned a list, expected a NumPy array"),
        (lambda s, h: 1 // 0, r"failed on \(2, 7\) with a history of 3: ZeroDivisionError"),
    ],
    ids=["history", "axes", "dtype", "type", "raises"],
)
def test_what_prepare_does_wrong_is_named(prepare: Any, message: str) -> None:
    w = windows(da.from_array(ramp(2, 20), chunks=(2, 10)), 4, 4, history=3, prepare=prepare)
    with pytest.raises(BlockError, match=r"windows 3–3: prepare \(<lambda>\) " + message):
        w.spec.expand(w.segments((3, 1, 1)).blocks[0, 1].compute(scheduler="sync"), 3)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, SettingsError, "size is 0: give a number of samples.* 1 or more"),
        ({"size": 1.5}, SettingsError, r"size is 1\.5: give a number of samples, for example int\(1\.5 \* 2048\)"),
        ({"size": True}, SettingsError, "size is True"),
        ({"step": 0}, SettingsError, "step is 0"),
        ({"step": -1}, SettingsError, "step is -1"),
        ({"history": -1, "prepare": trimmed}, SettingsError, "history is -1.* 0 or more"),
        ({"history": 1}, SettingsError, "history= and dtype= are for prepare=, and there is none"),
        ({"dtype": "f4"}, SettingsError, "history= and dtype= are for prepare=, and there is none"),
        ({"dtype": "nothing", "prepare": trimmed}, SettingsError, "dtype is 'nothing'"),
        ({"prepare": 3}, SettingsError, "prepare is a int: give a function"),
        ({"axis": 2}, SettingsError, "axis is 2, and x has 2 axes: give one from -2 to 1"),
        ({"axis": -3}, SettingsError, "axis is -3"),
        ({"axis": 0.0}, SettingsError, r"axis is 0\.0: give the number of the axis"),
        ({"axis": "time"}, SettingsError, "axis is 'time'"),
        ({"block_rows": 0}, SettingsError, "block_rows is 0: give a number of rows, 1 or more"),
        ({"size": 21}, InputError, "x has 20 samples along axis 1: too few for a window of 21"),
        ({"size": 10, "history": 11, "prepare": trimmed}, InputError, "a window of 10 and 11 of history"),
        ({"axis": 0}, InputError, "x has 2 samples along axis 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("lazy", [True, False])
def test_impossible_numbers_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, lazy: bool
) -> None:
    x = da.zeros((2, 20), chunks=5) if lazy else np.zeros((2, 20))
    with pytest.raises(error, match=message):
        windows(x, **{"size": 3, **arguments})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(()), "x is a single number"),
        (da.zeros(()), "x is a single number"),
        (da.zeros(20)[da.zeros(20) > 0], r"compute_chunk_sizes\(\)"),
        (da.zeros((2, 20))[:, da.zeros(20) > 0], r"compute_chunk_sizes\(\)"),
        (da.zeros((2, 20))[da.zeros(2) > 0], r"compute_chunk_sizes\(\)"),
        (np.ma.zeros((2, 20)), r"x is a masked array.*x\.filled"),
        (da.ma.masked_greater(da.zeros((2, 20)), 0), r"x is a masked array.*x\.filled"),
        ([[0.0] * 20], "x is a list: give"),
        ("/nowhere/x.zarr", "x: there is no zarr array at /nowhere/x.zarr"),
    ],
    ids=["0-d", "0-d dask", "unknown", "unknown samples", "unknown channels", "masked", "masked dask", "list", "path"],
)
def test_impossible_sources_are_refused(x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        windows(x, 3)


@pytest.mark.parametrize("rows", [(5, 5), (5, 5, 5, 5)])
def test_other_numbers_of_rows_are_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"there are 18 windows, and {sum(rows)} rows beside them"):
        windows(ramp(20), 3).segments(rows)


@pytest.mark.parametrize(
    "use",
    [np.asarray, np.sum, list, lambda w: w[:2], lambda w: np.ones(1) + w, lambda w: da.asarray(w).compute()],
    ids=["asarray", "sum", "list", "slice", "operand", "dask"],
)
def test_windows_are_not_an_array(use: Any) -> None:
    with pytest.raises(InputError, match=r"is not an array: as one it would take 432 bytes.*w\.to_dask\(\)"):
        use(windows(ramp(20), 3))


# A specification


def test_windows_are_rows() -> None:
    w = windows(da.zeros((2, 20), chunks=(1, 7), dtype="f4"), 3, 2)
    assert str(rows_of(w)) == "(rows, 2, 3) float32"
    assert repr(w) == "Windows(9 rows of (2, 3) float32, in 3 blocks)"
    assert w.chunks == ((3, 3, 3), (2,), (3,))
    assert windows(w.x, 3, 2, block_rows=4).chunks == ((4, 4, 1), (2,), (3,))


def test_same_windows_have_the_same_keys() -> None:
    x = da.zeros((2, 20), chunks=(2, 7))
    names = [w.to_dask(rows).name for w in (windows(x, 3), windows(x, 3)) for rows in (None, 7, (7, 7, 4))]
    assert len(set(names)) == 1
    others = [windows(x, 3, 2), windows(x, 4), windows(x + 1, 3), windows(x, 3, prepare=trimmed)]
    assert len({names[0], *(w.to_dask().name for w in others)}) == 5


def test_identity_is_of_what_is_computed() -> None:
    x = ramp(2, 20)
    assert windows(x, 3).spec.identity() == {"size": 3, "step": 1, "axis": 1, "history": 0}
    functions = [lambda s, h: s + 1, lambda s, h: s + 2]
    found = [windows(x, 3, prepare=f).spec.identity()["prepare"] for f in (*functions, functions[0])]
    assert found[0] == found[2] != found[1]


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def refuse(graph: Any, keys: Any, **_: Any) -> None:
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        w = windows(da.zeros((2, 20), chunks=(1, 7)), 3, 2, history=2, prepare=trimmed)
        assert (len(w), w.segments().ndim, w.to_dask().ndim) == (9, 2, 3)


def test_slices_compute_their_chunks_alone() -> None:
    seen: list[int] = []

    def source(block_id: tuple[int, ...] = ()) -> Array:
        seen.append(block_id[0])
        return ramp(100)[block_id[0] * 10 : block_id[0] * 10 + 10]

    x = da.map_blocks(source, chunks=((10,) * 10,), dtype=float, meta=np.empty(0))
    found = windows(x, 4, 2).to_dask()[20:25].compute(scheduler="sync")
    assert sorted(seen) == [4, 5]
    assert np.array_equal(found, whole(ramp(100), 4, 2, 0)[20:25])


# Memory


@pytest.mark.parametrize("overlap", [2, 32])
def test_batches_of_windows_take_no_more_memory_than_the_batch(overlap: int) -> None:
    x = ramp(2, 1 << 18)
    w = windows(x, 4096, 4096 // overlap)
    tracemalloc.start()
    try:
        rows = w.head(len(w))
        for start in range(0, len(rows), 4):
            np.array(rows[start : start + 4], dtype="f4")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.shares_memory(rows, x)
    assert not rows.flags.writeable
    assert peak < 4 * 4 * w.row_nbytes  # of 4 MB of samples, and of 8 or 128 MB of windows


def test_a_dask_array_of_windows_is_of_views() -> None:
    w = windows(da.zeros((2, 1 << 16), chunks=(2, 1 << 14)), 4096, 128)
    block = dask.compute(*w.to_dask().to_delayed().ravel(), scheduler="sync")[0]
    assert block.strides[0] == 128 * 8
    assert not block.flags.writeable


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two worker processes that keep 8 MiB, and spill the rest."""
    before = dict(os.environ)
    limits = {"target": 0.25, "spill": False, "pause": False, "terminate": False}
    config = {f"distributed.worker.memory.{name}": value for name, value in limits.items()}
    with (
        dask.config.set(config),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit="32 MiB",
            dashboard_address=":0",
            local_directory=str(tmp_path_factory.mktemp("dask")),
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
    os.environ.clear()
    os.environ.update(before)


def received(dask_worker: Any) -> int:
    return sum(entry["total"] for entry in dask_worker.transfer_incoming_log)


def spilled(dask_worker: Any) -> int:
    return int(dask_worker.data.spilled_total.memory)


def checksum(segment: Array, spec: Any, first: int) -> tuple[int, float]:
    rows = spec.expand(segment, first)
    return len(rows), sum(float(row.sum()) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [2, 32])
def test_what_is_measured_spilled_and_sent_is_samples(client: Client, overlap: int) -> None:
    here, there = client.scheduler_info()["workers"]
    length, total = 1 << 16, 1 << 20  # 16 MiB
    w = windows(da.arange(total, chunks=length, dtype=float) * da.ones((2, 1)), 4096, 4096 // overlap)
    blocks = w.blocks()
    samples = sum(block.stop - block.start for block in blocks) * 16
    assert samples < 1.1 * 16 * total

    kept = client.persist(w.segments(), workers=[here], optimize_graph=False)
    wait(kept)
    futures = client.futures_of(kept)
    sizes = client.run_on_scheduler(
        lambda keys, dask_scheduler: [dask_scheduler.tasks[key].nbytes for key in keys], [f.key for f in futures]
    )
    assert sum(sizes) == samples
    assert 0 < client.run(spilled)[here] <= samples

    before = client.run(received)[there]
    done = [
        client.submit(checksum, future, w.spec, block.first, workers=[there])
        for future, block in zip(futures, blocks, strict=True)
    ]
    found = client.gather(done)
    assert 0.9 * samples < client.run(received)[there] - before < 1.1 * samples
    assert [rows for rows, _ in found] == [block.rows for block in blocks]
    firsts = np.arange(len(w), dtype=float) * w.step
    assert sum(value for _, value in found) == np.sum(2 * w.size * (firsts + (w.size - 1) / 2))
