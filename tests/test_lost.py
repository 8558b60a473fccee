"""Errors after which a GPU answers nothing more: the worker ends, the block is tried elsewhere, and not for ever.

On the CPU, by a module that raises what torch raises then, and goes on to do so in that process.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client
from processes import wait_until

import zcinfer as zc
from zcinfer import lost
from zcinfer.errors import BlockError, DeviceLost
from zcinfer.guarded import Guard, Guarded
from zcinfer.rows import rows_of

BAD = 1000.0


def error_of(code: int | None) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if code is not None:
        error.error_code = code
    return error


class Fragile(torch.nn.Module):
    """As on a GPU: the row BAD breaks the process, ``times`` times, and all that is computed there after it fails."""

    broken = False

    def __init__(self, folder: Path, times: int, code: int | None = 700):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.ended, self.times, self.code = str(folder / "ended"), times, code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == BAD).any():
            with open(self.ended, "a+") as file:
                file.seek(0)
                if len(file.read()) < self.times:
                    file.write("x")
                    type(self).broken = self.code != 1
                    raise error_of(self.code)
        if self.broken:
            raise error_of(self.code)
        output: torch.Tensor = self.layer(x)
        return output


@pytest.fixture(autouse=True)
def _mended() -> Iterator[None]:
    yield
    Fragile.broken = False


def rows(bad: int) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    x[bad] = BAD
    return x


def fragile(folder: Path, times: int, code: int | None = 700) -> Fragile:
    model = Fragile(folder, times, code).eval()
    zc.put(model, "fragile")
    return model


def plainly(model: Fragile, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model.layer(torch.from_numpy(x)).numpy()
    return found


# --- in one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [700, 710, 719, 721, 911, 214])
def test_errors_after_which_nothing_is_answered(code: int) -> None:
    found = lost.failed("block 3, of m@1", error_of(code))
    assert type(found) is DeviceLost
    assert lost.is_lost(found)
    assert str(found).startswith("block 3, of m@1: AcceleratorError: CUDA error: an illegal memory access")
    assert f"CUDA error {code}, after which the device answers nothing more in this process" in str(found)
    assert "find the rows with device='cpu'" in str(found)


@pytest.mark.parametrize("code", [1, 2, 98, 100, 720])
def test_other_errors_of_the_device(code: int) -> None:
    found = lost.failed("block 3, of m@1", error_of(code))
    assert type(found) is BlockError
    found.__cause__ = error_of(code)
    assert not lost.is_lost(found)


def test_an_error_without_a_number_may_be_one() -> None:
    found = lost.failed("block 3, of m@1", error_of(None))
    assert type(found) is BlockError
    found.__cause__ = error_of(None)
    assert lost.is_lost(found)


def test_other_errors_are_none_of_it() -> None:
    assert str(lost.failed("block 3", ValueError("no"))) == "block 3: ValueError: no"
    assert not lost.is_lost(lost.failed("block 3", ValueError("no")))


def test_an_error_of_a_library_that_only_the_next_call_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        raise error_of(700)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    found = lost.failed("block 3", RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    assert isinstance(found, DeviceLost)
    assert "CUBLAS_STATUS_EXECUTION_FAILED (CUDA error 700, after" in str(found)


def test_where_there_is_no_worker_it_is_told(registry: Path, tmp_path: Path) -> None:
    model, x = fragile(tmp_path, times=1), rows(bad=25)
    with pytest.raises(DeviceLost, match=r"rows 24–27, of fragile@1: .*CUDA error 700.*Start the process anew"):
        zc.predict("fragile", x, batch_size=4)
    Fragile.broken = False
    np.testing.assert_array_equal(zc.predict("fragile", x, batch_size=40), plainly(model, x))


@pytest.mark.parametrize("code", [700, None])
def test_rows_are_not_looked_for_on_a_device_that_is_lost(registry: Path, tmp_path: Path, code: int | None) -> None:
    fragile(tmp_path, times=1, code=code)
    guarded = Guarded(Guard("nan"), ["input"], "fragile")
    with pytest.raises(BlockError, match="rows 24–27, of fragile@1"):
        guarded.run_block([rows(bad=25)], "block 0", 0, 4)
    with open(tmp_path / "ended") as file:
        assert file.read() == "x"


def test_rows_are_looked_for_where_the_device_lives(registry: Path, tmp_path: Path) -> None:
    model = fragile(tmp_path, times=99, code=1)
    block = rows(bad=25)
    guarded = Guarded(Guard("nan"), ["input"], "fragile").bind([rows_of(block)])
    outcome = guarded.run_block([block], "block 0", 0, 4)
    assert [(failure["first"], failure["last"]) for failure in outcome.record["failures"]] == [(25, 25)]
    good = np.arange(40) != 25
    np.testing.assert_allclose(outcome.result[good], plainly(model, block)[good], rtol=1e-5)
    assert np.isnan(outcome.result[25]).all()


def test_errors_travel() -> None:
    assert type(pickle.loads(pickle.dumps(DeviceLost("block 3")))) is DeviceLost


# --- on a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(registry: Path, request: pytest.FixtureRequest) -> Iterator[zc.LocalCluster]:
    # One task at a time: of two that fail at once the first is taken for the cause.
    threads = getattr(request, "param", 1)
    before = dict(os.environ)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        zc.LocalCluster(n_workers=2, threads_per_worker=threads, dashboard=False) as cluster,
    ):
        yield cluster
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def client(cluster: zc.LocalCluster) -> Iterator[Client]:
    with cluster.get_client() as client:
        yield client


def pids(cluster: zc.LocalCluster) -> set[int | None]:
    return {nanny.pid for nanny in cluster.workers.values()}


def suspected(cluster: zc.LocalCluster) -> dict[Any, int]:
    return {key: task.suspicious for key, task in cluster.scheduler.tasks.items() if task.suspicious}


def two_again(cluster: zc.LocalCluster, before: set[int | None]) -> set[int | None]:
    """Process ids of two workers that run, of which one at least was not there before."""
    wait_until(
        lambda: len(cluster.scheduler.running) == 2 and None not in pids(cluster) and pids(cluster) != before, 60
    )
    return pids(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_block_that_broke_its_worker_is_computed_by_another(
    cluster: zc.LocalCluster, client: Client, tmp_path: Path
) -> None:
    before = pids(cluster)
    model, x = fragile(tmp_path, times=1), rows(bad=25)
    # What a worker has computed is handed over, and not lost with it.
    kept = client.persist(da.from_array(np.arange(8.0), chunks=1))
    y = zc.predict("fragile", da.from_array(x, chunks=(4, 3)), batch_size=4)
    np.testing.assert_array_equal(y.compute(), np.concatenate([plainly(model, x[i : i + 4]) for i in range(0, 40, 4)]))
    after = two_again(cluster, before)
    assert len(after & before) == 1  # the other went on
    assert suspected(cluster) == {}
    np.testing.assert_array_equal(kept.compute(), np.arange(8.0))
    np.testing.assert_array_equal(y.compute(), np.concatenate([plainly(model, x[i : i + 4]) for i in range(0, 40, 4)]))
    assert pids(cluster) == after


@pytest.mark.slow
def test_a_block_that_always_breaks_its_worker_fails_with_its_name(
    cluster: zc.LocalCluster, client: Client, tmp_path: Path
) -> None:
    before = pids(cluster)
    model, x = fragile(tmp_path, times=99), rows(bad=25)
    y = zc.predict("fragile", da.from_array(x, chunks=(8, 3)), batch_size=4).persist()
    blocks = [y.blocks[number] for number in range(5)]
    with pytest.raises(DeviceLost) as caught:
        blocks[3].compute()
    assert "block 3, rows 24–27, of fragile@1: in Fragile: AcceleratorError" in str(caught.value)
    assert "(CUDA error 700, after which the device answers nothing more in this process)" in str(caught.value)
    assert "the end of 2 workers by this block, so it is not tried again" in str(caught.value)
    for number in (0, 1, 2, 4):
        expected = np.concatenate([plainly(model, x[i : i + 4]) for i in (8 * number, 8 * number + 4)])
        np.testing.assert_array_equal(blocks[number].compute(), expected)
    assert suspected(cluster) == {}
    with open(tmp_path / "ended") as file:
        assert file.read() == "xx"
    two_again(cluster, before)


@pytest.mark.slow
def test_a_single_worker_is_started_anew(cluster: zc.LocalCluster, client: Client, tmp_path: Path) -> None:
    cluster.scale(1)
    wait_until(lambda: len(cluster.scheduler.workers) == 1)
    before = pids(cluster)
    model, x = fragile(tmp_path, times=1), rows(bad=25)
    target = zc.run("fragile", save(tmp_path, x), tmp_path / "out.zarr", batch_size=4, progress=False).target
    expected = np.concatenate([plainly(model, x[i : i + 4]) for i in range(0, 40, 4)])
    np.testing.assert_array_equal(da.from_zarr(target).compute(), expected)
    assert not pids(cluster) & before


def save(folder: Path, x: np.ndarray[Any, Any]) -> str:
    da.from_array(x, chunks=(8, 3)).to_zarr(str(folder / "in.zarr"))
    return str(folder / "in.zarr")
