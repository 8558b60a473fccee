"""What a model takes and gives, found without its weights; and errors that name the layer."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import zcinfer as zc
from zcinfer import loading
from zcinfer.parts import split
from zcinfer.predictor import Predictor
from zcinfer.probing import explain, weightless
from zcinfer.rows import Rows


def error_of(model: nn.Module, *inputs: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        model(*inputs)
    return caught.value


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(4, 2), (3, 5), "Linear expects in_features=4, RuntimeError: mat1 and mat2"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), (3, 5), "Linear '1' expects in_features=4, "),
        (nn.ModuleDict({"a": nn.Conv2d(3, 2, 1)})["a"], (3, 5, 2, 2), "Conv2d expects in_channels=3, "),
        (nn.Sequential(nn.Sequential(nn.LayerNorm(4))), (3, 5), "LayerNorm '0.0' expects normalized_shape=(4,), "),
        (nn.LSTM(4, 2), (3, 2, 5), "LSTM expects input_size=4, "),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (7, 7))), (3, 5), "in Unflatten '1': RuntimeError: "),
    ],
)
def test_error_names_the_layer_and_what_it_expects(model: nn.Module, shape: tuple[int, ...], expected: str) -> None:
    assert explain(error_of(model, torch.zeros(shape))).startswith(expected)


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("first line\n  second line\n")


def test_error_of_the_model_s_own_code_names_its_class() -> None:
    assert explain(error_of(nn.Sequential(Own()), torch.zeros(1))) == "in Own '0': ValueError: first line second line"


def test_error_outside_any_layer_is_told_as_it_is() -> None:
    assert explain(ValueError("no such thing.")) == "ValueError: no such thing"


def test_shape_is_found_without_loading_weights(registry: Any) -> None:
    ref = zc.put(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)).eval(), "model")
    before = len(loading.loads)
    binding = Predictor(ref).bind([Rows((3, 8, 8), np.dtype("uint8"))]).binding
    assert binding is not None
    assert binding.output == Rows((5,), np.dtype("float32"))
    assert binding.casts == ("float32",)
    assert len(loading.loads) == before


def test_shape_of_a_real_architecture_with_a_mask(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    ref = zc.put(transformers.BertModel(config).eval(), "bert")
    predictor = Predictor(ref, output="last_hidden_state", keywords=("input_ids", "attention_mask"))
    with caplog.at_level(logging.INFO, "zcinfer"):
        binding = predictor.bind([Rows((6,), np.dtype("int32")), Rows((6,), np.dtype("bool"))]).binding
    assert binding is not None
    assert binding.output == Rows((6, 8), np.dtype("float32"))
    assert "two rows" not in caplog.text


class Positions(nn.Module):
    """Makes tensors of its own, as position ids are made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.offset + torch.arange(x.shape[1]))


def test_weightless_model_has_fake_tensors_and_the_real_one_none() -> None:
    model = Positions()
    parts = split(model)
    with weightless(parts.skeleton, parts.description) as fake:
        assert {type(tensor) for tensor in fake.state_dict().values()} == {FakeTensor}
        assert fake(torch.empty(7, 4)).shape == (7, 2)
    assert type(torch.empty(1)) is torch.Tensor
    assert not any(isinstance(tensor, FakeTensor) for tensor in model.state_dict().values())


def test_integers_are_tried_on_kernels_only_where_small() -> None:
    parts = split(nn.Softmax(-1))
    with weightless(parts.skeleton, parts.description) as fake:
        with pytest.raises(NotImplementedError, match="not implemented for 'Int'"):
            fake(torch.empty((2, 8), dtype=torch.int32))
        # 16 TB, if it were more than a shape.
        assert fake(torch.empty((2, 1 << 41), dtype=torch.int32)).shape == (2, 1 << 41)


def test_fake_tensor_s_log_is_quiet_inside_alone(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    parts = split(nn.Linear(4, 2))
    with weightless(parts.skeleton, parts.description) as fake:
        assert logger.disabled
        with pytest.raises(RuntimeError):
            fake(torch.empty(3, 5))
    assert not logger.disabled
    assert caplog.text == ""
