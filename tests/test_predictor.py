"""The callable that runs a model on one block: what it takes, what it gives, and that it equals plain torch."""

from __future__ import annotations

import logging
import os
import pickle
import statistics
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, OutputError, SettingsError, TrainingModeError
from zcinfer.loading import residents
from zcinfer.predictor import Predictor
from zcinfer.rows import Rows, rows_of

pytestmark = pytest.mark.usefixtures("registry")

INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool"]
FLOATS = ["float16", "float32", "float64", "longdouble"]


def predictor_of(model: nn.Module, **settings: Any) -> Predictor:
    return Predictor(zc.put(model, "model"), **settings)


def by_hand(model: nn.Module, *inputs: np.ndarray, batch: int = 1_000_000) -> np.ndarray:
    """The plain loop that everything is compared with."""
    with torch.no_grad():
        starts = range(0, max(len(inputs[0]), 1), batch)
        outputs = [model(*(torch.from_numpy(x[start : start + batch].copy()) for x in inputs)) for start in starts]
    return torch.cat(outputs).numpy()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3)).eval()


class Apply(nn.Module):
    """A function as a model with a floating parameter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.tensor([1.5, -0.25, 2.0, 0.5]))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight)


# How a block's dtype becomes the model's


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        *((dtype, torch.float32) for dtype in [*INTEGERS, *FLOATS]),
        *product(["uint8", "bool", "float64", "longdouble"], [torch.float16, torch.bfloat16, torch.float64]),
    ],
    ids=str,
)
def test_any_number_goes_into_a_linear_layer(dtype: str, weights: torch.dtype) -> None:
    model = mlp().to(weights)
    x = np.random.default_rng(0).integers(0, 2, (7, 4))
    with torch.no_grad():
        expected = model(torch.from_numpy(x).to(weights))
    found = predictor_of(model)(x.astype(dtype))
    assert found.dtype == np.float32 if weights is torch.bfloat16 else str(found.dtype) == str(weights)[6:]
    assert np.array_equal(found, expected.float().numpy() if weights is torch.bfloat16 else expected.numpy())


def test_float64_is_rounded_once() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4))
    with torch.no_grad():
        expected = mlp().bfloat16()(torch.from_numpy(x).bfloat16()).float().numpy()
    assert np.array_equal(predictor_of(mlp().bfloat16())(x), expected)
    assert np.array_equal(predictor_of(mlp())(x), by_hand(mlp(), x.astype(np.float32)))


def test_bytes_of_an_image_go_into_a_convolution() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    model = nn.Conv2d(3, 2, 3)
    assert np.array_equal(predictor_of(model.eval())(images), by_hand(model, images.astype(np.float32)))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integers_are_ids_of_an_embedding(dtype: str) -> None:
    model = nn.Embedding(5, 3).eval()
    ids = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 5, (7, 6)).astype(dtype)
    assert np.array_equal(predictor_of(model)(ids), by_hand(model, ids.astype(np.int64)))


FLOATING_ONLY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x, _: x.softmax(-1),
    "gelu": lambda x, _: F.gelu(x),
    "silu": lambda x, _: F.silu(x),
    "mean": lambda x, _: x.mean(-1),
    "std": lambda x, _: x.std(-1),
    "layer_norm": lambda x, _: F.layer_norm(x, (4,)),
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("bi,i->b", x, w),
    "pool": lambda x, _: F.adaptive_avg_pool2d(x[:, None, None], 2),
    "interpolate": lambda x, _: F.interpolate(x[:, None], scale_factor=2, mode="linear"),
    "attention": lambda x, _: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "in place": lambda x, w: x.mul_(w),
}


@pytest.mark.parametrize("dtype", ["uint8", "bool"])
@pytest.mark.parametrize("name", FLOATING_ONLY)
def test_integers_become_floating_where_an_operator_refuses_them(name: str, dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 2, (7, 4)).astype(dtype)
    model = Apply(FLOATING_ONLY[name])
    assert np.array_equal(predictor_of(model.eval())(x), by_hand(model, x.astype(np.float32)))


@pytest.mark.parametrize("layer", ["lstm", "transformer"])
@pytest.mark.parametrize("dtype", ["uint8", "bool"])
def test_integers_go_into_layers_with_kernels_of_their_own(layer: str, dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 2, (3, 5, 4)).astype(dtype)
    model = (
        nn.LSTM(4, 4, batch_first=True) if layer == "lstm" else nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    )
    found = predictor_of(model.eval(), output=(lambda out, _: out[0]) if layer == "lstm" else None)(x)
    with torch.inference_mode():
        expected = model(torch.from_numpy(x).float())
    assert np.array_equal(found, expected[0] if layer == "lstm" else expected)


def test_integers_that_the_model_takes_stay_integers() -> None:
    x = np.array([[2**24 + 1, 7]], np.int32)  # float32 has no such number
    found = predictor_of(Apply(lambda x, _: x * 2).eval())(x)
    assert found.dtype == np.int32
    assert found.tolist() == [[2**25 + 2, 14]]


def test_booleans_that_the_model_takes_stay_booleans() -> None:
    assert predictor_of(Apply(lambda x, _: ~x).eval())(np.array([[True], [False]])).tolist() == [[False], [True]]


def test_complex_numbers_stay_complex() -> None:
    x = (normal(5, 4) + 1j * normal(5, 4)).astype(np.complex64)
    model = Apply(lambda x, _: torch.fft.fft(x))
    assert np.array_equal(predictor_of(model.eval())(x), by_hand(model, x))


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(nn.Embedding(5, 3), "float32"), (nn.Linear(4, 3), "complex64"), (nn.Conv1d(4, 1, 1), "complex64")],
)
def test_dtype_that_no_cast_mends_is_refused(model: nn.Module, dtype: str) -> None:
    with pytest.raises(InputError, match=rf"found input 0 \(rows, 4, 2\) {dtype}"):
        predictor_of(model.eval())(np.ones((3, 4, 2), dtype))


# What it gives


@dataclass
class Record:
    a: torch.Tensor
    b: torch.Tensor
    note: str = "two tensors"


Pair = namedtuple("Pair", "a b")


class Several(nn.Module):
    """Gives ``a = x * 2`` and ``b = x.sum(1)`` in a container."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: torch.Tensor) -> Any:
        a, b = x * 2, x.sum(1)
        if self.container == "ModelOutput":
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            return BaseModelOutputWithPooling(last_hidden_state=a, pooler_output=b)
        return {
            "tuple": (a, b),
            "list": [a, b],
            "dict": {"a": a, "b": b},
            "dataclass": Record(a, b),
            "namedtuple": Pair(a, b),
        }[self.container]


