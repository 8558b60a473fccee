"""What a snapshot tells for the page: which jobs a device has, and which predictions were submitted together."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client, Event, wait
from numpy.typing import NDArray
from processes import wait_until
from torch import nn

import zcinfer as zc

pytestmark = pytest.mark.usefixtures("registry")


def held(block: NDArray[Any], event: str) -> NDArray[Any]:
    Event(event).wait("60s")
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
