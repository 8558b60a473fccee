"""Which rows go together, and what is done where they do not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

import zcinfer as zc
from zcinfer.batches import Lengths, in_halves
from zcinfer.errors import BlockError, InputError

pytestmark = pytest.mark.usefixtures("registry")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config).eval()


def tokens(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, length + 1, rows)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return random.integers(1, 50, (rows, length)) * mask, mask


@pytest.mark.parametrize("output", ["pooler_output", "last_hidden_state"])
def test_sorted_by_length_the_results_are_in_the_order_of_the_inputs(output: str) -> None:
    model = bert()
    zc.put(model, "bert")
    ids, mask = tokens(50, 24)
    lazy = zc.predict(
        "bert",
        input_ids=da.from_array(ids, chunks=(20, 24)),
        attention_mask=da.from_array(mask, chunks=(20, 24)),
        output=output,
        batch_size=8,
        sort_by="length",
    )
    with torch.no_grad():
        right = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[output].numpy()
    found = lazy.compute(scheduler="sync")
    if output == "last_hidden_state":
        assert found.shape == right.shape
        right, found = right[mask == 1], found[mask == 1]  # what padding gives is nobody's concern
    assert np.allclose(found, right, atol=2e-6)


def test_each_batch_is_cut_to_its_longest_row() -> None:
    seen: list[tuple[int, int]] = []

    class Looking(nn.Module):
        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            if type(ids) is torch.Tensor:
                seen.append(tuple(ids.shape))  # type: ignore[arg-type]
            return (ids * attention_mask).sum(1)

    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    ids = np.arange(20).reshape(5, 4)
    zc.put(Looking().eval(), "looking")
    found = zc.predict("looking", ids, attention_mask=mask, batch_size=2, sort_by="length")
    assert np.array_equal(found, (ids * mask).sum(1))
    lengths = Lengths([ids, mask], ["attention_mask"], "length")
    assert lengths.lengths.tolist() == [2, 4, 1, 1, 3]
    assert lengths.order.tolist() == [1, 4, 0, 2, 3]


def test_a_mask_is_of_rows_and_tokens() -> None:
    zc.put(bert(), "bert")
    ids, mask = tokens(4, 6)
    with pytest.raises(
        InputError, match=r"'attention_mask' is \(rows, 1, 1, 6\) int64: rows are sorted by a mask of shape"
    ):
        zc.predict("bert", input_ids=ids, attention_mask=mask[:, None, None], output=1, sort_by="length")


@given(rows=st.integers(1, 70), fits=st.integers(1, 70), most=st.integers(1, 80))
def test_halves_give_what_the_whole_would(rows: int, fits: int, most: int) -> None:
    calls: list[int] = []
    told: list[int] = []

    def run(batch: Any) -> list[np.ndarray]:
        calls.append(len(batch[0]))
        if len(batch[0]) > fits:
            raise MemoryError
        return [batch[0] * 2, batch[1][:, None]]

    x, y = np.arange(rows), np.arange(rows) * 3
    double, other = in_halves(
        run,
        [x, y],
        lambda: min([most, *(rows // 2 for rows in told)]),
        lambda e: isinstance(e, MemoryError),
        told.append,
    )
    assert np.array_equal(double, x * 2)
    assert np.array_equal(other, y[:, None] * 1)
    assert all(count > fits for count in told)
    assert max(calls) <= max(most, 1)
    assert sum(count > fits for count in calls) == len(told) <= 8 * rows


def test_halves_of_a_model_that_gives_its_own_memory() -> None:
    """As a module does that writes its results to a buffer that it has."""
    buffer, told = np.empty(8, np.int64), []

    def run(batch: Any) -> list[np.ndarray]:
        if len(batch[0]) > 2:
            raise MemoryError
        out = buffer[: len(batch[0])]
        np.multiply(batch[0], 2, out=out)
        return [out]

    x = np.arange(8)
    (found,) = in_halves(run, [x], lambda: None, lambda error: isinstance(error, MemoryError), told.append)
    assert np.array_equal(found, x * 2)


class Hungry(nn.Module):
    """Fails as torch does where memory ends, above so many rows."""

    def __init__(self, most: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.most = most
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and len(x) > self.most:
            raise self.error()
        return x.cumsum(1)


def no_room() -> Exception:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("error", [no_room, torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    zc.put(Hungry(7, error).eval(), "hungry")
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    with caplog.at_level(logging.WARNING, "zcinfer"):
        found = zc.predict("hungry", x, batch_size=32)
    assert np.array_equal(found, torch.from_numpy(x).cumsum(1).numpy())
    assert [record.args and record.args[1] for record in caplog.records] == [32, 16, 8]
    caplog.clear()
    assert np.array_equal(zc.predict("hungry", x, batch_size=32), torch.from_numpy(x).cumsum(1).numpy())
    assert not caplog.records  # it is remembered


def test_a_row_that_does_not_fit_is_told() -> None:
    zc.put(Hungry(0, no_room).eval(), "hungry")
    with pytest.raises(BlockError, match=r"one row \(12 B\) does not fit into the memory of cpu: .*can't allocate"):
        zc.predict("hungry", np.zeros((4, 3), np.float32), batch_size=4)
