"""Residents: what comes back unchanged is used again, what was written to is not, and nothing else is different."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zcinfer import loading, memory, parts
from zcinfer.errors import SettingsError
from zcinfer.predictor import Predictor
from zcinfer.publishing import load, put
from zcinfer.sharing import written_pages


class Stateful(torch.nn.Module):
    """Adds one to a state of its own at every call, in one of many ways, and gives it."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.plain = torch.zeros(1)
        self.listed = [torch.zeros(1)]
        self.count = 0.0
        self.register_buffer("buffer", torch.zeros(1))
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.way:
            case "buffer":
                self.buffer += 1
                state = self.buffer
            case "buffer.data":
                self.buffer.data.add_(1)
                state = self.buffer
            case "buffer by numpy":
                self.buffer.numpy()[:] += 1
                state = self.buffer
            case "new buffer":
                self.buffer = self.buffer + 1
                state = self.buffer
            case "parameter":
                self.weight.data.add_(1)
                state = self.weight
            case "plain tensor":
                self.plain.add_(1)
                state = self.plain
            case "tensor in a list":
                self.listed[0].add_(1)
                state = self.listed[0]
            case "number":
                self.count += 1.0
                state = torch.tensor([self.count])
            case _:
                state = self.buffer
        return x[:, :1] * 0 + state.detach().clone()


WAYS = [
    "buffer",
    "buffer.data",
    "buffer by numpy",
    "new buffer",
    "parameter",
    "plain tensor",
    "tensor in a list",
    "number",
]


@pytest.mark.parametrize("training", ["refuse", "keep"])
@pytest.mark.parametrize("way", WAYS)
def test_every_block_meets_the_model_as_published(way: str, training: str, registry: Path) -> None:
    put(Stateful(way).eval(), "stateful")
    predictor = Predictor("stateful", batch_size=8, training=training)
    block = np.zeros((4, 2), np.float32)
    assert [float(predictor(block)[0, 0]) for _ in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("counted", [True, False])
def test_pages_are_looked_at_only_after_a_fault(counted: bool, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not counted:  # as on a system that does not count them
        monkeypatch.setattr(memory, "_counts_faults", lambda: False)
    resident = loading.Resident(put(Stateful("nothing").eval(), "stateful"), "cpu", "refuse")
    looks: list[int] = []
    monkeypatch.setattr(loading, "written_pages", lambda buffer: looks.append(written_pages(buffer)) or looks[-1])
    unchanged = [resident.is_unchanged(memory.page_faults()) for _ in range(20)]
    assert all(unchanged)
    assert len(looks) < 10 if counted else len(looks) == 20
    faults = memory.page_faults()
    resident.model.buffer.data.add_(1)
    assert not resident.is_unchanged(faults)
    assert looks[-1] == 1


def test_it_is_told_once(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(Stateful("buffer").eval(), "stateful")
    loading.residents._told.clear()
    predictor = Predictor("stateful", batch_size=8)
    with caplog.at_level(logging.WARNING, "zcinfer"):
        for _ in range(3):
            predictor(np.zeros((4, 2), np.float32))
    assert caplog.text.count("stateful@1 wrote to its own") == 1


def test_an_unchanged_module_is_used_again(registry: Path) -> None:
    ref = put(Stateful("not at all").eval(), "steady")
    with loading.residents.lend(ref, "cpu", "refuse") as first:
        first(torch.zeros(2, 2))
    with loading.residents.lend(ref, "cpu", "refuse") as second:
        assert second is first


def test_two_threads_get_two_modules(registry: Path) -> None:
    ref = put(Stateful("not at all").eval(), "steady")
    with loading.residents.lend(ref, "cpu", "refuse") as one, loading.residents.lend(ref, "cpu", "refuse") as other:
        assert one is not other


def test_a_module_is_not_used_again_after_an_error(registry: Path) -> None:
    ref = put(Stateful("not at all").eval(), "steady")
    with (
        pytest.raises(ValueError, match="in the block"),
        loading.residents.lend(ref, "cpu", "refuse") as first,
    ):
        raise ValueError("in the block")
    with loading.residents.lend(ref, "cpu", "refuse") as second:
        assert second is not first


def test_a_module_lost_to_an_error_does_not_disturb_the_others(registry: Path) -> None:
    refs = [put(torch.nn.Linear(2, width).eval(), f"m{width}") for width in (1, 2, 3, 4)]
    few = loading.Residents(loading.Resident, limit=2)
    with few.lend(refs[0], "cpu", "refuse"):
        pass
    with pytest.raises(ValueError, match="in the block"), few.lend(refs[0], "cpu", "refuse"):
        raise ValueError("in the block")
    for ref in refs[1:]:
        with few.lend(ref, "cpu", "refuse"):
            pass


def test_the_least_recently_used_go_first(registry: Path) -> None:
    refs = [put(torch.nn.Linear(2, width).eval(), f"m{width}") for width in (1, 2, 3)]
    few = loading.Residents(loading.Resident, limit=2)
    built = []
    for ref in refs:
        with few.lend(ref, "cpu", "refuse") as model:
            built.append(model)
    with few.lend(refs[2], "cpu", "refuse") as last, few.lend(refs[0], "cpu", "refuse") as first:
        assert last is built[2]
        assert first is not built[0]


@pytest.mark.parametrize(
    ("device", "message"), [("warp", "device is 'warp'"), ("cuda:99", "cannot be moved to cuda:99")]
)
def test_a_device_that_is_not_there_is_refused(registry: Path, device: str, message: str) -> None:
    put(torch.nn.Linear(2, 2), "model")
    with pytest.raises(SettingsError, match=message):
        load("model", device)


def test_threads_that_load_at_once_import_the_code_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Modules that import each other, the first of them slowly: two threads would each get a half of the package.
    package = tmp_path / "halves"
    package.mkdir()
    (package / "__init__.py").write_text("from . import slow\nanswer = 42\nfrom .layer import Layer\n")
    (package / "slow.py").write_text("import time\ntime.sleep(0.3)\n")
    (package / "layer.py").write_text(
        "import torch\nfrom halves import answer\n"
        "class Layer(torch.nn.Module):\n    def forward(self, x):\n        return x + answer\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    ref = put(importlib.import_module("halves").Layer().eval(), "layer")
    for name in [name for name in sys.modules if name.partition(".")[0] == "halves"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(parts, "_at_home", set())
    together = threading.Barrier(2)

    def load(_: int) -> Any:
        together.wait()
        return loading.load_ref(ref)(torch.zeros(1)).item()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(load, range(2))) == [42, 42]
