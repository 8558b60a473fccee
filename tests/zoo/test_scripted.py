"""TorchScript: scripted, traced, frozen, within other modules; carried as torch's own bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.compare import round_trip
from zoo.samples import IMAGE, Models, X, convolution, mlp


class Branches(nn.Module):
    """Code that no trace has: a branch, a loop, a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(4, 4), 3
        self.register_buffer("lost", torch.ones(4), persistent=False)

    @torch.jit.export
    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            x = self.layer(x)
            if float(x.sum()) > 0:
                x = self.twice(x) + self.lost
        return x


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(mlp())
        self.outer = nn.Linear(2, 3)
        self.traced = [torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.traced[0](self.outer(self.inner(x)))


MODELS: Models = {
    "scripted": (lambda: torch.jit.script(mlp()), (X,)),
    "scripted with branches": (lambda: torch.jit.script(Branches()), (X,)),
    "scripted, in bfloat16": (lambda: torch.jit.script(mlp().bfloat16()), (X.bfloat16(),)),
    "traced": (lambda: torch.jit.trace(convolution().eval(), IMAGE), (IMAGE,)),
    "scripted within a module": (Holder, (X,)),
}


def test_methods_and_constants_of_a_script_come_back() -> None:
    script = torch.jit.script(Branches())
    copy: Any = round_trip(script)
    assert torch.equal(copy.twice(X), X * 2)
    assert copy.steps == 3
    assert list(copy.state_dict()) == list(script.state_dict())


def test_a_frozen_program_comes_back() -> None:
    model = torch.jit.freeze(torch.jit.script(convolution().eval()))
    assert torch.equal(round_trip(model)(IMAGE), model(IMAGE))
