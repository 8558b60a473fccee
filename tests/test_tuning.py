"""The batch size that is found by measuring, and where it is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zcinfer as zc
from zcinfer import catalog, memory, tuning
from zcinfer.predictor import Predictor
from zcinfer.rows import rows_of
from zcinfer.tuning import Place, Size, choose_size, measure

CPU = torch.device("cpu")


def kept(registry: Path) -> list[Size]:
    return [Size(**json.loads(path.read_text())) for path in (registry / "batch-sizes").glob("*.json")]


class Costs(nn.Module):
    """Takes so many seconds a batch, and so many a row."""

    def __init__(self, batch: float, row: float) -> None:
        super().__init__()
        self.costs = batch, row

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            batch, row = self.costs
            until = perf_counter() + batch + row * len(x)
            while perf_counter() < until:
                pass
        return x * 2


@given(
    st.floats(0, 1e-2),
    st.floats(1e-6, 1e-2),
    st.integers(0, 20).map(lambda n: 1 << n),
    st.floats(1.2, 5),
)
def test_the_size_is_where_doubling_stops_to_pay(batch: float, row: float, cache: int, slower: float) -> None:
    tried = []

    def cost(rows: int) -> float:
        return batch + row * min(rows, cache) + slower * row * max(0, rows - cache)

    def observe(rows: int) -> tuple[float, int]:
        tried.append(rows)
        return cost(rows), 0

    found = choose_size(observe, 1e9)

    def rate(rows: int) -> float:
        return rows / cost(rows)

    seconds = sum(map(cost, tried))
    assert seconds < tuning.LONGEST + max(map(cost, tried)) + tuning.SURE
    sizes = [1 << n for n in range(max(tried).bit_length())]
    assert rate(found.rows) * tuning.GAIN >= max(map(rate, sizes))
    assert all(rate(rows) * tuning.GAIN < max(map(rate, sizes)) for rows in sizes if rows < found.rows)
    stopped_early = max(sizes) < tuning.MOST and seconds < tuning.LONGEST
    if stopped_early:
        assert max(map(rate, sizes[:-2])) * tuning.GAIN > max(map(rate, sizes[-2:]))


def test_a_size_is_measured_once(registry: Path) -> None:
    zc.put(Costs(2e-3, 20e-6).eval(), "model")
    x = np.ones((20_000, 1), np.float32)
    predictor = Predictor("model").bind([rows_of(x)])
    begin = perf_counter()
    assert predictor.measured() > 64  # where the row costs 50 us, and not 20
    assert perf_counter() - begin < 2 * tuning.LONGEST
    (found,) = kept(registry)
    begin = perf_counter()
    assert predictor.measured() == found.rows
    assert perf_counter() - begin < 0.05


def test_batches_stay_within_the_memory_that_there_is(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "memory_budget", lambda _: 200_000_000)
    held: list[int] = []

    def run(rows: int) -> None:
        block = bytearray(rows * 40_000_000)  # so large that it is no memory that was in use before
        block[::4096] = b"1" * len(block[::4096])
        held.append(rows)

    found = measure(run, CPU)
    assert max(held) <= 5
    assert found.rows <= 5
    if sys.platform == "linux":
        assert 30e6 < found.row_bytes < 50e6


def test_less_memory_on_another_day_makes_smaller_batches(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zc.put(nn.Linear(3, 2).eval(), "linear")
    predictor = Predictor("linear").bind([rows_of(np.ones((5, 3), np.float32))])
    predictor.place(CPU).remember(Size(1024, row_bytes=1e6))
    monkeypatch.setattr(tuning, "available", lambda: 10**12)
    assert predictor.measured() == 1024
    monkeypatch.setattr(tuning, "available", lambda: 400_000_000)
    assert predictor.measured() == 128


def test_others_are_asked_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, now = Place(tmp_path / "sizes" / "b.json"), [100.0]
    monkeypatch.setattr(tuning, "monotonic", lambda: now[0])
    place.ask()
    place.path.parent.mkdir()
    place.path.write_text(json.dumps({"rows": 8, "ceiling": 16}))
    for seconds, ceiling in ((0.5, None), (0.6, 16), (0.0, 16)):
        now[0] += seconds
        place.ask()
        assert place.ceiling() == ceiling


def test_the_first_to_remember_is_right(tmp_path: Path) -> None:
    place = Place(tmp_path / "sizes" / "a.json")
    assert place.known() is None
    assert place.remember(Size(64)) == Size(64)
    assert place.remember(Size(128)) == Size(64)
    place.lower(16)
    assert place.known() == Size(16, ceiling=16)
    tuning._known.clear()
    assert place.known() == Size(16, ceiling=16)
    place.path.write_text("nonsense")
    tuning._known.clear()
    assert place.known() is None


def cuda_error(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
        (cuda_error(2), True),
        (cuda_error(700), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (ValueError("CUBLAS_STATUS_ALLOC_FAILED"), False),
    ],
    ids=lambda value: str(value)[:50],
)
def test_want_of_memory_is_told_from_other_errors(error: Exception, is_it: bool) -> None:
    assert tuning.is_out_of_memory(error) == is_it


def test_a_full_disk_does_not_stop_a_job(tmp_path: Path) -> None:
    (tmp_path / "sizes").write_text("a file in the place of the directory")
    place = Place(tmp_path / "sizes" / "a.json")
    assert place.remember(Size(64)) == Size(64) == place.known()
    place.lower(8)
    assert place.known() == Size(8, ceiling=8)


def test_sizes_differ_by_what_they_depend_on(registry: Path) -> None:
    zc.put(nn.Linear(3, 2).eval(), "linear")
    x = rows_of(np.ones((5, 3), np.float32))

    def place(**settings: Any) -> Path:
        return Predictor("linear", **settings).bind([x]).place(CPU).path

    assert place() == place(batch_size=3, output=lambda output, _: output)
    assert len({place(), place(autocast="bfloat16"), place(preprocess=lambda x: np.tile(x[:, :1], 3) * 2)}) == 2
    before = place()
    with dask.config.set({"zcinfer.jobs": 4}):
        assert place() != before
    other = Predictor("linear").bind([rows_of(np.ones((5, 7, 3), np.float32))]).place(CPU).path
    assert other != place()


def test_each_registry_has_its_own_sizes(tmp_path: Path) -> None:
    x, found = rows_of(np.ones((5, 3), np.float32)), []
    for name in ("one", "two"):
        with dask.config.set({"zcinfer.registry": str(tmp_path / name)}):
            catalog.connect(f"file:{tmp_path / name}")
            torch.manual_seed(0)
            zc.put(nn.Linear(3, 2).eval(), "linear")
            found.append(Predictor("linear").bind([x]).place(CPU))
            catalog.disconnect()
    assert [place.path.relative_to(tmp_path).parts[0] for place in found] == ["one", "two"]
    assert found[0].path.name == found[1].path.name


def test_a_graph_measures_once_and_all_its_blocks_use_that(registry: Path) -> None:
    zc.put(Costs(1e-3, 1e-6).eval(), "model")
    x = np.random.default_rng(0).normal(size=(30_000, 1)).astype(np.float32)
    lazy = zc.predict("model", da.from_array(x, chunks=(10_000, 1)))
    assert not (registry / "batch-sizes").exists()
    assert sum("batch-size" in str(key) for key in lazy.__dask_graph__()) == 1
    assert np.array_equal(lazy.compute(scheduler="sync"), x * 2)
    assert len(kept(registry)) == 1


def test_a_model_that_refuses_zeros_goes_by_the_rule(registry: Path) -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is torch.Tensor and not x.any():
                raise ValueError("nothing to see")
            return x + 1

    zc.put(Picky().eval(), "picky")
    x = np.ones((10_000, 2), np.float32)
    assert np.array_equal(zc.predict("picky", x), x + 1)
    assert [size.rows for size in kept(registry)] == [1024]


def test_a_restarted_job_keeps_its_batches(registry: Path, tmp_path: Path) -> None:
    zc.put(nn.Linear(4, 3).eval(), "linear")
    source = zarr.create_array(str(tmp_path / "in.zarr"), shape=(40_000, 4), chunks=(10_000, 4), dtype="f4")
    source[:] = np.random.default_rng(0).normal(size=source.shape)
    out = tmp_path / "out.zarr"
    zc.run("linear", str(tmp_path / "in.zarr"), out, progress=False)
    manifest = json.loads((out / ".zcinfer" / "manifest.json").read_text())
    (found,) = kept(registry)
    assert manifest["batch_rows"] == found.rows
    for path in (registry / "batch-sizes").iterdir():
        path.write_text(json.dumps({"rows": 3}))
    tuning._known.clear()
    (out / ".zcinfer" / "done").mkdir()
    out.rename(out.with_name("out.zarr.partial"))
    assert zc.run("linear", str(tmp_path / "in.zarr"), out, progress=False).computed == 4
    assert json.loads((out / ".zcinfer" / "manifest.json").read_text())["batch_rows"] == found.rows


def test_memory_that_a_call_takes_at_most_is_observed() -> None:
    memory.give_back_freed()
    before = memory.resident()
    peak = memory.peak_resident(lambda: len(bytes(bytearray(b"1") * 50_000_000)))
    assert 90e6 < peak - before < 130e6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_memory_that_the_c_library_keeps_counts_as_taken() -> None:
    script = """
import torch
from zcinfer.memory import keep_freed
from zcinfer.tuning import measure

keep_freed()  # as workers do: what one size took, the next has without asking the system
print(measure(lambda rows: [torch.empty(250_000).fill_(1) for _ in range(rows)], torch.device("cpu")).row_bytes)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert 0.95e6 < float(found) < 1.5e6


def test_available_memory_is_that_of_the_container() -> None:
    script = "from zcinfer.memory import available; print(available())"
    found = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 0 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
