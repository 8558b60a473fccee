"""Models that go to a device whole are, there, what ``model.to`` makes of them."""

from __future__ import annotations

import copy
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sides import Late
from torch import nn

from zcinfer import loading
from zcinfer.parts import join
from zcinfer.placement import layout
from zcinfer.publishing import put
from zcinfer.store import Fetched, ModelRef
from zcinfer.stores import open_store
from zcinfer.transfer import PinnedSlots
from zcinfer.upload import move

CPU = torch.device("cpu")


class Odd(nn.Module):
    """Ties, views, strides, dtypes, an empty tensor, a tensor and an array that no module moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(40, 7).t())
        self.small = nn.Parameter(torch.randn(3, 5).to(torch.bfloat16), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0, 4))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("row", self.embed.weight.detach()[3])
        self.register_buffer("wide", torch.arange(4.0).expand(3, 4))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.rand(50) > 0.5, persistent=False)
        self.register_buffer("turn", torch.randn(6, dtype=torch.complex64))
        self.register_buffer("again", self.count)
        self.plain = torch.randn(2000)
        self.array = np.arange(5000.0)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.embed(x))) + self.scalar + self.plain[0] + self.row[0]
        return result


class WithAWayOfItsOwn(nn.Module):
    """Moves a tensor that is no parameter, and notes that it was moved."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 4)
        self.table = torch.randn(2000)
        self.moves = 0

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moves += 1
        return super().to(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.table = fn(self.table)
        return self


def fetch(ref: ModelRef) -> Fetched:
    return open_store(ref.store).fetch(ref.digest)


def joined(fetched: Fetched, copy_small: bool = False) -> nn.Module:
    return join(fetched.skeleton, fetched.description, fetched.buffer, base=fetched.base, copy_small=copy_small)


def moved(fetched: Fetched, device: Late, copy_small: bool = False) -> nn.Module:
    return move(joined(fetched, copy_small), fetched, device, CPU, PinnedSlots(device, 3, 100, 2)).model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def assert_alike(ours: nn.Module, plain: nn.Module) -> None:
    """The same tensors in the same places, and the same ones twice, as ``plain`` has."""
    found, expected = tensors(ours), tensors(plain)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert type(one) is type(other)
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.requires_grad == other.requires_grad
        assert one.is_leaf
        assert not one.is_inference()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, check_device=False)
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
    assert _groups(found, id) == _groups(expected, id)
    assert _groups(found, lambda t: t.untyped_storage().data_ptr()) == _groups(
        expected, lambda t: t.untyped_storage().data_ptr()
    )