@pytest.mark.parametrize(
    ("container", "output", "expected"),
    [
        ("tuple", 0, "a"),
        ("tuple", -1, "b"),
        ("list", 1, "b"),
        ("dict", "a", "a"),
        ("dict", "b", "b"),
        ("dataclass", "a", "a"),
        ("dataclass", "b", "b"),
        ("namedtuple", "b", "b"),
        ("namedtuple", 0, "a"),
        ("ModelOutput", "last_hidden_state", "a"),
        ("ModelOutput", "pooler_output", "b"),
        ("ModelOutput", 1, "b"),
    ],
)
def test_output_chosen_by_name_or_position(container: str, output: str | int, expected: str) -> None:
    if container == "ModelOutput":
        pytest.importorskip("transformers")
    x = normal(5, 4)
    found = predictor_of(Several(container).eval(), output=output)(x)
    assert np.array_equal(found, x * 2 if expected == "a" else torch.from_numpy(x).sum(1).numpy())


def test_output_made_by_a_function_of_output_and_inputs() -> None:
    x = normal(5, 4)
    predictor = predictor_of(Several("dict").eval(), output=lambda out, inputs: out["a"] - inputs[0])
    assert np.array_equal(predictor(x), x * 2 - x)


def test_function_gets_keyword_inputs_by_name() -> None:
    x = normal(5, 4)
    predictor = predictor_of(Several("dict").eval(), output=lambda out, inputs: out["a"] - inputs["x"])
    assert np.array_equal(predictor(x=x), x * 2 - x)


