"""What the tests of all kinds share: torch on one thread, and its warnings of what it means to change pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TORCHS_OWN = [
    "Sparse .* tensor support:UserWarning",
    "The PyTorch API of nested tensors:UserWarning",
    ".*weight_norm.* is deprecated:FutureWarning",
    ".*quantize.*:UserWarning",
    ".*torch.ao.quantization is deprecated:DeprecationWarning",
    ".*torch.jit.*:DeprecationWarning",
    "Sparse invariant checks are implicitly disabled:UserWarning",
    "Full backward hook is firing:UserWarning",
    "`NLLLoss2d` has been deprecated:FutureWarning",
    "Lazy modules are a new feature:UserWarning",
    "TypedStorage is deprecated:UserWarning",
    "LSTM with projections:UserWarning",
    "ComplexHalf support is experimental:UserWarning",
    "Complex modules are a new feature:UserWarning",
    "Initializing zero-element tensors:UserWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for message in TORCHS_OWN:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"), append=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More would only wait for one another: no model here is large."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
