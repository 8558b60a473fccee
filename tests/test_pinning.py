"""GPUs asked for by name: which workers there are, what is refused, and the CPUs near one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import nvml
import pytest
from nvml import FIRST, FOUND, SECOND, SPLIT, TWIN, WHOLE, uuids

from zcinfer import pinning
from zcinfer.errors import SettingsError
from zcinfer.pinning import Pinning, choose


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("all", [WHOLE, FIRST, SECOND, TWIN]),
        (0, [WHOLE]),
        ("2", [TWIN]),
        ([2, 0], [TWIN, WHOLE]),
        ((np.int64(2),), [TWIN]),
        ("0,2", [WHOLE, TWIN]),
        (WHOLE, [WHOLE]),
        ("GPU-a0a0f", [TWIN]),
        (f"0, {SECOND}", [WHOLE, SECOND]),
        ([SECOND, FIRST], [SECOND, FIRST]),
    ],
)
def test_what_is_asked_for(gpus: Any, expected: list[str]) -> None:
    assert uuids(choose(gpus, FOUND, {})) == expected


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (7, "there is no GPU 7 on this machine. Those that there are: 0 (H100, GPU-a0a0a0a0-"),
        ("GPU-77", "there is no GPU GPU-77"),
        ("MIG-77", "there is no GPU MIG-77"),
        ("GPU-a0a0", "several begin with GPU-a0a0: 0 (H100"),
        ([0, 0], "GPU 0 is given twice (0 is the same). For several processes on one GPU: jobs_per_gpu="),
        ([0, WHOLE], f"GPU {WHOLE} is given twice (0 is the same)"),
        (1, f"GPU 1 is in MIG mode, where a process gets one of its instances: name some of {FIRST}, {SECOND}"),
        (SPLIT, f"GPU {SPLIT} is in MIG mode"),
        (4, "it has none yet"),
        (3, "GPU 3 cannot be used: GPU is lost"),
    ],
)
def test_what_is_refused_by_name(gpus: Any, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose(gpus, FOUND, {})
    assert str(caught.value).startswith(f"gpus={gpus!r}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("gpus", [True, [True], 1.0, [], "", "0,,1", "first", -1, [0, "all"], b"0", {0: 1}, object()])
def test_what_names_no_gpu_is_refused_before_the_driver_is_asked(gpus: Any) -> None:
    with pytest.raises(SettingsError, match="give 'all', or name GPUs"):
        Pinning.of(gpus, 1)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_numbers_of_jobs_that_are_none(jobs: Any) -> None:
    with pytest.raises(SettingsError, match=r"jobs_per_gpu is .*give the number"):
        Pinning.of("all", jobs)


def test_jobs_without_gpus() -> None:
    assert Pinning.of(None, 1) is None
    with pytest.raises(SettingsError, match="jobs_per_gpu=2 needs GPUs"):
        Pinning.of(None, 2)


def test_what_the_environment_hides_is_refused_by_name() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "2"}
    assert uuids(choose("all", FOUND, environment)) == [TWIN]
    assert uuids(choose(2, FOUND, environment)) == [TWIN]
    with pytest.raises(SettingsError, match=rf"GPU 0 is hidden .* CUDA_VISIBLE_DEVICES='2'\. Name one .*{TWIN}"):
        choose([2, 0], FOUND, environment)
    with pytest.raises(SettingsError, match=r"CUDA_VISIBLE_DEVICES='' hides all GPUs of this machine \(0 \(H100"):
        choose("all", FOUND, {"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(SettingsError, match="there is none"):
        choose(0, FOUND, {"CUDA_VISIBLE_DEVICES": ""})


def test_names_environment_and_resources_of_workers() -> None:
    workers = Pinning((FOUND.devices[0], FOUND.devices[2]), 2).workers("10.0.0.2-")
    # Scaled down from the end, both keep one
    assert list(workers) == [
        f"10.0.0.2-{name}" for name in ("gpu0-job0", "gpu1-mig2-job0", "gpu0-job1", "gpu1-mig2-job1")
    ]
    assert workers["10.0.0.2-gpu1-mig2-job1"] == {
        "name": "10.0.0.2-gpu1-mig2-job1",
        "env": {"CUDA_VISIBLE_DEVICES": SECOND, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        "resources": {"GPU": 0.5},
    }


def test_the_environment_of_a_birth_is_not_taken_for_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    before = dict(os.environ)
    with pinning.starting_with({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "x"}):
        assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1", "x")
        assert pinning.own_environment() == before
    assert dict(os.environ) == before == pinning.own_environment()


# --- with the driver library ---------------------------------------------------------------------------------------

REFUSED = """
import json, os
from zcinfer.errors import SettingsError
from zcinfer.pinning import Pinning
for environment in json.loads(os.environ.get("TRIED", "[{}]")):
    os.environ.update(environment)
    try:
        Pinning.of("all", 1)
    except SettingsError as error:
        print(error)
    for name in environment:
        del os.environ[name]
