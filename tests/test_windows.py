"""Windows through ``predict`` and ``run``: as arrays of the same rows, without ever being arrays."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from dask.callbacks import Callback
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, OutputError
from zcinfer.jobs import Report

pytestmark = pytest.mark.usefixtures("registry")


def strain(length: int, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(channels, length))


class Power(nn.Module):
    """Takes ``(rows, channels, samples)``, and weights ``(rows,)``; gives ``(rows, channels)``."""

    def forward(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        power = (x * torch.arange(x.shape[-1])).sum(-1)
        return power if weights is None else power * weights[:, None]


class Both(nn.Module):
    """Takes ``(rows, channels, samples)`` and ``(rows, samples, channels)``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x.sum(-1) + y.sum(1), "first": x[:, 0, 0]}


class Choosy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1) if (x > 0).any() else x[..., 0]


def differences(segment: np.ndarray, history: int) -> np.ndarray:
    return np.diff(segment) if history else np.diff(segment, prepend=segment[:, :1])


def compute(array: da.Array) -> np.ndarray:
    result: np.ndarray = array.compute(scheduler="sync")
    return result


def power(rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return Power()(torch.from_numpy(rows.copy())).numpy()


# predict


def test_rows_are_windows() -> None:
    zc.put(Power().eval(), "model")
    x = strain(100)
    w = zc.windows(da.from_array(x, chunks=(1, 30)), 8, 3)
    with dask.config.set(scheduler="none such"):
        y = zc.predict("model", w)
    assert (y.shape, y.chunks) == ((31, 2), ((10, 10, 10, 1), (2,)))
    expected = zc.windows(x, 8, 3).head(31)
    assert np.array_equal(compute(y), power(expected))
    assert np.array_equal(zc.predict("model", zc.windows(x, 8, 3)), power(expected))
    assert np.array_equal(compute(y[12:14]), power(expected)[12:14])


def test_every_chunking_equals_an_array_of_the_same_rows() -> None:
    zc.put(Power().eval(), "model")

    @given(st.data())
    @settings(max_examples=40, deadline=None)
    def check(data: st.DataObject) -> None:
        length = data.draw(st.integers(1, 60))
        size, step = data.draw(st.integers(1, length)), data.draw(st.integers(1, 9))
        x = strain(length)
        chunks = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, length)))
        block_rows = data.draw(st.none() | st.integers(1, 70))
        w = zc.windows(da.from_array(x, chunks=chunks), size, step, block_rows=block_rows)
        rows = da.from_array(zc.windows(x, size, step).head(len(w)), chunks=w.chunks)
        batch = data.draw(st.integers(1, 70))
        y, expected = zc.predict("model", w, batch_size=batch), zc.predict("model", rows, batch_size=batch)
        assert y.chunks == expected.chunks
        assert np.array_equal(compute(y), compute(expected))

    check()


@pytest.mark.parametrize("first", ["windows", "weights"])
@pytest.mark.parametrize("lazy", ["windows", "weights", "both"])
def test_beside_an_array_of_as_many_rows(first: str, lazy: str) -> None:
    zc.put(Power().eval(), "model")
    x, weights = strain(100), np.arange(31.0)
    inputs: dict[str, Any] = {"x": x, "weights": weights}
    if lazy != "weights":
        inputs["x"] = da.from_array(x, chunks=(2, 45))
    if lazy != "windows":
        inputs["weights"] = da.from_array(weights, chunks=((5, 0, 20, 6),))
    inputs["x"] = zc.windows(inputs["x"], 8, 3)
    y = zc.predict("model", **(inputs if first == "windows" else dict(reversed(inputs.items()))))
    leading = lazy if lazy != "both" else first
    assert y.chunks[0] == {"windows": (15, 15, 1), "weights": (5, 0, 20, 6)}[leading]
    assert np.array_equal(compute(y), (power(zc.windows(x, 8, 3).head(31)) * weights[:, None]))


def test_windows_of_two_arrays_and_several_outputs() -> None:
    zc.put(Both().eval(), "model")
    x, z = strain(100), strain(260).T
    a = zc.windows(da.from_array(x, chunks=(2, 30)), 8, 3)
    b = zc.windows(da.from_array(z, chunks=(70, 1)), 20, 8, axis=0)
    total, first = zc.predict("model", a, b, output=["sum", "first"])
    assert total.chunks == ((10, 10, 10, 1), (2,))
    rows, others = zc.windows(x, 8, 3).head(31), zc.windows(z, 20, 8, axis=0).head(31)
    assert np.allclose(compute(total), rows.sum(-1) + others.sum(1))
    assert np.array_equal(compute(first), rows[:, 0, 0])