def test_the_only_tensor_needs_no_choice() -> None:
    x = normal(5, 4)
    for wrap in (lambda a: (a,), lambda a: {"a": a, "cache": None}, lambda a: Record(a, None)):  # type: ignore[arg-type]
        predictor = predictor_of(Apply(lambda x, w, wrap=wrap: wrap(x * w)).eval())
        assert np.array_equal(predictor(x), by_hand(Apply(lambda x, w: x * w), x))


@pytest.mark.parametrize("container", ["tuple", "list", "dict", "dataclass", "namedtuple"])
def test_several_outputs_without_a_choice_are_listed(container: str) -> None:
    names = "01" if container in ("tuple", "list", "namedtuple") else ["'a'", "'b'"]
    with pytest.raises(OutputError, match=rf"{names[0]} \(2, 4\), {names[1]} \(2,\): say which"):
        predictor_of(Several(container).eval())(normal(5, 4))


@pytest.mark.parametrize("output", ["c", 2, "note"])
def test_output_that_is_not_there_is_refused(output: str | int) -> None:
    with pytest.raises(OutputError, match=r"'a' \(2, 4\), 'b' \(2,\)|a str, not a tensor"):
        predictor_of(Several("dataclass").eval(), output=output)(normal(5, 4))


def test_function_must_give_a_tensor() -> None:
    with pytest.raises(OutputError, match="a ndarray, not a tensor"):
        predictor_of(mlp(), output=lambda out, _: out.numpy())(normal(5, 4))


@pytest.mark.parametrize("reduce", [lambda x, _: x.sum(), lambda x, _: x.sum(0), lambda x, _: x.mT, lambda x, _: x[:1]])
def test_output_without_rows_is_refused(reduce: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(OutputError, match=r"no row axis.*output=f\(output, inputs\)"):
        predictor_of(Apply(reduce).eval())(normal(5, 4))


def test_bfloat16_comes_back_as_float32() -> None:
    x = normal(5, 4)
    found = predictor_of(mlp().bfloat16())(x)
    with torch.no_grad():
        assert np.array_equal(found, mlp().bfloat16()(torch.from_numpy(x).bfloat16()).float())
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x, _: x > 0, "bool"),
        (lambda x, _: x.argmax(1), "int64"),
        (lambda x, _: torch.fft.rfft(x), "complex64"),
        (lambda x, _: x.double(), "float64"),
        (lambda x, _: x.half(), "float16"),
    ],
)
def test_output_keeps_its_dtype(function: Callable[..., torch.Tensor], dtype: str) -> None:
    x = normal(5, 4)
    found = predictor_of(Apply(function).eval())(x)
    assert found.dtype == dtype
    assert np.array_equal(found, by_hand(Apply(function), x))


