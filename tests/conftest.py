"""What all tests share: a registry and a state directory of their own, real stores, and a watch for leftovers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest

from zcinfer import catalog, loading


@pytest.fixture(scope="session", autouse=True)
def _own_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's models, and no child process of a test does."""
    state = tmp_path_factory.mktemp("state")
    names = {"DASK_ZCINFER__REGISTRY": str(state / "registry"), "XDG_STATE_HOME": str(state), "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    with dask.config.set({"zcinfer.registry": names["DASK_ZCINFER__REGISTRY"]}):
        yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Path]:
    """An empty registry, the current one of this process, without Ray."""
    directory = tmp_path / "registry"
    with dask.config.set({"zcinfer.registry": str(directory)}):
        catalog.connect(f"file:{directory}")
        yield directory
        catalog.disconnect()
        loading.residents.clear()
