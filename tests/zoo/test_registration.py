"""What modules register: names, order, buffers that are not saved, containers, entries that are None."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.compare import round_trip
from zoo.samples import IMAGE, Models, X, convolution, mlp


def attributed() -> nn.Module:
    model = mlp()
    model[0].weight.unit = "m"
    model[0].weight.others = [model[0].weight, model[2].bias]
    model.buffer = nn.Buffer(torch.ones(3))
    model.lost = nn.Buffer(torch.ones(3), persistent=False)
    return model


class Buffered(nn.Module):
    """Buffers that are saved, and some that are not; all of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("table", torch.rand(4), persistent=False)
        self.register_buffer("steps", torch.tensor(3), persistent=False)
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("none", None)
        self.register_buffer("none_lost", None, persistent=False)
        self.register_parameter("nothing", None)
        self.inner = nn.ModuleDict({"norm": nn.BatchNorm1d(4, affine=False)})
        self.inner["norm"].register_buffer("lost", torch.rand(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner["norm"](x * self.scale + self.table * self.steps)
        return torch.where(self.mask, x, x + self.inner["norm"].lost)


def strange_names() -> nn.Module:
    model = nn.Module()
    for name in ("weight:0", "größe", "with space", "__metadata__", "0", "λ", "zcinfer.storage.0".replace(".", "_")):
        model.register_parameter(name, nn.Parameter(torch.randn(2)))
        model.register_buffer(f"{name} too", torch.randn(3))
        model.add_module(f"{name} inside", nn.Linear(2, 2))
    return model


def names_from_last_to_first() -> nn.Module:
    model = nn.Module()
    for name in "zyxcba":
        model.add_module(name, nn.Linear(2, 2))
        model.register_buffer(f"buffer_{name}", torch.randn(2))
    model.x = nn.Linear(3, 3)  # keeps its place
    del model.c
    model.c = nn.Linear(2, 3)  # is the last now
    return model


def missing_modules() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.register_module("absent", None)
    model[0].bias = None
    model.gone = None
    model.forward = nn.Sequential.forward.__get__(nn.Sequential(*model[:2]))
    return model


def containers() -> nn.Module:
    return nn.ModuleDict(
        {
            "lists": nn.ModuleList([nn.ParameterList([torch.ones(2), nn.Parameter(torch.randn(3), False)])]),
            "nested": nn.ModuleList([nn.ModuleList([nn.ModuleList()]), nn.ModuleDict()]),
            "other things": nn.ParameterList([1, "two", torch.ones(2)]),
            "a dict": nn.ParameterDict({"b": torch.ones(3), "a": nn.Parameter(torch.ones(2)), "none": None}),
            "sequence": nn.Sequential(nn.Sequential(), nn.Identity()),
        }
    )


class PlainModules(nn.Module):
    """Modules where torch does not look for them; those in use are in use, in their own modes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.Dropout(0.5).eval()]
        self.table = {"norm": nn.BatchNorm1d(4), "again": self.layers[0]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.table["norm"](self.table["again"](x))


class Overridden(nn.Module):
    """Says itself what its parameters and its state are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.hidden = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield "weight", self.weight

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"only": self.weight.detach()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.hidden


MODELS: Models = {
    "tensors with attributes": (attributed, (X,)),
    "buffers saved and not": (Buffered, (X,)),
    "strange names": (strange_names, None),
    "names from last to first": (names_from_last_to_first, None),
    "entries that are none": (missing_modules, (X,)),
    "lists and dicts of parameters": (
        lambda: nn.ModuleList([nn.ParameterList([torch.ones(2)]), nn.ParameterDict({"a": torch.ones(3)})]),
        None,
    ),
    "containers": (containers, None),
    "modules in plain attributes": (PlainModules, (X,)),
    "its own names and state": (Overridden, (X,)),
    "a convolution": (convolution, (IMAGE,)),
}


def test_attributes_and_classes_of_tensors_come_back() -> None:
    other = round_trip(attributed())
    assert other[0].weight.unit == "m"
    assert isinstance(other.buffer, nn.Buffer)


def test_buffers_that_are_not_saved_stay_out_of_the_state_and_in_the_model() -> None:
    model = Buffered()
    copy: Any = round_trip(model)
    assert list(copy.state_dict()) == ["scale", "mask", "inner.norm.running_mean", "inner.norm.running_var",
                                       "inner.norm.num_batches_tracked"]  # fmt: skip
    assert list(copy.state_dict()) == list(model.state_dict())
    assert torch.equal(copy.table, model.table)
    copy.load_state_dict(model.state_dict(), strict=True)


def test_what_is_registered_after_the_load_is_registered() -> None:
    copy = round_trip(mlp())
    copy.extra = nn.Linear(2, 2)
    copy[0].bias = nn.Parameter(torch.zeros(8))
    copy.register_buffer("counter", torch.zeros(1))
    assert [name for name, _ in copy.named_parameters()][:2] == ["0.weight", "0.bias"]
    assert "extra.weight" in copy.state_dict()
    assert "counter" in copy.state_dict()