@pytest.mark.parametrize("function", [lambda x: x.conj().flip(1)[:, ::2], lambda x: x.conj().imag], ids=["conj", "neg"])
def test_lazy_conjugates_and_views_are_resolved(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = (normal(5, 4) + 1j).astype(np.complex64)
    expected = by_hand(Apply(lambda x, _: function(x).clone().resolve_conj().resolve_neg()), x)
    assert np.array_equal(predictor_of(Apply(lambda x, _: function(x)).eval())(x), expected)


# How it is called


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.layer(x) * scale

    def encode(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.layer(x).tanh() * scale


def test_another_method() -> None:
    model, x = Encoder().eval(), normal(5, 4)
    with torch.no_grad():
        assert np.array_equal(predictor_of(model, method="encode")(x), model.encode(torch.from_numpy(x)))


@pytest.mark.parametrize("method", ["decode", "training"])
def test_missing_method_is_refused(method: str) -> None:
    with pytest.raises(SettingsError, match=f"Encoder has no method '{method}'"):
        predictor_of(Encoder().eval(), method=method)(normal(5, 4))


def test_constants_are_passed_on() -> None:
    model, x = Encoder().eval(), normal(5, 4)
    with torch.no_grad():
        assert np.array_equal(predictor_of(model, scale=3.0)(x), model(torch.from_numpy(x), scale=3.0))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor, weight: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> Any:
        out = self.embedding(ids)
        out = out if weight is None else out * weight[:, None, None]
        return out if mask is None else out * mask[..., None]


def test_inputs_by_position_and_by_keyword() -> None:
    model = Gated().eval()
    ids = np.random.default_rng(0).integers(0, 9, (7, 5))
    weight, mask = normal(7), ids > 3
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, (ids, weight, mask)))
    assert np.array_equal(predictor_of(model)(ids, weight, mask), expected)
    assert np.array_equal(predictor_of(model)(ids, mask=mask, weight=weight), expected)
    assert np.array_equal(predictor_of(model, keywords=("mask", "weight"))(ids, mask, weight), expected)


@pytest.mark.parametrize("batch", [1, 3, 7, 23, 1000])
@pytest.mark.parametrize("rows", [1, 22, 23])
def test_batches_equal_the_plain_loop(rows: int, batch: int) -> None:
    x = normal(rows, 4)
    assert np.array_equal(predictor_of(mlp(), batch_size=batch)(x), by_hand(mlp(), x, batch=batch))


def test_auto_batch_of_few_rows_is_by_the_bytes_of_a_row() -> None:
    predictor = predictor_of(Apply(lambda x, _: x.flatten(1).sum(1)).eval())
    for length, expected in [(1, 1024), (64, 1024), (100, 512), (1 << 12, 16), (1 << 20, 8)]:
        assert predictor.bind([Rows((length,), np.dtype("float32"))]).planned([10]) == expected


@pytest.mark.parametrize("batch", [0, -1, 2.5, "big", None])
def test_impossible_batch_is_refused(batch: Any) -> None:
    with pytest.raises(SettingsError, match=r"batch_size is .*: give a number of rows, or 'auto'"):
        predictor_of(mlp(), batch_size=batch)


def test_number_of_numpy_is_a_batch() -> None:
    predictor = predictor_of(mlp(), batch_size=np.int64(3))
    assert np.array_equal(predictor(normal(5, 4)), by_hand(mlp(), normal(5, 4), batch=3))
    assert predictor.fingerprint() == predictor_of(mlp(), batch_size=3).fingerprint()


def test_no_rows() -> None:
    found = predictor_of(mlp())(np.empty((0, 4), np.float32))
    assert (found.shape, found.dtype) == ((0, 3), np.float32)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_row_axis_squeezed_away_is_put_back(rows: int) -> None:
    model, x = Apply(lambda x, w: (x @ w).squeeze()).eval(), normal(rows, 4)
    assert np.array_equal(predictor_of(model, batch_size=2)(x), by_hand(Apply(lambda x, w: x @ w), x, batch=2))


# The caller's arrays


