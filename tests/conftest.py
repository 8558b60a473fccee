"""What all tests share: a registry of their own, and a watch for what they leave behind or pass over."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import dask
import nvml
import psutil
import pytest
from cuda import library, make, place  # noqa: F401, fixtures
from distributed import Client
from processes import living, orphaned_shared_memory, wait_until

import zcinfer as zc
from zcinfer import catalog, loading


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI what a test skips for want of something is a failure; only GPUs may be missing."""
    report = yield
    passed_over = report.skipped and not hasattr(report, "wasxfail")
    if passed_over and os.environ.get("ZCINFER_STRICT") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure under ZCINFER_STRICT: {report.longrepr}"
    return report


def pytest_collection_finish() -> None:
    """What is imported by now stays: a full collection would look at all of it again, for most of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """A module's tests leave no process running and no file in shared memory."""
    processes = {process.pid for process in psutil.Process().children(recursive=True)}
    shared = orphaned_shared_memory()
    yield
    wait_until(lambda: not _left(processes), 20)
    wait_until(lambda: orphaned_shared_memory() <= shared, 20)


def _left(before: set[int]) -> list[psutil.Process]:
    # Python's own tracker of semaphores lives as long as the process that needed it.
    return [
        process
        for process in living(psutil.Process().children(recursive=True))
        if process.pid not in before and "multiprocessing.resource_tracker" not in " ".join(process.cmdline())
    ]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Path]:
    """An empty registry, the current one of this process, without Ray."""
    directory = tmp_path / "registry"
    with dask.config.set({"zcinfer.registry": str(directory)}):
        catalog.connect(f"file:{directory}")
        yield directory
        catalog.disconnect()
        loading.residents.clear()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A cluster of two workers; the environment that its Ray sets goes with it."""
    before = dict(os.environ)
    with zc.LocalCluster(n_workers=2) as cluster, cluster.get_client() as client:
        yield client
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which a process finds two GPUs that are not there: those of fake_driver.c."""
    return nvml.build(tmp_path_factory.mktemp("driver"))
