"""The models that benchmarks load: built from their configs with random weights, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Subject(NamedTuple):
    """A model to be loaded, and how to call it.

    Attributes
    ----------
    build : callable
        Gives the model in eval mode, from a fixed seed.
    inputs : callable
        Gives the keywords of one call, one row.
    pretrained : str
        Name of the transformers class whose ``from_pretrained`` loads it; "" for none.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    pretrained: str = ""


class Block(nn.Module):
    """Three modules of 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.activation(self.norm(self.linear(x)))
        return result


class Many(nn.Module):
    """500 blocks of four modules: what a load costs when there is little to load but the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(500)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.blocks(x)
        return result


def _transformers(name: str, **settings: Any) -> nn.Module:
    import transformers

    model = getattr(transformers, name)
    built: nn.Module = model(model.config_class(**settings))
    return built.eval()


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    return built


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(1, 15)[None]}


SUBJECTS = {
    "BERT-base": Subject(_seeded(lambda: _transformers("BertModel")), _tokens, "BertModel"),
    "ResNet-50": Subject(
        _seeded(lambda: _transformers("ResNetModel")),
        lambda: {"pixel_values": torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)},
        "ResNetModel",
    ),
    "GPT-2": Subject(_seeded(lambda: _transformers("GPT2Model", use_cache=False)), _tokens, "GPT2Model"),
    "2,000 modules": Subject(_seeded(Many), lambda: {"x": torch.linspace(-1, 1, 64)[None]}),
}

SMALL_BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}


MINI_BERT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}


def mini_bert(seed: int) -> nn.Module:
    """A BERT of 45 MB, as one of many models."""
    torch.manual_seed(seed)
    return _transformers("BertModel", **MINI_BERT)


def small_bert(seed: int) -> nn.Module:
    """A BERT of 17 MB, as one of many variants."""
    torch.manual_seed(seed)
    return _transformers("BertModel", **SMALL_BERT)