def layouts() -> dict[str, np.ndarray]:
    x = normal(6, 4)
    readonly = x.copy()
    readonly.flags.writeable = False
    wide = normal(12, 8)
    wide[::2, 1::2] = x
    return {
        "fortran": np.asfortranarray(x),
        "read-only": readonly,
        "big-endian": x.astype(">f4"),
        "strided": wide[::2, 1::2],
        "reversed": x[::-1].copy()[::-1],
        "unaligned": np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(6, 4),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_layout(layout: str) -> None:
    found = layouts()[layout]
    assert not (found.flags.c_contiguous and found.flags.writeable and found.flags.aligned and found.dtype.isnative)
    assert np.array_equal(predictor_of(mlp(), batch_size=4)(found), by_hand(mlp(), normal(6, 4), batch=4))


def test_model_that_writes_to_its_input_does_not_change_the_caller() -> None:
    x = normal(6, 4)
    before = x.copy()
    assert np.array_equal(predictor_of(Apply(lambda x, w: x.mul_(w)).eval())(x), by_hand(Apply(lambda x, w: x * w), x))
    assert np.array_equal(x, before)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (normal(3, 4).astype(object), "dtype object, which is not numeric"),
        (normal(3, 4).astype(str), "dtype <U32, which is not numeric"),
        (np.zeros((3, 4), "M8[s]"), r"dtype datetime64\[s\], which is not numeric"),
        (np.zeros(3, [("a", "f4")]), "which is not numeric"),
        (np.ma.masked_greater(normal(3, 4), 0), r"masked array.*x\.filled"),
        (np.ones(()), "single number"),
        ([[1.0] * 4], "input 0 is a list: give a NumPy or dask array"),
        (torch.ones(3, 4), "input 0 is a Tensor: give a NumPy or dask array"),
    ],
    ids=["object", "str", "datetime", "record", "masked", "0-d", "list", "tensor"],
)
def test_what_is_no_array_of_numbers_is_refused(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predictor_of(mlp())(array)


def test_different_numbers_of_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"different numbers of rows, \[3, 4\]"):
        predictor_of(Gated().eval())(np.zeros((3, 5), int), np.zeros(4))


def test_rows_that_the_model_refuses_name_found_expected_and_layer() -> None:
    with pytest.raises(InputError) as caught:
        predictor_of(mlp())(normal(3, 5))
    for part in (
        "model@1",
        "torch.nn.modules.container.Sequential",
        "input 0 (rows, 5) float32",
        "Linear '0'",
        "in_features=4",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool"])
def test_refused_integers_name_what_no_cast_mends(dtype: str) -> None:
    with pytest.raises(
        InputError, match=rf"found input 0 \(rows, 5\) {dtype}; Linear '0' .* shapes cannot be multiplied"
    ):
        predictor_of(mlp())(np.ones((3, 5), dtype))
    with pytest.raises(InputError, match=r"Linear '1' expects in_features=4"):
        predictor_of(nn.Sequential(nn.Embedding(9, 3), nn.Linear(4, 2)).eval())(np.ones((3, 5), dtype))


def test_rows_of_another_kind_than_bound_to_are_found_anew() -> None:
    predictor = predictor_of(mlp()).bind([Rows((4,), np.dtype("float32"))])
    x = np.random.default_rng(0).integers(0, 9, (5, 4))
    assert np.array_equal(predictor(x), by_hand(mlp(), x.astype(np.float32)))
    with pytest.raises(InputError, match=r"found input 0 \(rows, 5\) float32"):
        predictor(normal(3, 5))


def test_unexpected_input_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'colour' \(rows, 4\) float32.*unexpected keyword argument 'colour'"):
        predictor_of(Encoder().eval())(normal(3, 4), colour=normal(3, 4))


# Modes, branches and state


def with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()).train()


def test_train_mode_is_refused_by_name() -> None:
    model = with_batch_norm()
    model[0].eval()
    with pytest.raises(TrainingModeError, match=r"the model itself, '1', '2'.*training='eval' \(or 'keep'\)"):
        predictor_of(model)


def test_train_mode_changed_to_eval() -> None:
    x = normal(6, 4)
    assert np.array_equal(predictor_of(with_batch_norm(), training="eval")(x), by_hand(with_batch_norm().eval(), x))


class Auxiliary(nn.Module):
    """Gives a second output in train mode, as GoogLeNet does."""

    def forward(self, x: torch.Tensor) -> Any:
        return (x, x.sum(1)) if self.training else x


