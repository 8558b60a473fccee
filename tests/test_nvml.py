"""What a driver says of cards, by the real nvidia-ml-py over a library that is built here: no card is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from nvml import FIRST, THIRD, WHOLE, build, run
from processes import wait_until

from zcinfer import nvml, sampling
from zcinfer.devicestate import GPU_COLUMNS
from zcinfer.nvml import FIGURES
from zcinfer.observer import Observer

pytest.importorskip("pynvml", reason="no package nvidia-ml-py (pip install 'zcinfer[gpu]')")

# Three cards: the second is divided (MIG), the third tells this user little.
THREE = {
    "FAKE_NVML_CARDS": "3",
    "FAKE_NVML_FAIL": "nvmlDeviceGetPowerUsage@2=4,nvmlDeviceGetClockInfo@2=15,nvmlDeviceGetMigMode@2=3",
}

READ = """
import json, os
from zcinfer import nvml
answers = []
for shown in json.loads(os.environ["SHOWN"]):
    os.environ.update({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})
    answers.append([nvml.present(), nvml.read()])
print(json.dumps(answers))
"""


def answers(driver: dict[str, str], *shown: str | None) -> list[tuple[bool, Any]]:
    """Whether there are cards, and what is told of them, for values of CUDA_VISIBLE_DEVICES."""
    return [(present, found) for present, found in json.loads(run(READ, driver | {"SHOWN": json.dumps(shown)}))]


@pytest.mark.parametrize("options", [[], ["-DOLDER"]], ids=["newer", "older"])
def test_each_figure_is_told_or_why_it_is_not(options: list[str], tmp_path: Path) -> None:
    (_, every), (_, one), (_, mig), (none, _), (_, odd) = answers(
        build(tmp_path, *options) | THREE, None, WHOLE, FIRST, "", "7,GPU-gone"
    )
    plain, divided, forbidden = every
    figures = {
        "utilization": 50.0,
        "memory_busy": 20.0,
        "memory_used": float(1 << 30),
        "memory_total": float(80 << 30),
        "temperature": 60.0,
        "power": 300.0,
        "power_limit": 700.0,
        "clock": 1501.0,
        "clock_memory": 1502.0,
        "own_memory": 1234567890.0,
        "own_utilization": 40.0,
    }
    assert figures.keys() == FIGURES.keys()
    named = {"card": "0", "name": "NVIDIA H100", "uuid": WHOLE, "throttled": "power limit, temperature"}
    assert plain == figures | named
    # Asked for by its id, a second time: nothing ran since.
    assert one == [plain | {"card": WHOLE, "own_utilization": 0.0}]

    assert divided["utilization"] == divided["memory_busy"] == "unavailable: not told while the card is divided (MIG)"
    assert (divided["memory_total"], divided["power"]) == (80 << 30, 301.0)
    # Of an instance the memory is its own, the rest is the whole card's.
    (instance,) = mig
    assert (instance["memory_total"], instance["temperature"], instance["power"]) == (10 << 30, 61.0, 301.0)
    assert instance["utilization"] == "unavailable: not told while the card is divided (MIG)"

    assert forbidden["power"] == "unavailable: this user may not read it"
    assert forbidden["clock"].startswith("unavailable: GPU is lost")
    assert forbidden["utilization"] == 52.0
    assert forbidden["own_memory"].startswith("unavailable: the driver lists no process ")

    assert not none
    assert [card["card"] for card in odd] == ["7", "GPU-gone"]
    assert all(value.startswith("unavailable: ") for card in odd for value in (card[name] for name in FIGURES))


def test_a_driver_that_is_not_loaded_says_so(driver: dict[str, str]) -> None:
    ((present, found),) = answers(driver | {"FAKE_NVML_FAIL": "nvmlInitWithFlags=9"}, None)
    assert present
    assert found == "unavailable: Driver Not Loaded"


def test_without_a_driver_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    if nvml.present():
        pytest.skip("this machine has a driver of NVIDIA's")
    monkeypatch.setattr(nvml, "read", lambda: pytest.fail("asked"))
    sampling.start("tcp://none")
    try:
        names = {thread.name for thread in threading.enumerate()}
        assert "zcinfer-stores" in names
        assert "zcinfer-nvml" not in names
        assert "gpus" not in sampling.latest()
    finally:
        sampling.stop()


def test_an_answer_that_grew_old_is_none() -> None:
    release = threading.Event()
    asked = []

    def look() -> str:
        asked.append(1)
        if len(asked) > 1:
            release.wait(60)
        return "fresh"

    sampler = sampling.Sampler("test", look, 0.02)
    sampler.start()
    try:
        sampler.wait(10)
        wait_until(lambda: str(sampler.latest).startswith("unavailable: no answer for "), 10)
    finally:
        release.set()
        sampler.stop()


def test_what_fails_is_told() -> None:
    sampler = sampling.Sampler("test", lambda: 1 / 0, 60)
    sampler.start()
    sampler.wait(10)
    assert sampler.latest == "unavailable: ZeroDivisionError: division by zero"
    sampler.stop()


@pytest.fixture
def client(driver: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A worker that sees the cards 0 and 2 of that driver."""
    monkeypatch.setenv("LD_LIBRARY_PATH", driver["LD_LIBRARY_PATH"])  # read once, when a process starts
    environment = THREE | {
        "FAKE_NVML_CPUS": "0",  # the worker keeps all of them
        "CUDA_VISIBLE_DEVICES": "0,2",
        "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "false",
    }
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options, preload=["zcinfer.worker"], env=environment) as cluster, Client(cluster) as client:
        client.register_plugin(Observer())
        yield client


@pytest.mark.slow
def test_cards_ride_on_the_heartbeat_and_have_a_history(client: Client) -> None:
    def told() -> dict[str, Any]:
        return dict(client.sync(client.scheduler.zcinfer_snapshot))

    wait_until(lambda: any(device["gpus"] for device in told()["devices"]), 20)
    (device,) = told()["devices"]
    assert [(card["uuid"], card["utilization"]) for card in device["gpus"]] == [
        (WHOLE, 50.0),
        (THIRD, 52.0),
    ]
    wait_until(lambda: "gpu" in next(iter(told()["history"].values())), 20)
    (history,) = told()["history"].values()
    assert [history[name][-1] for name in GPU_COLUMNS] == [51.0, 4 << 30]
    assert all(len(history[name]) == len(history["seconds"]) for name in GPU_COLUMNS)
