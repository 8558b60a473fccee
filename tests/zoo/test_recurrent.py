"""Recurrent layers, whose weights torch also keeps in a list of their own and hands to its kernels flat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

from zoo.compare import assert_same, outputs, round_trip
from zoo.samples import Models, X, ran

SEQUENCE = X[:, None].expand(5, 3, 4).contiguous()
PACKED = pack_sequence([SEQUENCE[:4, 0], SEQUENCE[:2, 1]])


class Decoder(nn.Module):
    """Cells, an initial state that is learnt, and a head that has a recurrent layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4, nonlinearity="relu")])
        self.start = nn.Parameter(torch.randn(1, 4))
        self.recurrent = nn.GRU(4, 4)
        self.head = nn.Linear(4, 12, bias=False)
        self.head.weight = self.recurrent.weight_ih_l0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.start.expand(len(x), -1)
        hidden, _ = self.cells[0](x, (start, start))
        hidden = self.cells[2](self.cells[1](hidden, start), start)
        return self.head(self.recurrent(hidden)[0])


def flattened() -> nn.Module:
    layer = nn.LSTM(4, 3, num_layers=2)
    layer.flatten_parameters()
    return layer


def one_weight_frozen_and_one_exchanged() -> nn.Module:
    layer = nn.GRU(4, 3)
    layer.weight_hh_l0.requires_grad_(False)
    layer.weight_ih_l0 = nn.Parameter(torch.randn(9, 4))
    return layer


MODELS: Models = {
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), (X,)),
    "lstm with a projection": (lambda: nn.LSTM(4, 3, proj_size=2), (X,)),
    "lstm with projections both ways": (
        lambda: nn.LSTM(4, 3, num_layers=2, proj_size=2, bidirectional=True),
        (SEQUENCE,),
    ),
    "lstm, batches first": (lambda: nn.LSTM(4, 3, batch_first=True).eval(), (SEQUENCE,)),
    "lstm without biases": (lambda: nn.LSTM(4, 3, bias=False), (SEQUENCE,)),
    "lstm in float64": (lambda: nn.LSTM(4, 3).double(), (SEQUENCE.double(),)),
    "lstm in bfloat16": (lambda: nn.LSTM(4, 3).bfloat16().eval(), (SEQUENCE.bfloat16(),)),
    "lstm, flattened": (flattened, (SEQUENCE,)),
    "lstm with dropout": (lambda: nn.LSTM(4, 3, num_layers=3, dropout=0.5), (SEQUENCE,)),
    "lstm, packed": (lambda: nn.LSTM(4, 3), (PACKED,)),
    "gru": (lambda: nn.GRU(4, 3), (X,)),
    "gru both ways": (lambda: nn.GRU(4, 3, num_layers=2, bidirectional=True), (SEQUENCE,)),
    "gru with weights exchanged": (one_weight_frozen_and_one_exchanged, (SEQUENCE,)),
    "rnn": (lambda: nn.RNN(4, 3, num_layers=2, nonlinearity="relu"), (SEQUENCE,)),
    "cells and ties": (Decoder, (X,)),
    "lstm with a parametrized weight": (
        lambda: ran(parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), SEQUENCE),
        (SEQUENCE,),
    ),
    "lstm with an old norm": (lambda: nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), (SEQUENCE,)),
}


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_flat_list_of_weights_is_the_weights(make: Any) -> None:
    copy = round_trip(make(4, 3, num_layers=2, bidirectional=True))
    names = [name for layer in copy._all_weights for name in layer]
    assert len(names) == 16
    assert all(weight is getattr(copy, name) for weight, name in zip(copy._flat_weights, names, strict=True))
    assert all(
        reference() is weight for reference, weight in zip(copy._flat_weight_refs, copy._flat_weights, strict=True)
    )


def test_weights_exchanged_or_cast_in_the_copy_are_used() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 3)
    copy = round_trip(model)
    for layer in (model, copy):
        layer.weight_hh_l0 = nn.Parameter(torch.ones(12, 3))
        layer.double()
        layer.flatten_parameters()
    assert copy._flat_weights[1] is copy.weight_hh_l0
    assert outputs(copy, (SEQUENCE.double(),)).found == outputs(model, (SEQUENCE.double(),)).found
    assert_same(model, copy)


def test_a_state_goes_on_from_the_model_to_the_copy() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 3)
    copy = round_trip(model)
    whole, _ = model(SEQUENCE)
    first, state = model(SEQUENCE[:2])
    rest, _ = copy(SEQUENCE[2:], state)
    assert torch.allclose(torch.cat([first, rest]), whole)
    assert torch.equal(rest, model(SEQUENCE[2:], state)[0])
