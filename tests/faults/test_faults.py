"""Ten jobs through faults, at seeded moments; a hundred by `make faults`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import namespaces
from strikes import FAULTS

HARNESS = Path(__file__).with_name("harness.py")
NAMES = [fault.name for fault in FAULTS if fault.quick]


def why_not() -> str:
    """Why namespaces cannot be made here."""
    try:
        return subprocess.run([*namespaces(), "true"], capture_output=True, text=True).stderr
    except FileNotFoundError as error:
        return f"{error.filename} is missing (Debian: util-linux)"


pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(HARNESS), "--runs", str(len(NAMES)), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(NAMES), done.stdout + done.stderr
    return {run["fault"]: run for run in found}


@pytest.mark.parametrize("fault", NAMES)
def test_the_output_is_that_of_the_undisturbed_job(runs: dict[str, dict[str, Any]], fault: str) -> None:
    assert not runs[fault]["wrong"]
    # What ends the job itself is the only thing that it does not go on from by itself
    ends = any(name in fault for name in ("client", "scheduler", "disk", "cut off"))
    assert runs[fault]["survived"] != ends
