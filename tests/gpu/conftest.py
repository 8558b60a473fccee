"""What tests on a GPU share: the reason why they cannot run, and a registry. Without Dask and Ray.

python -m pytest tests/gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zcinfer import catalog, lanes, loading


def why_not() -> str:
    """Why there is no GPU for tests, or ""."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no driver, or no card
        return f"CUDA cannot be used: {str(error).splitlines()[0]}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = why_not() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Path]:
    """An empty registry, the current one of this process; nothing is left on the device afterwards."""
    directory = tmp_path / "registry"
    catalog.connect(f"file:{directory}")
    yield directory
    catalog.disconnect()
    loading.residents.clear()
    lanes.lanes.clear()
    torch.cuda.empty_cache()
