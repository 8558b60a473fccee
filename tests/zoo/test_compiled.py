"""Modules that torch compiles: wrapped, in place, in part. The eager backend: it is the wrapping that travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from zcinfer.parts import join, split
from zoo.compare import buffer_of, outputs, round_trip
from zoo.samples import Models, X, convolution, mlp, ran


class CompiledMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @torch.compile(backend="eager")
    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x)


def in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


def in_part() -> nn.Module:
    return nn.Sequential(torch.compile(mlp(), backend="eager"), nn.Linear(2, 2)).eval()


def tied_to_its_original() -> nn.Module:
    model = nn.Module()
    model.plain = mlp()
    model.compiled = torch.compile(model.plain, backend="eager")
    return model


MODELS: Models = {
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), (X,)),
    "compiled and called": (lambda: ran(torch.compile(mlp(), backend="eager"), X), (X,)),
    "compiled in part": (in_part, (X,)),
    "compiled beside its original": (tied_to_its_original, None),
    "a compiled method": (CompiledMethod, (X,)),
    "compiled in place": (in_place, (X,)),
    "compiled in place and called": (lambda: ran(in_place(), X), (X,)),
}


def test_the_copy_of_a_compiled_module_is_one() -> None:
    copy = round_trip(torch.compile(mlp(), backend="eager"))
    assert isinstance(copy, torch._dynamo.OptimizedModule)
    assert list(copy.state_dict()) == [f"_orig_mod.{name}" for name in mlp().state_dict()]
    assert torch.equal(copy(X), copy._orig_mod(X))


def test_a_compiled_module_shares_its_weights_with_its_original() -> None:
    copy = round_trip(tied_to_its_original())
    assert copy.compiled._orig_mod is copy.plain


def test_a_copy_can_be_compiled() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = convolution().eval()
    counter: Any = CompileCounter()
    copy = torch.compile(round_trip(model), backend=counter)
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(copy(image), model(image))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["compiled", "compiled in place"])
def test_a_compiled_model_that_was_called_is_left_compiled(case: str) -> None:
    torch.manual_seed(0)
    model = MODELS[case][0]()
    expected = outputs(model, (X,)).found
    round_trip(model)
    assert outputs(model, (X,)).found == expected


def trained(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model.compile(backend="eager")
    model(X).sum().backward()
    torch.compile(optimiser.step, backend="eager")()
    model.zero_grad()


class Slotted(nn.Module):
    __slots__ = ("note",)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.note = nn.Parameter(torch.ones(X.shape[1])), "noted"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize("made", [mlp, Slotted])
@pytest.mark.parametrize(
    "compiled",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: ran(torch.compile(model, backend="eager"), X),
        lambda model: model.compile(backend="eager"),
        trained,
    ],
    ids=["wrapped", "called", "compiled in place", "trained"],
)
def test_what_was_compiled_once_is_the_same_model(
    compiled: Callable[[nn.Module], object], made: Callable[[], nn.Module]
) -> None:
    """Torch's compiler leaves marks on the weights, and its wrapper one on the module itself."""
    torch._dynamo.reset()
    model = made()
    before = split(model).description.digest
    compiled(model)
    parts = split(model)
    assert parts.description.digest == before
    assert split(join(parts.skeleton, parts.description, buffer_of(parts))).description.digest == before


def test_a_compiled_module_that_was_called_is_the_same_model() -> None:
    torch._dynamo.reset()
    model = torch.compile(mlp(), backend="eager")
    before = split(model).description.digest
    model(X)
    assert split(model).description.digest == before


def test_what_a_user_says_to_the_compiler_is_another_model() -> None:
    model = mlp()
    before = split(model).description.digest
    torch._dynamo.mark_static(model[0].weight, 0)
    assert split(model).description.digest != before
