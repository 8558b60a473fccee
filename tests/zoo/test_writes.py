"""Whatever writes to a loaded model writes to that one alone: not to the store, and not to what another reader has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import zcinfer as zc
from zoo.compare import assert_same, differences, seed
from zoo.samples import IMAGE, TOKENS, X, convolution, mlp
from zoo.test_layers import Cached


class Counting(nn.Module):
    """Writes to its buffers, to tensors in its attributes and to its arrays as it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(2048))
        self.history, self.counts = [torch.zeros(2048)], np.zeros(2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean += 1
        self.history[0][0] += 1
        self.counts[0] += 1
        return self.layer(x)


def train(model: nn.Module) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimiser.step()


def write_by_numpy(model: Any) -> None:
    model[0].weight.detach().numpy()[:] = 7


def write_to_a_view(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.view(-1)[1:3].zero_()


def write_after_a_failure(model: Any) -> None:
    """What `load_state_dict` had copied when it met what does not fit stays copied."""
    state = {name: torch.full_like(tensor, 7) for name, tensor in model.state_dict().items()}
    state["2.bias"] = torch.zeros(99)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)


def large(model: nn.Module) -> nn.Module:
    """With a weight of many pages, which no reader copies because it is small."""
    model.large = nn.Parameter(torch.randn(300, 300))
    return model


def write_to_large(model: Any) -> None:
    model.large.data[150:] = 7
    model.large.data.mul_(2)


WRITES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "a norm in train mode": (convolution, lambda model: model(IMAGE)),
    "an embedding with a norm": (lambda: nn.Embedding(10, 4, max_norm=0.1), lambda model: model(TOKENS)),
    "a cache of keys": (Cached, lambda model: model(X)),
    "a norm by power iteration": (
        lambda: parametrizations.spectral_norm(nn.Linear(64, 64)),
        lambda model: model(torch.ones(2, 64)),
    ),
    "an old norm by power iteration": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), lambda model: model(X)),
    "counters": (Counting, lambda model: model(X)),
    "load_state_dict": (mlp, lambda model: model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()})),
    "load_state_dict that fails": (mlp, write_after_a_failure),
    "a write to the data": (mlp, lambda model: model[0].weight.data.fill_(7)),
    "a write to a view": (mlp, write_to_a_view),
    "a write through NumPy": (mlp, write_by_numpy),
    "a write to many pages": (lambda: large(mlp()), write_to_large),
    "training": (mlp, train),
    "an initialisation": (mlp, lambda model: nn.init.zeros_(model[0].weight)),
    "a cast in place": (mlp, lambda model: model.half()),
}


def built(how: str) -> Any:
    seed(0)
    return WRITES[how][0]()


@pytest.mark.parametrize("how", WRITES)
def test_a_write_reaches_no_other_copy_and_not_the_store(registry: Path, how: str) -> None:
    zc.put(built(how), "written")
    before, writer = zc.load("written"), zc.load("written")
    WRITES[how][1](writer)
    assert differences(built(how), writer) != []
    assert_same(built(how), before)
    assert_same(built(how), zc.load("written"))


@pytest.mark.parametrize("how", WRITES)
def test_two_copies_are_written_to_as_if_each_were_alone(registry: Path, how: str) -> None:
    model = built(how)
    zc.put(model, "written")
    first, second = zc.load("written"), zc.load("written")
    for each in (first, second, model):
        seed(1)
        WRITES[how][1](each)
        each.zero_grad()
    assert_same(model, first)
    assert_same(model, second)
