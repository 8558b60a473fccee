"""What tests of GPUs that are not there share: the driver library of fake_driver.c, built and put where it is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from zcinfer.device import Device, Inventory

WHOLE = "GPU-a0a0a0a0-0000-0000-0000-000000000000"
THIRD = "GPU-c2c2c2c2-0000-0000-0000-000000000000"
SPLIT = "GPU-b1b1b1b1-0000-0000-0000-000000000000"
FIRST, SECOND = (f"MIG-b1b1b1b1-0000-0000-0000-00000000000{number}" for number in (0, 2))

# As the library has them, with a third card, and two that no process can be given
TWIN = "GPU-a0a0ffff-0000-0000-0000-000000000000"
FOUND = Inventory(
    (
        Device(0, WHOLE, "H100"),
        Device(1, FIRST, "H100 MIG", 0),
        Device(1, SECOND, "H100 MIG", 2),
        Device(2, TWIN, "H100"),
    ),
    {1: SPLIT, 4: "GPU-eeee"},
    {3: "GPU is lost"},
)


def uuids(devices: Iterable[Device]) -> list[str]:
    return [device.uuid for device in devices]


def build(directory: Path, *options: str) -> dict[str, str]:
    """Build the library, with options of the compiler; variables with which a process that is started then loads it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the driver's library with (Debian: apt-get install gcc)")
    source = Path(__file__).with_name("fake_driver.c")
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options]
    subprocess.run([compiler, *flags, "-o", directory / "libnvidia-ml.so.1", source], check=True)
    paths = [str(directory), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


def run(code: str, environment: dict[str, str]) -> str:
    """What a Python program prints that is started with these variables, and without CUDA's own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FAKE_NVML_"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
