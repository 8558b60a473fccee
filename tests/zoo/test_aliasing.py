"""Tensors that are one, or lie in one memory: what is written through one is seen through all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zcinfer.errors import SplitError
from zcinfer.parts import split
from zoo.compare import assert_same, round_trip
from zoo.facts import facts, named
from zoo.samples import TOKENS, Models, Tied, Views, X, convolution, holding, mlp


class ThreeTimes(nn.Module):
    """A weight in three layers, one of them under another name, and a layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layers[1].weight = self.layers[2].weight = self.layers[0].weight
        self.layers[2].register_parameter("transposed", self.layers[0].weight)
        self.again = self.layers[1]
        self.table = nn.ModuleDict({"again": self.layers[1]})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.again, self.table["again"]):
            x = layer(x)
        return x @ self.layers[2].transposed


class Fused(nn.Module):
    """Query, key and value as parts of one weight, both registered."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(12, 4))
        self.query, self.key, self.value = (nn.Parameter(part) for part in self.fused.detach().chunk(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.fused.t() + torch.cat([x @ part.t() for part in (self.query, self.key, self.value)], 1)


class TiedByData(nn.Module):
    """Two parameters over one storage: `b.data = a.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight.data = self.one.weight.data
        self.other.bias.data = self.one.weight.data[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x))


def as_other_dtypes() -> nn.Module:
    base = torch.randn(4, 4, dtype=torch.complex64)
    model = nn.Module()
    model.register_buffer("complex", base)
    model.register_buffer("real", torch.view_as_real(base))
    model.register_buffer("bits", base.view(torch.int64))
    model.register_buffer("bytes", base.view(torch.uint8))
    return model


def buffer_and_parameter() -> nn.Module:
    model = nn.BatchNorm1d(4)
    model.register_buffer("frozen", model.weight.detach())
    model.register_buffer("history", model.running_mean)
    model.plain = model.weight
    model.listed = [model.running_mean, model.weight, model.weight.detach()]
    return model.eval()


class OverAnArray(nn.Module):
    def __init__(self, length: int = 2000) -> None:
        super().__init__()
        self.array = np.arange(float(length), dtype=np.float32)
        self.register_buffer("tensor", torch.from_numpy(self.array))
        self.matrix = torch.from_numpy(self.array.reshape(4, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix * float(self.array[3]) + self.tensor[: len(self.tensor) // 4]


def over_parts_of_an_array() -> nn.Module:
    array = np.arange(2000.0)
    return holding(torch.from_numpy(array), torch.from_numpy(array[500:1000]))


def over_columns_of_an_array() -> nn.Module:
    """Tables of positions: the memory of each lies between that of the other, and they share no element."""
    table = np.arange(2000.0, dtype=np.float32).reshape(50, 40)
    return holding(torch.from_numpy(table[:, ::2]), torch.from_numpy(table[:, 1::2]), torch.from_numpy(table[:, 40:]))


def tied_across_submodules() -> nn.Module:
    encoder, decoder = nn.Linear(4, 2), nn.Linear(2, 4)
    decoder.weight = nn.Parameter(encoder.weight.t())
    return nn.Sequential(encoder, decoder)


def tied_after_training() -> nn.Module:
    model = Tied()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS).sum().backward()
    optimiser.step()
    return model


MODELS: Models = {
    "tied weights": (Tied, (TOKENS,)),
    "tied weights, trained": (tied_after_training, (TOKENS,)),
    "a weight in three layers": (ThreeTimes, (X,)),
    "parts of one weight": (Fused, (X,)),
    "tied by data": (TiedByData, (X,)),
    "a decoder with the encoder's weight, transposed": (tied_across_submodules, (X,)),
    "one memory as other dtypes": (as_other_dtypes, None),
    "a buffer over a parameter": (buffer_and_parameter, (X,)),
    "tensors over columns of an array": (over_columns_of_an_array, None),
    "tensors over an array": (OverAnArray, (X,)),
    "tensors over a small array": (lambda: OverAnArray(20), (X,)),
    "a model in a list, twice": (lambda: (lambda layer: nn.Sequential(layer, nn.ReLU(), layer))(nn.Linear(4, 4)), (X,)),
}


def test_tied_weights_are_stored_once() -> None:
    assert len(split(Tied()).description.storages) == 1
    assert len(split(ThreeTimes()).description.storages) == 1 + 3  # and three biases
    assert len(split(Fused()).description.storages) == 1


def written(model: Any) -> list[Any]:
    """What all its tensors are after one is written to, one after the other."""
    found = []
    for name, tensor in named(model):
        with torch.no_grad():
            tensor.view(-1)[0] = 3
        found.append((name, [facts(other) for _, other in named(model)]))
    return found


@pytest.mark.parametrize("case", [case for case in MODELS if case != "a decoder with the encoder's weight, transposed"])
def test_what_is_written_through_one_tensor_is_seen_through_the_others(case: str) -> None:
    make, _ = MODELS[case]
    torch.manual_seed(0)
    model = make()
    copy = round_trip(model)
    assert written(copy) == written(model)
    assert_same(model, copy)


@pytest.mark.parametrize("length", [2000, 20])
def test_an_array_and_the_tensors_over_it_are_one_memory_in_the_copy(length: int) -> None:
    copy = round_trip(OverAnArray(length))
    copy.array[0] = 7
    assert (copy.tensor[0], copy.matrix[0, 0]) == (7, 7)


def test_tensors_over_parts_of_an_array_that_share_elements_are_refused() -> None:
    """Torch gives each a storage of its own, and nothing says that they are one memory."""
    with pytest.raises(SplitError, match=r"Module.value0 \(a Tensor\) and Module.value1 .* lie over parts of one"):
        split(over_parts_of_an_array())


@pytest.mark.parametrize("length", [2000, 20])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda array: (array, torch.from_numpy(array[5:10])), id="a tensor over a part"),
        pytest.param(lambda array: (array[::2], torch.from_numpy(array)), id="every other element"),
        pytest.param(lambda array: (array[:4:-1], torch.from_numpy(array[8:])), id="backwards"),
        pytest.param(lambda array: (array[:7], torch.from_numpy(array)), id="a small part"),
        pytest.param(lambda array: (array.view(np.recarray), torch.from_numpy(array)), id="an array of another class"),
    ],
)
def test_an_array_and_a_tensor_over_a_part_of_it_are_refused(cut: Any, later: bool, length: int) -> None:
    array, tensor = cut(np.arange(float(length)))
    kind = type(array).__name__
    found = (r"Module.value0 \(a Tensor\)", r"Module.value1 \(an? " + kind + r"\)")
    if not later:
        found = (r"Module.value0 \(an? " + kind + r"\)", r"Module.value1 \(a Tensor\)")
    with pytest.raises(SplitError, match="lie over parts of one memory") as error:
        split(holding(tensor, array) if later else holding(array, tensor))
    for place in found:
        assert error.match(place)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_small_array_and_a_tensor_over_it_are_one_memory_in_the_copy(order: Any, later: bool) -> None:
    array = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    tensor = torch.from_numpy(array)
    model = holding(tensor, array) if later else holding(array, tensor)
    copy = round_trip(model)
    array, tensor = (copy.value1, copy.value0) if later else (copy.value0, copy.value1)
    array[0, 1] = 7
    assert tensor[0, 1] == 7
    assert array.tolist() == tensor.tolist()
    assert split(round_trip(model)).description.digest == split(model).description.digest
    untied = holding(model.value0, model.value1.clone() if not later else model.value1.copy())
    assert split(untied).description.digest != split(model).description.digest


def test_small_arrays_that_no_tensor_knows_are_pickled() -> None:
    array = np.arange(20.0)
    copy = round_trip(holding(array, array[::2], array[:4], torch.zeros(3)))
    assert copy.value1.tolist() == array[::2].tolist()
    assert len(split(copy).description.storages) == 1


def test_writes_to_the_copy_never_reach_the_model() -> None:
    model = nn.Sequential(Views(), convolution())
    before = [facts(tensor) for _, tensor in named(model)]
    other = round_trip(model)
    with torch.no_grad():
        for _, tensor in named(other):
            if tensor.is_contiguous():
                tensor.fill_(7)
    assert [facts(tensor) for _, tensor in named(model)] == before


def test_attributes_of_tensors_keep_their_ties() -> None:
    model = mlp()
    model[0].weight.others = [model[0].weight, model[2].bias]
    other = round_trip(model)
    assert other[0].weight.others[0] is other[0].weight
    assert other[0].weight.others[1] is other[2].bias
