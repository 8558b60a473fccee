"""What all tests share: a registry and a state directory of their own, real stores, and a watch for leftovers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask
import pytest

from zcinfer import catalog, loading


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Path]:
    """An empty registry, the current one of this process, without Ray."""
    directory = tmp_path / "registry"
    with dask.config.set({"zcinfer.registry": str(directory)}):
        catalog.connect(f"file:{directory}")
        yield directory
        catalog.disconnect()
        loading.residents.clear()