def _groups(found: dict[str, torch.Tensor], key: Any) -> set[frozenset[str]]:
    groups: dict[Any, set[str]] = {}
    for name, tensor in found.items():
        if tensor.numel():
            groups.setdefault(key(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values()}


@pytest.mark.parametrize(
    "model",
    [
        Odd(),
        nn.Linear(3, 2),
        nn.ReLU(),
        nn.LSTM(8, 8, num_layers=2),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False),
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("copy_small", [False, True])
def test_a_model_is_what_it_was(model: nn.Module, copy_small: bool, registry: Path) -> None:
    fetched = fetch(put(model.eval(), "model"))
    device = Late()
    found, plain = moved(fetched, device, copy_small), joined(fetched, copy_small)
    assert_alike(found, plain)
    # Each lies on the device that was in the buffer, and nothing of it was written to
    for name, tensor in tensors(found).items():
        was = tensors(plain)[name]
        start = fetched.buffer.ctypes.data
        in_buffer = start <= was.data_ptr() < start + fetched.buffer.nbytes and was.numel() > 0
        assert (device.holds(tensor) and tensor.numel() > 0) == in_buffer, name


def test_what_to_does_not_move_stays_where_it_was(registry: Path) -> None:
    fetched = fetch(put(Odd().eval(), "odd"))
    device = Late()
    found: Any = moved(fetched, device)
    assert not device.holds(found.plain)
    assert np.shares_memory(found.array, fetched.buffer)
    np.testing.assert_array_equal(found.array, np.arange(5000.0))
    # and does not go over: 8,000 bytes of the tensor, 40,000 of the array
    assert sum(memory.nbytes for memory in device.memory) < 8000


def test_the_computation_is_the_same(registry: Path) -> None:
    model = Odd().eval()
    fetched = fetch(put(model, "odd"))
    x = torch.arange(30)
    with torch.no_grad():
        assert torch.equal(moved(fetched, Late())(x), model(x))


def test_a_way_of_its_own_is_gone(registry: Path) -> None:
    model = WithAWayOfItsOwn().eval()
    device = Late()
    found: Any = moved(fetch(put(model, "model")), device)
    assert found.moves == 1
    assert torch.equal(found.table, model.table)
    assert device.holds(found.layer.weight)


def test_tensors_that_another_dtype_is_asked_for_are_not_replaced(registry: Path) -> None:
    class Halved(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            return super().to(*args, dtype=torch.float16, **kwargs)

    model = Halved(4, 4).eval()
    found: Any = moved(fetch(put(model, "model")), Late())
    assert torch.equal(found.weight, model.weight.half())


def test_a_way_of_its_own_finds_its_tensors_where_they_were(registry: Path) -> None:
    class Looks(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.weight_was_at = self.weight.data_ptr()
            return super().to(*args, **kwargs)

    fetched = fetch(put(Looks(4, 4).eval(), "model"))
    device = Late()
    found: Any = moved(fetched, device)
    assert found.weight_was_at == fetched.buffer.ctypes.data + fetched.description.storages[0].offset
    assert device.holds(found.weight)


def test_a_variant_and_its_base(registry: Path) -> None:
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 8)).eval()
    variant = copy.deepcopy(base)
    nn.init.normal_(variant[1].weight)
    put(base, "base")
    fetched = fetch(put(variant, "variant", base="base"))
    assert fetched.base is not None
    device = Late()
    assert_alike(moved(fetched, device), variant)
    own, others = device.memory
    assert own.nbytes == variant[1].weight.nbytes
    assert others.nbytes < sum(p.nbytes for p in variant.parameters()) - own.nbytes + 256 * 6


def test_storages_begin_on_256_bytes(registry: Path) -> None:
    fetched = fetch(put(Odd().eval(), "odd"))
    found = layout(joined(fetched), fetched)
    assert len(found.places) > 5
    assert all(place.start % 256 == 0 for place in found.places.values())


def test_under_inference_mode_it_can_still_be_trained(registry: Path) -> None:
    fetched = fetch(put(nn.Linear(3, 2), "model"))
    with torch.inference_mode():
        found = moved(fetched, Late())
    found(torch.ones(1, 3)).sum().backward()
    assert tensors(found)["weight"].grad is not None


@pytest.mark.parametrize("fail_after", [0, 2])
def test_a_failed_upload_is_told_and_done_plainly(
    fail_after: int, registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Odd().eval()
    fetched = fetch(put(model, "odd"))
    device = Late(fail_after)
    with caplog.at_level(logging.WARNING, "zcinfer"):
        found = moved(fetched, device)
    assert "go to cpu tensor by tensor, since their upload failed (RuntimeError: the device refuses)" in caplog.text
    assert_alike(found, joined(fetched))
    assert not any(device.holds(tensor) for tensor in tensors(found).values())


def test_memory_that_cannot_be_pinned_is_told(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unpinned(Late):
        def pinned(self, nbytes: int) -> torch.Tensor:
            raise RuntimeError("CUDA error: out of memory")

    fetched = fetch(put(nn.Linear(3, 2).eval(), "model"))
    with caplog.at_level(logging.WARNING, "zcinfer"):
        found = move(joined(fetched), fetched, Unpinned(), CPU).model
    assert "out of memory" in caplog.text
    assert_alike(found, joined(fetched))


def test_the_store_has_its_memory_back_when_all_is_on_the_device(registry: Path) -> None:
    ref = put(nn.Linear(300, 20).eval(), "model")
    with loading.residents.lend(ref, "meta", "refuse") as model:
        assert next(model.parameters()).device.type == "meta"
    resident = loading.Resident(ref, "meta", "refuse")
    assert [buffer() for buffer in resident._buffers] == [None]
    kept = loading.Resident(ref, "cpu", "refuse")
    assert all(isinstance(buffer(), np.ndarray) for buffer in kept._buffers)
    buffer: weakref.ref[Any] = kept._buffers[0]
    del kept
    assert buffer() is None
