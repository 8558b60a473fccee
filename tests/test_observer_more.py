"""What a snapshot tells for the page: which jobs a device has, and which predictions were submitted together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client, Event, wait
from numpy.typing import NDArray
from processes import wait_until
from torch import nn

import zcinfer as zc
from zcinfer.jobstate import JobState
from zcinfer.observer import ENDED, Observer
from zcinfer.telemetry import PHASES, REMEMBERED, Job

pytestmark = pytest.mark.usefixtures("registry")


def held_or_refused(block: NDArray[Any], event: str) -> NDArray[Any]:
    if (block == -1).any():
        raise ValueError("refused")
    return held(block, event)


def held(block: NDArray[Any], event: str) -> NDArray[Any]:
    if not Event(event).wait("60s"):
        raise TimeoutError(event)
    return block


def snapshot(client: Client) -> dict[str, Any]:
    return dict(client.sync(client.scheduler.zcinfer_snapshot))


def test_a_device_tells_the_jobs_it_has(client: Client) -> None:
    zc.put(nn.Linear(3, 1).eval(), "held")
    x = da.from_array(np.ones((40, 3), np.float32), chunks=(10, 3)).map_blocks(
        held, event="go", meta=np.empty((0, 0), np.float32)
    )
    y = zc.predict("held", x, batch_size=10)
    before = {job["number"] for job in snapshot(client)["jobs"]}
    future = client.compute(y)
    wait_until(lambda: sum(device["running"] for device in snapshot(client)["devices"]) == 4)
    (job,) = [job for job in snapshot(client)["jobs"] if job["number"] not in before]
    assert [list(device["jobs"]) for device in snapshot(client)["devices"]] == [[job["job"]]] * 2
    Event("go", client=client).set()
    wait(future)
    wait_until(lambda: not any(device["running"] for device in snapshot(client)["devices"]))
    # A device is still said to work for what it has just had; its heartbeat tells that it had it.
    wait_until(lambda: {name for device in snapshot(client)["devices"] for name in device["jobs"]} == {job["job"]})


def test_what_is_submitted_together_is_told_together(client: Client) -> None:
    zc.put(nn.Linear(3, 1).eval(), "held")
    x, z = (da.from_array(np.full((10, 3), value, np.float32)) for value in (1, 2))
    before = {job["submission"] for job in snapshot(client)["jobs"]}
    da.concatenate([zc.predict("held", array, batch_size=10) for array in (x, z)]).compute()
    zc.predict("held", x + 1, batch_size=10).compute()
    numbers = [job["submission"] for job in snapshot(client)["jobs"] if job["submission"] not in before]
    assert len(numbers) == 3
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_job_that_failed_has_ended_though_its_result_is_held(client: Client) -> None:
    zc.put(nn.Linear(3, 1).eval(), "held")
    x = np.ones((40, 3), np.float32)  # a block for each thread, so that the bad one is not behind those that wait
    x[0] = -1
    arrays = da.from_array(x, chunks=(10, 3)).map_blocks(
        held_or_refused, event="later", meta=np.empty((0, 0), np.float32)
    )
    future = client.compute(zc.predict("held", arrays, batch_size=10))
    wait(future)
    wait_until(lambda: snapshot(client)["jobs"][-1]["ended"] is not None)
    job = snapshot(client)["jobs"][-1]
    assert (job["state"], job["failed"], job["cancelled"]) == ("failed", 1, 3)
    Event("later", client=client).set()


def test_what_is_known_does_not_grow_with_jobs_and_models() -> None:
    """A scheduler lives for months: it remembers of a process what that remembers itself."""
    observer, worker = Observer(), SimpleNamespace(name="w", host="here", metrics={})
    observer.scheduler = SimpleNamespace(workers={"tcp://here:1": worker})
    zeros = dict.fromkeys(("rows", "blocks", "batches", "bytes_in", "bytes_out", "errors", "halved"), 0)
    for number in range(5 * REMEMBERED):
        work = {"job": f"job{number}", "model": f"m@{number}", "seconds": [0.0] * len(PHASES)} | zeros | {"rows": 1}
        worker.metrics["zcinfer"] = {
            "epoch": "a", "time": number + 1.0, "private": 0, "shared": 0, "failures": [], "work": [work],
            "loads": [{"model": f"m@{number}"}],
        }  # fmt: skip
        observer.sample()
        state = JobState(0, Job(f"job{number}", "a job"), [], {}, 0, 0.0)
        state.ended = 1.0
        observer.keep(state)
    (device,) = observer.devices.values()
    assert device.totals[0] == 5 * REMEMBERED
    assert list(device._last) == [(f"job{n}", f"m@{n}") for n in range(4 * REMEMBERED, 5 * REMEMBERED)]
    assert len(observer.models) == 2 * REMEMBERED
    assert len(observer.sums) <= ENDED + 2
    assert len(observer.others) <= REMEMBERED
    assert len(observer.jobs) <= ENDED + 2