def test_prepared_windows_do_not_depend_on_the_blocks() -> None:
    zc.put(Power().eval(), "model")
    x = np.cumsum(strain(1000), axis=1)
    expected = power(zc.windows(np.diff(x, prepend=x[:, :1]), 64, 5).head(999))
    for chunk in (90, 333, 1000):
        w = zc.windows(da.from_array(x, chunks=(1, chunk)), 64, 5, history=1, prepare=differences)
        assert np.array_equal(compute(zc.predict("model", w)), expected)


def test_preprocess_gets_rows() -> None:
    zc.put(Power().eval(), "model")
    x = strain(100)
    y = zc.predict("model", zc.windows(da.from_array(x, chunks=(2, 30)), 8, 3), preprocess=lambda rows: rows + 1)
    assert np.array_equal(compute(y), power(zc.windows(x, 8, 3).head(31) + 1))


def test_branches_on_data_look_at_the_first_windows_alone() -> None:
    zc.put(Choosy().eval(), "model")
    seen: list[int] = []

    def source(block_id: tuple[int, ...] = ()) -> np.ndarray:
        seen.append(block_id[1])
        return np.ones((2, 25))

    x = da.map_blocks(source, chunks=((2,), (25,) * 4), dtype=float, meta=np.empty((0, 0)))
    y = zc.predict("model", zc.windows(x, 8, 3))
    assert set(seen) == {0}
    assert np.array_equal(compute(y), np.full((31, 2), 8.0))


def test_keys_are_of_windows_and_model() -> None:
    zc.put(Power().eval(), "model")
    x = da.zeros((2, 100), chunks=(2, 30))
    assert zc.predict("model", zc.windows(x, 8, 3)).name == zc.predict("model", zc.windows(x, 8, 3)).name
    every = [
        zc.windows(x, 8, 3),
        zc.windows(x, 8, 2),
        zc.windows(x + 1, 8, 3),
        zc.windows(x, 8, 3, prepare=lambda s, h: s + 1),
        zc.windows(x, 8, 3, prepare=lambda s, h: s + 2),
    ]
    assert len({zc.predict("model", w).name for w in every}) == 5