"""


def test_all_of_none(driver: dict[str, str]) -> None:
    tried = [
        {"FAKE_NVML_FAIL": "nvmlInitWithFlags=9"},
        {"FAKE_NVML_CARDS": "0"},
        {"FAKE_NVML_FAIL": "nvmlDeviceGetHandleByIndex_v2=15"},
    ]
    expected = [
        "NVML cannot be used (Driver Not Loaded)",
        "the driver shows none",
        "GPU 0: GPU is lost; GPU 1: GPU is lost",
    ]
    told = nvml.run(REFUSED, driver | {"TRIED": json.dumps(tried)}).splitlines()
    for line, said in zip(told, expected, strict=True):
        assert line.startswith(f"no NVIDIA GPU was found: {said}. Leave out gpus= (--gpus) to compute on the CPU")


def test_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert "pip install 'zcinfer[gpu]'" in nvml.run(REFUSED, {"PYTHONPATH": path})


BIND = """
import os, threading
from zcinfer.pinning import bind_to_device
ready, end = threading.Event(), threading.Event()
def other():
    ready.wait()
    print(sorted(os.sched_getaffinity(0)))
thread = threading.Thread(target=other)
thread.start()
cpus, reason = bind_to_device()
ready.set()
thread.join()
print(sorted(os.sched_getaffinity(0)), sorted(cpus), reason)
"""


def test_all_threads_keep_to_the_cpus_near_the_gpu(driver: dict[str, str]) -> None:
    cpu = max(os.sched_getaffinity(0))
    mask = f"0,{1 << cpu:x}"
    told = nvml.run(BIND, driver | {"CUDA_VISIBLE_DEVICES": f"{SECOND},{FIRST}", "FAKE_NVML_CPUS": mask})
    assert told == f"[{cpu}]\n[{cpu}] [{cpu}] \n"


UNBOUND = """
import json, os
from zcinfer.pinning import bind_to_device
before = os.sched_getaffinity(0)
for environment in json.loads(os.environ["TRIED"]):
    os.environ.update(environment)
    cpus, reason = bind_to_device()
    assert (set(cpus), os.sched_getaffinity(0)) == (set(), before)
    print(reason)
    for name in environment:
        del os.environ[name]
"""


def test_where_nothing_is_near_nothing_is_changed(driver: dict[str, str]) -> None:
    tried = [
        {},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "9"},
        {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_CPUS": "0"},
        {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_CPUS": "8000000000000000"},
        {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_FAIL": "nvmlInitWithFlags=9"},
    ]
    told = nvml.run(UNBOUND, driver | {"TRIED": json.dumps(tried)}).splitlines()
    assert told[:5] == [
        "",
        "",
        "NVML knows no GPU of CUDA_VISIBLE_DEVICES='9'",
        "NVML does not say which are near",
        "this process may not use CPUs 63, which are near it",
    ]
    assert "(Driver Not Loaded)" in told[5]
