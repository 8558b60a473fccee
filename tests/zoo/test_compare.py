"""The comparison itself: it sees each of these, so that it does not find all models equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zoo.compare import compared, differences, seed, state_of
from zoo.samples import X, mlp


def with_all() -> Any:
    seed(0)
    model: Any = nn.Sequential(mlp(), nn.BatchNorm1d(2))
    offset = torch.ones(3)
    model.function, model.table, model.names = (lambda: offset), {"a": [torch.ones(2)]}, {"x", "y"}
    model.register_forward_hook(lambda module, args, output: output * offset[0])
    model.register_buffer("lost", torch.ones(4), persistent=False)
    model[0][0].weight.unit = "m"
    return model


def flip_a_bit(model: Any) -> None:
    model[0][0].weight.data.view(torch.int32)[0, 0] ^= 1


def write_to_a_cell(model: Any) -> None:
    model.function.__closure__[0].cell_contents[0] = 2


def lay_out_otherwise(model: Any) -> None:
    model[0][0].weight.data = model[0][0].weight.detach().t().contiguous().t()


def tie(model: Any) -> None:
    model[1].bias.data = model[1].running_mean


CHANGES: dict[str, Callable[[Any], object]] = {
    "a bit": flip_a_bit,
    "a bit that no view shows": lambda model: setattr(model, "lost", torch.ones(5)[:4]),
    "a sign of zero": lambda model: model[1].running_mean.neg_(),
    "a dtype": lambda model: model[0].half(),
    "strides": lay_out_otherwise,
    "a tie": tie,
    "requires_grad": lambda model: model[0][0].bias.requires_grad_(False),
    "a mode": lambda model: model[1].eval(),
    "a name": lambda model: model.add_module("more", nn.ReLU()),
    "order": lambda model: model._modules.update({"0": model._modules.pop("0")}),
    "a kind of tensor": lambda model: model[0][0]._parameters.update(bias=nn.Buffer(model[0][0].bias.detach())),
    "a buffer that is saved": lambda model: model._non_persistent_buffers_set.clear(),
    "a hook": lambda model: model[0].register_forward_hook(print),
    "a hook's kind": lambda model: model._forward_hooks_always_called.update({next(iter(model._forward_hooks)): True}),
    "an attribute": lambda model: setattr(model[1], "eps", 1e-4),
    "an attribute of a tensor": lambda model: setattr(model[0][0].weight, "unit", "s"),
    "a tensor in a list": lambda model: model.table["a"][0].zero_(),
    "one object or two": lambda model: model.table.update(b=model.table["a"]),
    "a set": lambda model: model.names.discard("x"),
    "a tensor in a function": write_to_a_cell,
    "code": lambda model: setattr(model, "function", lambda: 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_seen(change: str) -> None:
    model, other = with_all(), with_all()
    assert differences(model, other) == []
    before = state_of(other)
    assert state_of(other) == before
    CHANGES[change](other)
    assert differences(model, other) != []


def test_what_is_computed_and_what_that_does_is_compared() -> None:
    assert compared(with_all(), with_all(), (X,)) == []

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x) * Counting.calls

    seed(0)
    model = Counting(4, 4)
    seed(0)
    found = compared(model, Counting(4, 4), (X,))
    assert [line.partition(":")[0] for line in found] == ["a call", "a call without gradients", *["a step back"] * 2]
