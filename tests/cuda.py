"""What tests of shared GPU memory use where there is no GPU: cards over the driver library of fake_cuda.c."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from processes import living, wait_until

from zcinfer import cuda_driver
from zcinfer.device_sharing import Card

Make = Callable[..., Card]


def build(directory: Path) -> Path:
    """The library, in a directory that can be put into LD_LIBRARY_PATH."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the driver's library with (Debian: apt-get install gcc)")
    library = directory / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name, as a socket's path must be; its owner is ended after the test."""
    with tempfile.TemporaryDirectory(prefix="zc-") as directory:
        yield Path(directory)
        for pid in owners(Path(directory)):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not owners(Path(directory)))


def owners(place: Path) -> list[int]:
    """Processes that own a card by a socket in that directory."""
    found = []
    for process in living(psutil.process_iter()):
        try:
            if any(part.startswith(str(place)) for part in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def make(library: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make the card as one job sees it; several have connections of their own, as jobs have."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda_driver._driver.cache_clear()
    made: list[Card] = []

    def one(share: float = 0.5) -> Card:
        made.append(Card(torch.device("cpu"), share, place))
        return made[-1]

    yield one
    for card in made:
        card.close()
    cuda_driver._driver.cache_clear()
