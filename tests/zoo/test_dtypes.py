"""Tensors of every dtype that torch has, as parameters, buffers, views and plain attributes; and quantised layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.nn import quantized
from torch.ao.nn.quantized import dynamic

from zoo.compare import assert_same, round_trip
from zoo.facts import facts
from zoo.samples import TOKENS, Models, X, mlp

ALL = sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}, key=str)
QUANTISED = [dtype for dtype in ALL if str(dtype).startswith(("torch.qint", "torch.quint"))]
PACKED = {torch.quint4x2: 2, torch.quint2x4: 4}  # numbers in a byte; torch cannot view bytes as these
DTYPES = [dtype for dtype in ALL if dtype not in QUANTISED]


def bits_as(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(64, dtype=torch.uint8).view(dtype)


def of(dtype: torch.dtype) -> nn.Module:
    tensor = bits_as(dtype)
    model = nn.Module()
    model.register_buffer("buffer", tensor)
    model.register_buffer("view", tensor[3:7])
    model.register_buffer("all_bits_set", torch.full((64,), 255, dtype=torch.uint8).view(dtype))
    model.register_parameter("parameter", nn.Parameter(bits_as(dtype), requires_grad=False))
    model.plain = {"tensor": bits_as(dtype)}
    return model


def quantised(dtype: torch.dtype, how: str) -> nn.Module:
    values, scales, points = torch.randn(4, 8), torch.rand(4) + 0.1, torch.zeros(4)
    if how == "by tensor":
        tensor = torch.quantize_per_tensor(values, 0.1, 3 if dtype is not torch.qint32 else 0, dtype)
    elif how == "by channel":
        tensor = torch.quantize_per_channel(values, scales.double(), points.long(), 0, dtype)
    else:
        tensor = torch.quantize_per_channel(values, scales, points + 0.5, 0, dtype)
    model = nn.Module()
    model.register_buffer("buffer", tensor)
    model.register_buffer("lost", tensor, persistent=False)
    model.register_parameter("parameter", nn.Parameter(tensor, requires_grad=False))
    model.plain = {"tensor": tensor}
    return model


WAYS = [
    *((dtype, "by tensor") for dtype in QUANTISED),
    *((dtype, "by channel") for dtype in QUANTISED if dtype not in PACKED),
    *((dtype, "by channel, in floats") for dtype in QUANTISED if dtype is not torch.qint32),
]


class Scaled(nn.Module):
    """A layer whose weight is stored in few bits, as inference servers store them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(3, 4) * 3).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).t()


class TwoInAByte(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(256, (3, 2), dtype=torch.uint8).view(torch.float4_e2m1fn_x2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.view(torch.uint8)
        return x @ torch.cat([packed & 15, packed >> 4], 1).to(x.dtype).t()


def statically_quantised() -> nn.Module:
    layer = quantized.Linear(4, 3)
    weight = torch.quantize_per_channel(torch.randn(3, 4), torch.rand(3) + 0.1, torch.zeros(3).long(), 0, torch.qint8)
    layer.set_weight_bias(weight, torch.randn(3))
    layer.scale, layer.zero_point = 0.3, 7
    return nn.Sequential(quantized.Quantize(0.1, 64, torch.quint8), layer, quantized.DeQuantize()).eval()


def dynamically_quantised() -> nn.Module:
    model = nn.Sequential(mlp(), nn.Linear(2, 3)).eval()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def quantised_embedding() -> nn.Module:
    layer = quantized.Embedding(10, 4)
    weight = torch.quantize_per_channel(torch.randn(10, 4), torch.rand(10), torch.rand(10), 0, torch.quint8)
    layer.set_weight(weight)
    return layer


MODELS: Models = {
    **{str(dtype): (partial(of, dtype), None) for dtype in DTYPES},
    **{f"{dtype} {how}": (partial(quantised, dtype, how), None) for dtype, how in WAYS},
    "a layer of float64": (lambda: mlp().double(), (X.double(),)),
    "a layer of float16": (lambda: mlp().half(), (X.half(),)),
    "a layer of bfloat16": (lambda: mlp().bfloat16(), (X.bfloat16(),)),
    "a layer of complex64": (lambda: nn.Linear(4, 3, dtype=torch.complex64), (X.to(torch.complex64),)),
    "a layer of complex128": (lambda: nn.Linear(4, 3, dtype=torch.complex128), (X.to(torch.complex128),)),
    "norms of float32 in a model of bfloat16": (
        lambda: nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4, dtype=torch.bfloat16)),
        (X.bfloat16(),),
    ),
    "a scaled layer of int8": (lambda: Scaled(torch.int8), (X,)),
    "a scaled layer of float8_e4m3fn": (lambda: Scaled(torch.float8_e4m3fn), (X,)),
    "a scaled layer of float8_e5m2": (lambda: Scaled(torch.float8_e5m2), (X,)),
    "a layer of float4, two in a byte": (TwoInAByte, (X,)),
    "a layer quantised statically": (statically_quantised, (X,)),
    "layers quantised dynamically": (dynamically_quantised, (X,)),
    "a quantised embedding": (quantised_embedding, (TOKENS,)),
    "a recurrent layer quantised dynamically": (lambda: dynamic.LSTM(4, 3).eval(), (X[None],)),
}


def test_torch_has_at_least_these_dtypes() -> None:
    expected = {torch.bfloat16, torch.float8_e5m2, torch.complex32, torch.bool, torch.uint64, torch.float4_e2m1fn_x2}
    assert set(DTYPES) >= expected
    assert len(DTYPES) >= 25
    assert len(QUANTISED) >= 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype) -> None:
    model = of(dtype)
    other = round_trip(model)
    assert_same(model, other)
    assert facts(other.plain["tensor"]) == facts(model.plain["tensor"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_a_trainable_parameter_of_any_dtype_stays_so(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(dtype)
    assert round_trip(model).weight.requires_grad
    assert_same(model, round_trip(model))


@pytest.mark.parametrize(("dtype", "how"), WAYS, ids=str)
def test_a_quantised_tensor_keeps_its_bits_and_its_scale(dtype: torch.dtype, how: str) -> None:
    model: Any = quantised(dtype, how)
    copy: Any = round_trip(model)
    assert_same(model, copy)
    assert torch.equal(copy.buffer.int_repr(), model.buffer.int_repr())
    assert torch.equal(copy.buffer.dequantize(), model.buffer.dequantize())
    assert copy.plain["tensor"] is copy.buffer


def test_the_numbers_of_a_quantised_tensor_are_shared_with_every_reader() -> None:
    from zcinfer.parts import split

    model = nn.Module()
    model.register_buffer("large", torch.quantize_per_tensor(torch.randn(200, 200), 0.1, 3, torch.qint8))
    parts = split(model)
    assert parts.description.nbytes >= 40_000
    assert len(parts.skeleton) < 4096
