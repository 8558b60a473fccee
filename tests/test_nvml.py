"""What a driver says of cards, by the real nvidia-ml-py over a library that is built here: no card is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from nvml import build
from processes import wait_until

from zcinfer import nvml, sampling
from zcinfer.devicestate import GPU_COLUMNS
from zcinfer.nvml import FIGURES
from zcinfer.observer import Observer

pytest.importorskip("pynvml", reason="no package nvidia-ml-py (pip install 'zcinfer[gpu]')")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a driver's library."""
    folder = tmp_path_factory.mktemp("driver")
    build(folder, "fake_nvml.c")
    return folder


READ = """
import json, os, sys
from zcinfer import nvml
answers = []
for shown in json.loads(sys.argv[1]):
    os.environ.update({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})
    answers.append([nvml.present(), nvml.read()])
print(json.dumps(answers))
"""


def answers(driver: Path | None, *shown: str | None, **environment: str) -> list[tuple[bool, Any]]:
    """Whether there are cards, and what is told of them, for values of CUDA_VISIBLE_DEVICES."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    path = {"LD_LIBRARY_PATH": str(driver)} if driver is not None else {}
    ran = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(shown)],
        env=unset | path | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(present, found) for present, found in json.loads(ran.stdout)]


def test_each_figure_is_told_or_why_it_is_not(driver: Path) -> None:
    (_, every), (_, one), (_, mig), (none, _), (_, odd) = answers(
        driver, None, "GPU-plain", "MIG-instance", "", "7,GPU-gone"
    )
    plain, divided, forbidden = every
    figures = {
        "utilization": 73.0,
        "memory_busy": 41.0,
        "memory_used": 2e9,
        "memory_total": 80e9,
        "temperature": 61.0,
        "power": 312.5,
        "power_limit": 700.0,
        "clock": 1980.0,
        "clock_memory": 2619.0,
        "own_memory": 1234567890.0,
        "own_utilization": 40.0,
    }
    assert figures.keys() == FIGURES.keys()
    named = {"card": "0", "name": "Fake A", "uuid": "GPU-plain", "throttled": "power limit, temperature"}
    assert plain == figures | named
    # Asked for by its id, a second time: nothing ran since.
    assert one == [plain | {"card": "GPU-plain", "own_utilization": 0.0}]

    assert divided["utilization"] == divided["memory_busy"] == "unavailable: not told while the card is divided (MIG)"
    assert (divided["memory_total"], divided["power"]) == (80e9, 312.5)
    # Of an instance the memory is its own, the rest is the whole card's.
    (instance,) = mig
    assert (instance["memory_total"], instance["temperature"], instance["power"]) == (10e9, 61.0, 312.5)
    assert instance["utilization"] == "unavailable: not told while the card is divided (MIG)"

    assert forbidden["power"] == "unavailable: this user may not read it"
    assert forbidden["clock"].startswith("unavailable: GPU is lost")
    assert forbidden["utilization"] == 73.0
    assert forbidden["own_memory"].startswith("unavailable: the driver lists no process ")

    assert not none
    assert [card["card"] for card in odd] == ["7", "GPU-gone"]
    assert all(value.startswith("unavailable: ") for card in odd for value in (card[name] for name in FIGURES))


def test_a_driver_that_is_not_loaded_says_so(driver: Path) -> None:
    ((present, found),) = answers(driver, None, FAKE_NVML_INIT="9")
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
def client(driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A worker that sees the cards 0 and 2 of that driver."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))  # read once, when a process starts
    environment = {
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
        ("GPU-plain", 73.0),
        ("GPU-forbidden", 73.0),
    ]
    wait_until(lambda: "gpu" in next(iter(told()["history"].values())), 20)
    (history,) = told()["history"].values()
    assert [history[name][-1] for name in GPU_COLUMNS] == [73.0, 4e9]
    assert all(len(history[name]) == len(history["seconds"]) for name in GPU_COLUMNS)
