"""Small models and inputs that several kinds of the zoo use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What each kind has: by name, how to build a model (from torch's seed) and what to call it with, if it can be called.
Models = dict[str, tuple[Callable[[], Any], tuple[Any, ...] | None]]

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[1, 2, 3]])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def convolution() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


class Views(nn.Module):
    """Tensors that lie in one storage, and in other orders than the usual one."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(6, 8)
        self.first, self.second = nn.Parameter(base[:3]), nn.Parameter(base[2:])
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.strided = nn.Parameter(torch.randn(8, 8)[::2, 1::3])
        self.register_buffer("expanded", torch.randn(1, 8).expand(3, 8))
        self.register_buffer("same", base)
        self.register_buffer("channels_last", torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last))
        self.register_buffer("scalar", base[0, 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first.t() @ self.transposed @ self.strided[:, :1] + self.expanded.sum() + self.scalar


def ran(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    model(*inputs)
    return model


def holding(*values: Any) -> nn.Module:
    """A module with these attributes."""
    module = nn.Module()
    for number, value in enumerate(values):
        setattr(module, f"value{number}", value)
    return module
