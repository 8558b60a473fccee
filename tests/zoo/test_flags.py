"""What is switched on and off: modes of submodules, `requires_grad`, gradients, inference tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zcinfer as zc
from zcinfer.parts import split
from zoo.compare import assert_same, outputs, round_trip
from zoo.facts import named
from zoo.samples import IMAGE, Models, X, convolution, mlp


def flagged() -> nn.Module:
    model = convolution()
    model[0].weight.requires_grad = False
    model[1].eval()
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("lost", torch.ones(2), persistent=False)
    model.register_buffer("none", None)
    model.register_parameter("nothing", None)
    return model


def mixed_modes() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(8))
    ).eval()
    model[1].train()
    model[3][1].train()
    return model


def frozen_in_part() -> nn.Module:
    model = nn.Sequential(mlp(), nn.Linear(2, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model.register_buffer("learnt", torch.ones(2, requires_grad=True))
    model.constant = nn.Parameter(torch.ones(2), requires_grad=False)
    model.plain = torch.ones(2, requires_grad=True)
    return model


class InPlace(nn.Module):
    """Counts its calls in a buffer, in an attribute and in a module's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.count += 1
        self.layer.train(self.count % 2 == 0)
        return self.layer(x) * self.calls


def made_under_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return mlp()


MODELS: Models = {
    "flags": (flagged, (IMAGE,)),
    "submodules in train mode": (mixed_modes, (X,)),
    "all in train mode": (lambda: mixed_modes().train(), (X,)),
    "frozen in part": (frozen_in_part, (X,)),
    "a model that counts its calls": (InPlace, (X,)),
}


def test_submodules_keep_their_modes() -> None:
    copy = round_trip(mixed_modes())
    assert [name for name, module in copy.named_modules() if module.training] == ["1", "3.1"]


def test_frozen_parameters_stay_frozen_and_the_others_trainable() -> None:
    copy = round_trip(frozen_in_part())
    flags = {name: tensor.requires_grad for name, tensor in named(copy)}
    assert [name for name, flag in flags.items() if not flag] == [
        "constant", "0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"
    ]  # fmt: skip
    assert copy.learnt.requires_grad
    assert copy.plain.requires_grad
    copy(X).sum().backward()
    assert copy[0][0].weight.grad is None
    assert copy[1].weight.grad is not None


def test_a_copy_made_under_inference_mode_can_be_trained_and_cast() -> None:
    with torch.inference_mode():
        other = round_trip(mlp())
    other(X).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert other.half()[0].weight.dtype == torch.float16


def test_a_copy_loaded_under_inference_mode_can_be_trained_and_cast(registry: Path) -> None:
    zc.put(mlp(), "mlp")
    with torch.inference_mode():
        copy: Any = zc.load("mlp")
        copy(X)
    copy(X).sum().backward()
    torch.optim.SGD(copy.parameters(), lr=0.1).step()
    assert copy.to(torch.bfloat16)[0].weight.dtype == torch.bfloat16


def test_a_model_made_under_inference_mode_can_be_split() -> None:
    model: Any = made_under_inference_mode()
    other = round_trip(model)
    assert torch.equal(other[0].weight, model[0].weight)
    assert not other[0].weight.is_inference()


def test_gradients_stay_behind() -> None:
    model = mlp()
    model(X).sum().backward()
    assert round_trip(model)[0].weight.grad is None
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_copy_is_cast_as_the_model_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(mlp(), nn.BatchNorm1d(2)).eval()
    copy = round_trip(model).to(dtype)
    assert_same(model.to(dtype), copy)
    assert outputs(copy, (X.to(dtype),)).found == outputs(model, (X.to(dtype),)).found


def test_training_the_copy_is_training_the_model() -> None:
    """Three steps of Adam give the same weights to the bit; a copy that was not trained stays as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(mlp(), nn.BatchNorm1d(2))
    parts = split(model)
    copy, other = round_trip(model), round_trip(model)
    for each in (model, copy):
        optimiser = torch.optim.Adam(each.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            each(X).square().sum().backward()
            optimiser.step()
        each.zero_grad()
    assert_same(model, copy)
    assert split(other).description.digest == parts.description.digest
