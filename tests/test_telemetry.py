"""The counters of a process: they agree with what was done, and cost nothing that one could see."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import dask
import dask.array as da
import msgpack
import numpy as np
import pytest
import torch
import zarr
from torch import nn

import zcinfer as zc
from zcinfer import loading, telemetry
from zcinfer.errors import BlockError
from zcinfer.telemetry import BOUNDS, KINDS, LOAD_PHASES, PHASES, Job

pytestmark = pytest.mark.usefixtures("registry")

SLEEP = 0.02


class Slow(nn.Module):
    """Doubles rows, after a while; refuses negative ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:  # and not one without content, of which only the shape is asked
            time.sleep(SLEEP)
            if (x < 0).any():
                raise ValueError("negative")
        return x * 2


class Crowded(nn.Module):
    """Has memory for two rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2 and type(x) is torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")
        return x


@pytest.fixture(autouse=True)
def _from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_works", type(telemetry._works)())
    monkeypatch.setattr(telemetry, "_loads", type(telemetry._loads)())
    telemetry._failures.clear()
    loading.residents.clear()
    return


def work() -> dict[str, object]:
    (found,) = telemetry.snapshot()["work"]
    return dict(found)


def seconds(found: dict[str, object]) -> dict[str, float]:
    return dict(zip(PHASES, found["seconds"], strict=True))  # type: ignore[call-overload]


def test_what_was_done_is_counted() -> None:
    zc.put(Slow().eval(), "slow")
    x = np.ones((10, 3), np.float32)
    begin = time.perf_counter()
    zc.predict("slow", x, batch_size=4)
    took = time.perf_counter() - begin
    found = work()
    assert (found["rows"], found["blocks"], found["batches"], found["errors"]) == (10, 1, 3, 0)
    assert (found["bytes_in"], found["bytes_out"]) == (120, 120)
    assert (found["model"], found["name"]) == ("slow@1", "slow@1")
    phases = seconds(found)
    assert phases["computing"] >= 3 * SLEEP
    assert sum(phases.values()) <= took
    assert sum(phases.values()) - phases["computing"] < SLEEP


def test_each_array_is_a_job_and_each_model_is_told_apart() -> None:
    for name in "ab":
        zc.put(nn.Linear(3, 2).eval(), name)
    x = da.ones((10, 3), chunks=(5, 3), dtype="f4")
    dask.compute(*zc.predict(["a", "b"], x), scheduler="sync")
    zc.predict("a", x + 1).compute(scheduler="sync")
    found = telemetry.snapshot()["work"]
    assert sorted((w["model"], w["rows"], w["blocks"]) for w in found) == [
        ("a@1", 10, 2),
        ("a@1", 10, 2),
        ("b@1", 10, 2),
    ]
    assert len({w["job"] for w in found}) == 2


def test_a_failed_block_is_an_error_and_no_block() -> None:
    zc.put(Slow().eval(), "slow")
    with pytest.raises(BlockError):
        zc.predict("slow", -np.ones((4, 3), np.float32))
    found = work()
    assert (found["errors"], found["blocks"], found["rows"]) == (1, 0, 0)
    (failure,) = telemetry.snapshot()["failures"]
    assert "ValueError: negative" in failure["message"]
    assert "in forward" in failure["traceback"]
    assert telemetry.snapshot(since=time.time() + 1)["failures"] == []


def test_a_block_that_is_computed_in_parts_is_one(tmp_path: Path) -> None:
    zc.put(Slow().eval(), "slow")
    x = np.ones((10, 3), np.float32)
    x[3] = -1
    zarr.create_array(tmp_path / "x.zarr", data=x, chunks=(5, 3))
    report = zc.run("slow", tmp_path / "x.zarr", tmp_path / "y.zarr", on_error="nan", batch_size=5, progress=False)
    assert report.failed == (3,)
    found = work()
    assert (found["blocks"], found["rows"], found["errors"], found["name"]) == (2, 10, 0, "slow@1 into y.zarr")
    assert found["batches"] > 2  # type: ignore[operator]
    assert seconds(found)["writing"] > 0


def test_halves_are_counted() -> None:
    zc.put(Crowded().eval(), "crowded")
    zc.predict("crowded", np.ones((8, 3), np.float32), batch_size=8)
    assert work()["halved"] == 2  # eight rows, then four; the other four are not tried


def test_a_histogram_has_each_block_once() -> None:
    zc.put(Slow().eval(), "slow")
    x = da.ones((6, 3), chunks=(2, 3), dtype="f4")
    zc.predict("slow", x).compute(scheduler="sync")
    histogram = work()["histogram"]
    assert sum(histogram) == 3  # type: ignore[call-overload]
    places = np.flatnonzero(histogram)  # type: ignore[arg-type]
    assert BOUNDS[places.min()] >= SLEEP


def test_loads_are_told_by_kind() -> None:
    zc.put(nn.Linear(300, 200).eval(), "model")
    x = np.ones((4, 300), np.float32)
    for _ in range(3):
        zc.predict("model", x, batch_size=2)
    (loads,) = telemetry.snapshot()["loads"]
    assert dict(zip(KINDS, loads["counts"], strict=True)) == {
        "zero-copy": 1, "private": 0, "from disk": 0, "resident hit": 2,
    }  # fmt: skip
    assert loads["shared"] >= 300 * 200 * 4
    assert sum(loads["histograms"]["zero-copy"]) == 1
    phases = dict(zip(LOAD_PHASES, loads["seconds"], strict=True))
    assert phases["join"] > 0
    assert phases["fetch"] > 0
    assert 0 < phases["first batch"] < sum(seconds(work()).values())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_programs_are_private() -> None:
    zc.put(torch.jit.trace(nn.Linear(300, 200).eval(), torch.ones(1, 300)), "program")
    zc.load("program")
    (loads,) = telemetry.snapshot()["loads"]
    assert dict(zip(KINDS, loads["counts"], strict=True))["private"] == 1


def test_modules_that_go_for_want_of_room_are_counted() -> None:
    residents = loading.Residents(loading.Resident, 1)
    refs = [zc.put(nn.Linear(3, width).eval(), f"m{width}") for width in (1, 2)]
    for ref in refs:
        with residents.lend(ref, "cpu", "refuse"):
            pass
    evicted = {loads["model"]: loads["evicted"] for loads in telemetry.snapshot()["loads"]}
    assert evicted == {"m1@1": 1, "m2@1": 0}


def test_nothing_is_counted_where_nobody_wants_it() -> None:
    zc.put(nn.Linear(3, 2).eval(), "model")
    with dask.config.set({"zcinfer.telemetry": False}):
        zc.predict("model", np.ones((4, 3), np.float32))
    found = telemetry.snapshot()
    assert found["work"] == []
    assert found["loads"] == []


def test_a_snapshot_goes_over_the_wire_and_leaves_out_what_is_old() -> None:
    zc.put(nn.Linear(3, 2).eval(), "model")
    zc.predict("model", np.ones((4, 3), np.float32))
    sent = msgpack.unpackb(msgpack.packb(telemetry.snapshot()))
    assert sent == telemetry.snapshot() | {name: sent[name] for name in ("private", "shared", "time")}
    assert telemetry.snapshot(since=time.time() + 1)["work"] == []


def test_old_jobs_are_forgotten() -> None:
    for number in range(telemetry.REMEMBERED + 5):
        with telemetry.block(Job(str(number), "n"), "m@1", "block 0", 1, 1, 1):
            pass
    assert [w["job"] for w in telemetry.snapshot()["work"]] == [
        str(number) for number in range(5, telemetry.REMEMBERED + 5)
    ]


def test_a_trace_tells_what_each_block_did_when(tmp_path: Path) -> None:
    zc.put(Slow().eval(), "slow")
    zarr.create_array(tmp_path / "x.zarr", data=np.ones((4, 3), np.float32), chunks=(2, 3))
    with telemetry.trace() as spans:
        zc.run("slow", tmp_path / "x.zarr", tmp_path / "y.zarr", batch_size=1, progress=False)
    of_block = [span for span in spans if span.where == "block 1"]
    assert [span.phase for span in of_block if span.phase in ("computing", "writing")] == ["computing"] * 2 + [
        "writing"
    ]
    assert all(a.end <= b.begin for a, b in itertools.pairwise(of_block))
    with telemetry.trace() as spans:
        pass
    zc.predict("slow", np.ones((1, 3), np.float32))
    assert not spans
