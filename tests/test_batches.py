"""Which rows go together, and what is done where they do not fit into memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


@given(rows=st.integers(1, 70), fits=st.integers(1, 70), most=st.integers(1, 80), shuffled=st.booleans())
def test_halves_do_what_the_whole_would(rows: int, fits: int, most: int, shuffled: bool) -> None:
    calls: list[int] = []
    told: list[int] = []
    x, result = np.arange(100) * 3, np.full(100, -1)

    def run(part: Any) -> None:
        calls.append(len(x[part]))
        if calls[-1] > fits:
            raise MemoryError
        result[part] = x[part] * 2

    batch = np.random.default_rng(rows).permutation(100)[:rows] if shuffled else slice(7, 7 + rows)
    in_halves(
        run,
        batch,
        lambda: min([most, *(rows // 2 for rows in told)]),
        lambda e: isinstance(e, MemoryError),
        told.append,
    )
    mine = np.zeros(100, bool)
    mine[batch] = True
    assert np.array_equal(result, np.where(mine, x * 2, -1))
    assert all(count > fits for count in told)
    assert max(calls) <= max(most, 1)
    assert sum(count > fits for count in calls) == len(told) <= 8 * rows


class OwnMemory(nn.Module):
    """Writes its results to a buffer that it has, and gives that; has no memory for more than two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("out", torch.zeros(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and len(x) > 2:
            raise MemoryError
        out = self.out[: len(x)]
        return out.copy_(x * 2) if type(x) is torch.Tensor else out + x


def test_halves_of_a_model_that_gives_its_own_memory() -> None:
    zc.put(OwnMemory().eval(), "own-memory")
    x = np.arange(8, dtype=np.float32)[:, None]
    assert np.array_equal(zc.predict("own-memory", x, batch_size=8), x * 2)


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


TIGHT = """
import logging, resource
import numpy as np, psutil, torch
import zcinfer as zc

class First(torch.nn.Module):
    def forward(self, x, attention_mask):
        return x[:, :1] * attention_mask[:, :1]

zc.connect("file")
zc.put(First().eval(), "first")
mask = np.ones((64, 2), np.int8)
x = np.zeros((64, 1 << 22), np.int8)
x[:, 0] = np.arange(64)

def predict(rows):
    return zc.predict("first", x[:rows], attention_mask=mask[:rows], batch_size=64, sort_by="length")

predict(1)
logging.basicConfig(format="%(message)s")
most = psutil.Process().memory_info().vms + (160 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert predict(64).ravel().tolist() == [*range(64)]
"""


def test_a_batch_that_cannot_be_cut_out_of_its_block_is_halved(registry: Path) -> None:
    """Rows that are sorted are copied: here 256 MB, where there are 160. In a process of its own, which keeps them."""
    environment = os.environ | {"DASK_ZCINFER__REGISTRY": str(registry)}
    done = subprocess.run([sys.executable, "-c", TIGHT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "64 rows do not fit into memory, halves of them are tried" in done.stderr
