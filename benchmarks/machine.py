"""Where, when and with what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dask.system import cpu_count

PACKAGES = ("zcinfer", "torch", "ray", "numpy", "dask", "distributed", "transformers", "safetensors")
ROOT = Path(__file__).resolve().parents[1]  # of a checkout


def machine() -> dict[str, Any]:
    """Facts that a figure means little without; memory in bytes.

    Examples
    --------
    >>> found = machine()
    >>> found["cores"] >= 1, "torch" in found["packages"]
    (True, True)
    """
    cores = cpu_count()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {cores} core{'s' if cores > 1 else ''} for this process",
        "cores": cores,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "commit": commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def commit() -> str:
    """Commit of the checkout that this runs from, and whether files differ from it; "unknown" where it is none."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        return f"{found} with changes" if _git("status", "--porcelain") else found
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