@pytest.mark.parametrize("overlap", [2, 32])
def test_no_task_gives_windows(overlap: int) -> None:
    zc.put(Power().eval(), "model")
    sizes: list[int] = []
    x = da.random.default_rng(0).normal(size=(2, 1 << 15), chunks=(2, 1 << 12))
    w = zc.windows(x, 1024, 1024 // overlap)
    largest = max(block.stop - block.start for block in w.blocks()) * 16
    assert largest <= 16 * ((1 << 12) + 1024)
    with Callback(posttask=lambda key, result, *_: sizes.append(getattr(result, "nbytes", 0))):
        compute(zc.predict("model", w, batch_size=4))
    assert max(sizes) <= largest


def test_other_numbers_of_rows_are_refused() -> None:
    zc.put(Power().eval(), "model")
    w = zc.windows(da.zeros((2, 100), chunks=(2, 30)), 8, 3)
    with pytest.raises(InputError, match="different numbers of rows: 30 and 31"):
        zc.predict("model", w, weights=np.zeros(30))
    with pytest.raises(InputError, match=r"unknown and different row chunks.*compute_chunk_sizes\(\)"):
        zc.predict("model", weights=da.zeros(40)[da.zeros(40) > 1], x=w)


def test_failing_prepare_names_its_windows() -> None:
    zc.put(Power().eval(), "model")
    w = zc.windows(da.zeros((2, 100), chunks=(2, 30)), 8, 3, prepare=lambda s, h: s[:, :-1])
    with pytest.raises(BlockError, match=r"windows 10–19: prepare \(<lambda>\) returned \(2, 34\), expected \(2, 35\)"):
        compute(zc.predict("model", w).blocks[1])


# run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    zc.put(Power().eval(), "model")
    zarr.create_array(tmp_path / "x.zarr", data=strain(1000), chunks=(1, 200))
    return tmp_path / "x.zarr"


def run(source: Any, target: Path, **settings: Any) -> Report:
    return zc.run("model", source, target, progress=False, **settings)


@pytest.mark.parametrize("kind", ["path", "zarr", "dask"])
def test_job_over_windows_of_a_file(source: Path, kind: str) -> None:
    x = {"path": source, "zarr": zarr.open_array(source), "dask": da.from_zarr(source)}[kind]
    target = source.with_name("y.zarr")
    report = run(zc.windows(x, 64, 10), target)
    assert (report.shape, report.blocks, report.computed) == ((94, 2), 5, 5)
    written = zarr.open_array(target)
    assert written.chunks == (20, 2)
    assert np.array_equal(written[:], power(zc.windows(strain(1000), 64, 10).head(94)))
    if kind != "dask":
        assert run(zc.windows(x, 64, 10), target).computed == 0


def test_job_of_windows_and_weights(source: Path) -> None:
    weights = zarr.create_array(source.with_name("w.zarr"), data=np.arange(94.0), chunks=(13,))
    inputs = {"x": zc.windows(source, 64, 10, block_rows=50), "weights": weights}
    assert run(inputs, source.with_name("y.zarr")).blocks == 2
    assert run(inputs, source.with_name("z.zarr"), block_rows=30).blocks == 4
    assert run(dict(reversed(inputs.items())), source.with_name("v.zarr")).blocks == 8
    expected = power(zc.windows(strain(1000), 64, 10).head(94)) * np.arange(94.0)[:, None]
    for name in "yzv":
        assert np.array_equal(zarr.open_array(source.with_name(f"{name}.zarr"))[:], expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda path: zc.windows(path, 64, 10, history=1, prepare=differences),
        lambda path: zc.windows(path, 60, 10),  # of as many rows, and in the same blocks
        lambda path: path,
    ],
    ids=["prepare", "size", "no windows"],
)
def test_other_windows_are_another_job(source: Path, other: Any) -> None:
    zarr.create_array(source.with_name("r.zarr"), data=strain(94)[:, :64].reshape(-1, 2, 4), chunks=(20, 2, 4))
    target = source.with_name("y.zarr")
    run(zc.windows(source, 64, 10), target)
    with pytest.raises(OutputError, match="is the output of another job"):
        run(other(source if other.__code__.co_names else source.with_name("r.zarr")), target, block_rows=20)


def test_stopped_job_goes_on(source: Path) -> None:
    target, failing = source.with_name("y.zarr"), source.with_name("fails")

    class Stop:
        """Fails in block 3 while a file is there; the same function before and after."""

        def __init__(self, place: Path) -> None:
            self.place = str(place)

        def __call__(self, segment: np.ndarray, history: int) -> np.ndarray:
            if os.path.exists(self.place) and segment.shape[1] - history == 254 and np.allclose(segment, beyond):
                raise ValueError("stopped")
            return segment[:, history:]

    beyond = strain(1000)[:, 600:854]
    failing.touch()
    w = zc.windows(source, 64, 10, prepare=Stop(failing))
    with pytest.raises(BlockError, match=r"windows 60–79: prepare .* ValueError: stopped"):
        run(w, target)
    failing.unlink()
    report = run(zc.windows(source, 64, 10, prepare=Stop(failing)), target)
    assert 1 <= report.computed < report.blocks == 5
    assert np.array_equal(zarr.open_array(target)[:], power(zc.windows(strain(1000), 64, 10).head(94)))


def test_job_refuses_its_source_as_target_and_numpy(source: Path) -> None:
    with pytest.raises(OutputError, match=re.escape(f"input lies at {source}, in the place of the target")):
        run(zc.windows(source, 64, 10), source / "y.zarr")
    with pytest.raises(InputError, match="input is windows of a NumPy array: give windows of the path"):
        run(zc.windows(strain(1000), 64, 10), source.with_name("y.zarr"))


# On a cluster


@pytest.mark.slow
def test_cluster_computes_the_same(client: Client, source: Path) -> None:
    w = zc.windows(source, 64, 10, history=1, prepare=differences)
    x = strain(1000)
    expected = power(zc.windows(np.diff(x, prepend=x[:, :1]), 64, 10).head(94))
    assert np.allclose(zc.predict("model", w).compute(), expected)
    report = run(w, source.with_name("y.zarr"))
    assert report.computed == 5
    assert np.allclose(zarr.open_array(source.with_name("y.zarr"))[:], expected)