def test_output_is_that_of_the_chosen_mode() -> None:
    x, ref = normal(6, 4), zc.put(Auxiliary().train(), "model")
    assert np.array_equal(Predictor(ref, training="eval")(x), x)
    assert np.array_equal(Predictor(ref, training="keep", output=0)(x), x)


def test_train_mode_kept() -> None:
    x = normal(6, 4)
    assert np.array_equal(predictor_of(with_batch_norm(), training="keep")(x), by_hand(with_batch_norm(), x))


def test_modes_of_one_model_do_not_mix() -> None:
    x, ref = normal(6, 4), zc.put(with_batch_norm(), "model")
    for training in ("keep", "eval", "keep", "eval"):
        model = with_batch_norm().train(training == "keep")
        residents.clear()
        assert np.array_equal(Predictor(ref, training=training)(x), by_hand(model, x))


def test_impossible_training_is_refused() -> None:
    with pytest.raises(SettingsError, match="choose 'refuse', 'eval' or 'keep'"):
        predictor_of(mlp(), training="off")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.isnan(x).any().item()
        return self.layer(x) if x.sum().item() > 0 else -self.layer(x)


def test_branches_on_data_are_found_with_two_real_rows(caplog: pytest.LogCaptureFixture) -> None:
    x = normal(9, 4)
    with caplog.at_level(logging.INFO, "zcinfer"):
        found = predictor_of(Branches().eval(), batch_size=2)(x)
    assert "two rows were run on the CPU" in caplog.text
    torch.manual_seed(0)
    assert found.shape == (9, 3)
    model = zc.load("model")
    assert np.array_equal(found, by_hand(model, x, batch=2))


def test_real_rows_are_asked_for_only_where_needed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcinfer.predictor._found", OrderedDict())  # what other tests have found
    asked = []

    def sample() -> list[np.ndarray]:
        asked.append(1)
        return [normal(2, 4)]

    with caplog.at_level(logging.INFO, "zcinfer"):
        predictor_of(mlp()).bind([rows_of(normal(2, 4))], sample)
    assert not asked
    assert "two rows" not in caplog.text
    predictor_of(Branches().eval()).bind([rows_of(normal(2, 4))], sample)
    assert asked == [1]


@pytest.mark.parametrize("rows", [0, 1])
def test_branches_on_data_with_fewer_than_two_rows(rows: int) -> None:
    assert predictor_of(Branches().eval())(normal(2, 4)[:rows]).shape == (rows, 3)


class Counting(nn.Module):
    """Adds the number of calls so far, which it keeps in a buffer."""

    calls: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "in place":
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return x + self.calls


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_model_that_writes_its_buffers_gives_every_block_the_same(how: str, caplog: pytest.LogCaptureFixture) -> None:
    predictor = predictor_of(Counting(how).eval(), batch_size=2)
    x = np.zeros((6, 1), np.float32)
    with caplog.at_level(logging.WARNING, "zcinfer"):
        blocks = [predictor(x).ravel().tolist() for _ in range(3)]
    assert blocks == [[1, 1, 2, 2, 3, 3]] * 3
    assert caplog.text.count("wrote to its own weights, buffers or attributes") == 1


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x > 1e6).any():
            raise ValueError("too large")
        return self.layer(x)


def test_failing_row_names_rows_and_version() -> None:
    x = normal(20, 4)
    x[13] = 1e7
    with pytest.raises(BlockError, match=r"the rows given, rows 12–13, of model@1: .*ValueError: too large") as caught:
        predictor_of(Refusing().eval(), batch_size=2)(x)
    assert isinstance(caught.value.__cause__, ValueError)


def test_resident_that_failed_is_not_used_again() -> None:
    predictor = predictor_of(Refusing().eval(), batch_size=2)
    with pytest.raises(BlockError):
        predictor(np.array([[0], [0], [1e7]], np.float32).repeat(4, axis=1))
    assert np.array_equal(predictor(normal(3, 4)), by_hand(zc.load("model"), normal(3, 4), batch=2))


