"""What the driver says of GPUs, with a driver library of ours, and what the environment shows of them."""

from __future__ import annotations

import json
from typing import Any

import nvml
import pytest
from nvml import FIRST, FOUND, SECOND, SPLIT, TWIN, WHOLE, uuids

from zcinfer.device import Device, Inventory
from zcinfer.errors import SettingsError


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [WHOLE, FIRST, SECOND, TWIN]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", [TWIN]),
        ("2,0", [TWIN, WHOLE]),
        ("2,-1,0", [TWIN]),  # what comes after one that is none does not count
        (" 2 , 9, 0", [TWIN]),
        ("GPU-a0a0f", [TWIN]),
        (SECOND, [SECOND]),
        ("1", [FIRST, SECOND]),
    ],
)
def test_what_the_environment_shows(variable: str | None, expected: list[str]) -> None:
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert uuids(FOUND.visible(environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})) == expected


def test_numbers_that_mean_other_cards_to_cuda_are_refused() -> None:
    mixed = Inventory((Device(0, WHOLE, "T4"), Device(1, TWIN, "H100")))
    with pytest.raises(SettingsError, match=r"counts the fastest card first.*H100, T4.*Set CUDA_DEVICE_ORDER"):
        mixed.visible({"CUDA_VISIBLE_DEVICES": "1"})
    ordered = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert uuids(mixed.visible(ordered)) == [TWIN]
    assert uuids(mixed.visible({"CUDA_VISIBLE_DEVICES": TWIN})) == [TWIN]


# --- with the driver library ---------------------------------------------------------------------------------------

SHOW = """
import json, dataclasses
from zcinfer.device import inventory
found = inventory()
shown = [(d.label, d.uuid, d.name, sorted(d.cpus), d.unbound) for d in found.devices]
print(json.dumps([shown, dict(found.split), dict(found.lost)]))
"""


def show(driver: dict[str, str], **environment: str) -> Any:
    return json.loads(nvml.run(SHOW, driver | environment))


def test_what_the_driver_says(driver: dict[str, str]) -> None:
    devices, split, lost = show(driver, FAKE_NVML_CPUS="1,8000000000000002")
    assert devices == [
        ["gpu0", WHOLE, "NVIDIA H100", [0], ""],
        ["gpu1-mig0", FIRST, "NVIDIA H100 MIG 1g.10gb", [1, 63], ""],
        ["gpu1-mig2", SECOND, "NVIDIA H100 MIG 1g.10gb", [1, 63], ""],
    ]
    assert (split, lost) == ({"1": SPLIT}, {})


def test_a_card_that_is_lost_takes_no_other_with_it(driver: dict[str, str]) -> None:
    fails = "nvmlDeviceGetHandleByIndex_v2@1=15,nvmlDeviceGetCpuAffinity@0=3,nvmlDeviceGetMigMode@0=3"
    devices, _, lost = show(driver, FAKE_NVML_FAIL=fails)
    assert devices == [["gpu0", WHOLE, "NVIDIA H100", [], "NVML does not say which are near (Not Supported)"]]
    assert lost == {"1": "GPU is lost"}
