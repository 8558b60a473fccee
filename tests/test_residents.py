"""Residents on a device: bounded by its memory, the least recently used out first, and never one that is in use.

Built on torch's device "meta", which is none that holds bytes; the memory is told by the tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zcinfer import config, device_memory, loading
from zcinfer.errors import SettingsError
from zcinfer.publishing import put
from zcinfer.residents import Residents
from zcinfer.store import ModelRef

Device = torch.device


class Memory:
    """Of a device: how much models may take, and which were built there."""

    def __init__(self, most: float):
        self.most = most
        self.built: list[str] = []
        self.held: list[int] = []
        self.fails = 0

    def residents(self, limit: int = 10) -> Residents:
        return Residents(self.build, limit, self.budget)

    def build(self, ref: ModelRef, device: str, training: str) -> loading.Resident:
        if self.fails:
            self.fails -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.built.append(ref.name)
        return loading.Resident(ref, device, training)

    def budget(self, device: Device, held: int) -> float:
        self.held.append(held)
        return self.most if device.type == "meta" else float("inf")


@pytest.fixture
def refs(registry: Path) -> list[ModelRef]:
    return [put(torch.nn.Linear(1000, width).eval(), f"m{width}") for width in (10, 11, 12)]


def use(residents: Residents, ref: ModelRef, device: str = "meta") -> None:
    with residents.lend(ref, device, "refuse") as model:
        assert next(model.parameters()).device.type == device


def test_the_least_recently_used_go_first(refs: list[ModelRef]) -> None:
    memory = Memory(2.5 * refs[1].nbytes)
    residents = memory.residents()
    for number in (0, 1, 0, 2, 0, 1):
        use(residents, refs[number])
    assert memory.built == ["m10", "m11", "m12", "m11"]
    assert memory.held == [0, refs[0].nbytes, refs[0].nbytes + refs[1].nbytes, refs[0].nbytes + refs[2].nbytes]


def test_room_is_made_before_the_next_is_built(refs: list[ModelRef]) -> None:
    memory = Memory(1.5 * refs[1].nbytes)
    residents = memory.residents()
    use(residents, refs[0])
    held: list[int] = []
    build = memory.build
    residents._build = lambda *given: held.append(sum(residents._held.values())) or build(*given)
    use(residents, refs[1])
    assert held == [0]


def test_one_in_use_never_goes(refs: list[ModelRef]) -> None:
    memory = Memory(0)
    residents = memory.residents()
    with residents.lend(refs[0], "meta", "refuse") as lent:
        use(residents, refs[1])
        assert all(parameter.shape for parameter in lent.parameters())
    with residents.lend(refs[0], "meta", "refuse") as again:
        assert again is lent  # what was used last is kept in any case
    assert memory.built == ["m10", "m11"]


def test_memory_that_others_took_counts_at_the_next_build(refs: list[ModelRef]) -> None:
    memory = Memory(float("inf"))
    residents = memory.residents()
    use(residents, refs[0])
    use(residents, refs[1])
    memory.most = 0
    use(residents, refs[2])
    assert residents._held[Device("meta")] == refs[2].nbytes


def test_another_device_is_left_alone(refs: list[ModelRef]) -> None:
    memory = Memory(0)
    residents = memory.residents()
    use(residents, refs[0], "cpu")
    use(residents, refs[1])
    use(residents, refs[2])
    use(residents, refs[0], "cpu")
    assert memory.built == ["m10", "m11", "m12"]


def test_what_failed_or_was_written_to_holds_nothing(refs: list[ModelRef]) -> None:
    memory = Memory(float("inf"))
    residents = memory.residents()
    with pytest.raises(ValueError, match="in the block"), residents.lend(refs[0], "meta", "refuse"):
        raise ValueError("in the block")
    with residents.lend(refs[0], "meta", "refuse") as model:
        model.added = 1
    assert residents._held[Device("meta")] == 0


def test_a_full_device_has_all_that_nobody_uses_go_once(refs: list[ModelRef]) -> None:
    memory = Memory(float("inf"))
    residents = memory.residents()
    use(residents, refs[0])
    memory.fails = 1
    use(residents, refs[1])
    assert residents._held[Device("meta")] == refs[1].nbytes
    memory.fails = 2
    with pytest.raises(torch.OutOfMemoryError):
        use(residents, refs[2])
    memory.fails = 1
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to go
        use(residents, refs[2])
    assert residents._held[Device("meta")] == 0


def test_the_budget_is_a_share_of_what_is_free_and_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    cuda = Device("cuda", 0)
    assert device_memory.budget(cuda, held=100) == 0.5 * (600 + 100 + 100)
    with config._dask_config.set({"zcinfer.gpu.residents": 0.25, "zcinfer.jobs": 2}):
        assert device_memory.budget(cuda, held=100) == 0.25 * (600 + 100 + 100) / 2
    with (
        config._dask_config.set({"zcinfer.gpu.residents": 0}),
        pytest.raises(SettingsError, match=r"gpu.residents is '0': it must be a share"),
    ):
        device_memory.budget(cuda, held=0)