def test_output_of_another_shape_than_found_names_both() -> None:
    def grows(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() < 100 else x.repeat(1, 2)

    x = np.ones((6, 4), np.float32)
    x[5] = 100
    with pytest.raises(BlockError, match=r"rows 4–5, .*shape \(2, 8\), expected \(2, \.\.\.\) as \(rows, 4\) float32"):
        predictor_of(Apply(grows).eval(), batch_size=2)(x)


def test_device_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="device is 'gpu': choose one like"):
        predictor_of(mlp(), device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_device_that_is_not_there_names_the_block() -> None:
    with pytest.raises(BlockError, match="the rows given, of model@1: it cannot be used on cuda"):
        predictor_of(mlp(), device="cuda")(normal(3, 4))


# As a value


def run_script(directory: Path, text: str, *arguments: str, **environment: str) -> str:
    script = directory / "script.py"
    script.write_text(text)
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_a_function_refers_to_may_change() -> None:
    zc.put(nn.Identity().eval(), "same")
    x = np.array([[1], [2], [3]], np.float32)
    kinds = [""]

    def as_kind(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (y * 1.5).astype(kinds[0])

    predictor = zc.Predictor("same", postprocess=as_kind)
    for kind, expected in (("int64", [1, 3, 4]), ("float32", [1.5, 3, 4.5])):
        kinds[0] = kind
        sent = cloudpickle.loads(cloudpickle.dumps(predictor))
        assert predictor(x).ravel().tolist() == sent(x).ravel().tolist() == expected


def test_an_output_of_another_kind_than_was_found_is_refused() -> None:
    zc.put(nn.Identity().eval(), "same")
    x = np.array([[1], [2], [3]], np.float32)
    kinds = ["float32", "int64"]

    def turns(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return y.astype(kinds[-1])

    predictor = zc.Predictor("same", postprocess=turns).bind([rows_of(x)])
    assert predictor(x).dtype == np.int64
    kinds[-1] = "float32"  # of which integers would keep a part
    with pytest.raises(BlockError, match="the output is float32, expected int64, found before the job began"):
        predictor(x)


def test_pickle_is_small_and_works_in_a_process_of_other_settings(tmp_path: Path) -> None:
    x = normal(20, 4)
    model = mlp()
    model.register_buffer("ballast", torch.zeros(1_000_000))
    predictor = predictor_of(model, batch_size=8).bind([rows_of(x)])
    text = pickle.dumps(predictor)
    assert len(text) < 2000
    (tmp_path / "predictor").write_bytes(text)
    np.save(tmp_path / "x.npy", x)
    script = """
import pickle, sys
import numpy as np
predictor = pickle.load(open(sys.argv[1] + "/predictor", "rb"))
np.save(sys.argv[1] + "/y.npy", predictor(np.load(sys.argv[1] + "/x.npy")))
"""
    run_script(tmp_path, script, str(tmp_path), DASK_ZCINFER__REGISTRY=str(tmp_path / "elsewhere"))
    assert np.array_equal(np.load(tmp_path / "y.npy"), by_hand(mlp(), x, batch=8))


def test_pickle_carries_a_function_by_value() -> None:
    predictor = predictor_of(mlp(), output=lambda out, _: out * 2)
    again = pickle.loads(cloudpickle.dumps(predictor))
    assert np.array_equal(again(normal(3, 4)), by_hand(mlp(), normal(3, 4)) * 2)


FINGERPRINT = """
import torch
import zcinfer as zc

FACTOR = 2

def pool(output, inputs):
    return output.mean(1) * FACTOR * len({"a", "b", "c"})

class Model(torch.nn.Module):
    kinds = {"red", "green", "blue"}
    def forward(self, x):
        return x + 1

def fingerprint():
    return zc.Predictor("main-model", output=pool, words={"x", "y", "z"}, weights=torch.arange(3)).fingerprint()

zc.connect("file")
zc.put(Model().eval(), "main-model")
print(fingerprint())
FACTOR = 3
print(fingerprint())
"""


@pytest.mark.slow
def test_fingerprint_is_equal_in_all_processes(tmp_path: Path) -> None:
    settings = {"DASK_ZCINFER__REGISTRY": str(tmp_path / "registry")}
    first, second = (run_script(tmp_path, FINGERPRINT, PYTHONHASHSEED=seed, **settings) for seed in ("1", "2"))
    assert first == second
    assert len(set(first.split())) == 2


def test_fingerprint_tells_settings_apart() -> None:
    ref = zc.put(mlp(), "model")
    settings: list[dict[str, Any]] = [
        {},
        {"batch_size": 8},
        {"output": 0},
        {"output": lambda out, _: out + 1},
        {"output": lambda out, _: out + 2},
        {"method": "encode"},
        {"training": "eval"},
        {"device": "cpu"},
        {"keywords": ("x",)},
        {"scale": 1.0},
        {"scale": 2.0},
    ]
    assert len({Predictor(ref, **given).fingerprint() for given in settings}) == len(settings)
    assert Predictor(ref).fingerprint() == Predictor("model").fingerprint()


def test_repr_says_model_and_batch() -> None:
    assert repr(predictor_of(mlp(), batch_size=8)) == "Predictor('model@1', batch_size=8)"


def test_going_back_to_a_resident_takes_under_100_microseconds() -> None:
    # As many tensors as BERT-base has.
    ref = zc.put(nn.Sequential(*(nn.Linear(8, 8) for _ in range(100))).eval(), "model")
    seconds = []
    for _ in range(200):
        begin = perf_counter()
        with residents.lend(ref, "cpu", "refuse"):
            seconds.append(perf_counter() - begin)
    assert statistics.median(seconds[1:]) < 100e-6


def test_output_function_that_fails_is_named() -> None:
    with pytest.raises(OutputError, match="the output function wrong failed: KeyError: 'no such'"):
        predictor_of(torch.nn.Linear(2, 2).eval(), output=wrong)(np.ones((3, 2), np.float32))


def wrong(output: Any, inputs: Any) -> torch.Tensor:
    raise KeyError("no such")


def test_unsigned_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(zc.ZcinferError, match="uint64 values up to"):
        predictor_of(torch.nn.Identity().eval())(np.array([[2**63 + 2048]], np.uint64))


# What was found, for those who come with every request


class Told(nn.Module):
    """Tells of each time that it is run."""

    runs: list[tuple[int, ...]] = []  # noqa: RUF012 - of all copies of it

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs.append(tuple(x.shape))
        return x + 1, x.sum(1)


def test_predictor_that_is_sent_anew_finds_what_another_found() -> None:
    arriving = pickle.dumps(predictor_of(Told().eval(), output=0))
    Told.runs.clear()
    np.testing.assert_array_equal(pickle.loads(arriving)(normal(5, 4)), normal(5, 4) + 1)
    assert len(Told.runs) > 1  # without weights, and then the rows themselves
    Told.runs.clear()
    np.testing.assert_array_equal(pickle.loads(arriving)(normal(5, 4)), normal(5, 4) + 1)
    assert Told.runs == [(5, 4)]


def test_what_was_found_is_for_the_same_settings_and_rows_alone() -> None:
    first = predictor_of(Told().eval(), output=0)
    assert first(normal(5, 4)).shape == (5, 4)
    assert first(normal(5, 3)).shape == (5, 3)
    assert Predictor(first.ref, output=1)(normal(5, 4)).shape == (5,)
    assert Predictor(first.ref, output=lambda output, _: output[0][:, :2])(normal(5, 4)).shape == (5, 2)
    other = predictor_of(nn.Sequential(nn.Linear(4, 7)).eval())
    assert other(normal(5, 4)).shape == (5, 7)
