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
    def __init__(self) -> None:
        super().__init__()
        self.array = np.arange(2000.0, dtype=np.float32)
        self.register_buffer("tensor", torch.from_numpy(self.array))
        self.matrix = torch.from_numpy(self.array.reshape(4, 500))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix * float(self.array[3]) + self.tensor[:500]


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


def test_an_array_and_the_tensors_over_it_are_one_memory_in_the_copy() -> None:
    copy = round_trip(OverAnArray())
    copy.array[0] = 7
    assert (copy.tensor[0], copy.matrix[0, 0]) == (7, 7)


def test_tensors_over_parts_of_an_array_that_share_elements_are_refused() -> None:
    """Torch gives each a storage of its own, and nothing says that they are one memory."""
    with pytest.raises(SplitError, match=r"Module.value0 \(a Tensor\) and Module.value1 .* lie over parts of one"):
        split(over_parts_of_an_array())


@pytest.mark.parametrize("later", [False, True])
def test_an_array_and_a_tensor_over_a_part_of_it_are_refused(later: bool) -> None:
    array = np.arange(2000.0)
    values = array, torch.from_numpy(array[500:1000])
    with pytest.raises(SplitError, match="lie over parts of one memory"):
        split(holding(*reversed(values)) if later else holding(*values))


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
