"""``predict`` over arrays: lazy, chunked as the input is, and bit for bit what plain torch computes block by block."""

from __future__ import annotations

import importlib
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import torch
from dask.array.utils import assert_eq
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, ModelCodeMissing, SettingsError
from zcinfer.predictor import Predictor

pytestmark = pytest.mark.usefixtures("registry")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3)).eval()


def by_hand(model: nn.Module, chunks: tuple[int, ...], batch: int, *inputs: np.ndarray) -> np.ndarray:
    """Plain torch, batch by batch within each block."""
    outputs, start = [], 0
    with torch.no_grad():
        for length in chunks:
            for first in range(start, start + length, batch):
                stop = min(first + batch, start + length)
                outputs.append(model(*(torch.from_numpy(x[first:stop].copy()) for x in inputs)))
            start += length
    return torch.cat(outputs).numpy()


def nothing_is_computed() -> Any:
    """While this holds, computing anything fails."""

    def refuse(graph: Any, keys: Any, **_: Any) -> None:
        raise AssertionError("something was computed")

    return dask.config.set(scheduler=refuse)


def compute(array: da.Array) -> np.ndarray:
    result: np.ndarray = array.compute(scheduler="sync")
    return result


class Pair(nn.Module):
    """Takes ``(rows, tokens)`` ids and ``(rows,)`` weights; gives ``(rows, tokens, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 3)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids) * weights[:, None, None]


class Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x > 1e6).any():
            raise ValueError("too large")
        return x


class Both(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], 1)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return x * factor


# In and out


def test_numpy_in_numpy_out() -> None:
    ref, x = zc.put(mlp(), "model"), normal(10, 4)
    found = zc.predict("model", x, batch_size=4)
    assert type(found) is np.ndarray
    assert np.array_equal(found, by_hand(mlp(), (10,), 4, x))
    assert np.array_equal(found, zc.predict(ref, x, batch_size=4))


def test_dask_in_lazy_dask_out() -> None:
    zc.put(mlp(), "model")
    x = normal(10, 4)
    with nothing_is_computed():
        y = zc.predict("model", da.from_array(x, chunks=(4, 4)), batch_size=3)
        assert isinstance(y, da.Array)
    assert (y.shape, y.dtype, y.chunks, type(y._meta)) == ((10, 3), np.float32, ((4, 4, 2), (3,)), np.ndarray)
    assert_eq(y, by_hand(mlp(), (4, 4, 2), 3, x), scheduler="sync")
    assert np.array_equal(compute(y), by_hand(mlp(), (4, 4, 2), 3, x))


def test_any_chunks_and_batch_equal_the_plain_loop() -> None:
    zc.put(mlp(), "model")

    @given(chunks=st.lists(st.integers(0, 9), min_size=1, max_size=5), batch=st.integers(1, 12))
    @settings(max_examples=40, deadline=None)
    def check(chunks: list[int], batch: int) -> None:
        x = normal(sum(chunks), 4)
        y = zc.predict("model", da.from_array(x, chunks=(tuple(chunks), 4)), batch_size=batch)
        assert y.chunks == (tuple(chunks), (3,))
        expected = by_hand(mlp(), tuple(chunks), batch, x) if len(x) else np.empty((0, 3), np.float32)
        assert np.array_equal(compute(y), expected)

    check()


SHAPES: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "1-D to 1-D": ((20,), lambda x: x * 2),
    "1-D to 2-D": ((20,), lambda x: x[:, None] * torch.arange(3)),
    "1-D to 4-D": ((20,), lambda x: x[:, None, None, None].expand(-1, 2, 3, 4)),
    "2-D to 1-D": ((20, 4), lambda x: x.sum(1)),
    "2-D to 2-D": ((20, 4), lambda x: x[:, :3]),
    "2-D to 4-D": ((20, 4), lambda x: x[:, :, None, None].expand(-1, -1, 2, 3)),
    "4-D to 1-D": ((20, 2, 3, 4), lambda x: x.sum((1, 2, 3))),
    "4-D to 2-D": ((20, 2, 3, 4), lambda x: x.flatten(1)),
    "4-D to 4-D": ((20, 2, 3, 4), lambda x: x.mT.flip(1)),
    "to no columns": ((20, 4), lambda x: x[:, :0]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_axes_of_input_and_output(name: str) -> None:
    shape, function = SHAPES[name]
    x = normal(*shape)
    zc.put(Apply(function).eval(), "model")
    with nothing_is_computed():
        y = zc.predict("model", da.from_array(x, chunks=(6, *shape[1:])))
    assert_eq(y, function(torch.from_numpy(x)).numpy(), scheduler="sync")


@pytest.mark.parametrize("name", SHAPES)
def test_plain_map_blocks_with_like(name: str) -> None:
    shape, function = SHAPES[name]
    x = normal(*shape)
    predictor = Predictor(zc.put(Apply(function).eval(), "model"))
    array = da.from_array(x, chunks=(6, *shape[1:]))
    with nothing_is_computed():
        y = array.map_blocks(predictor, **predictor.like(array))
    assert_eq(y, function(torch.from_numpy(x)).numpy(), scheduler="sync")


def test_plain_map_blocks_with_two_inputs() -> None:
    ids, other = np.arange(20).reshape(10, 2) % 9, normal(10, 3)
    predictor = Predictor(zc.put(Both().eval(), "model"))
    x, z = da.from_array(ids, chunks=(4, 2)), da.from_array(other, chunks=(4, 3))
    y = x.map_blocks(predictor, z, **predictor.like(x, z))
    assert_eq(y, np.concatenate([ids, other], axis=1, dtype=np.float32), scheduler="sync")


def test_like_refuses_what_map_blocks_would_misalign() -> None:
    predictor = Predictor(zc.put(Pair().eval(), "model"))
    with pytest.raises(InputError, match=r"different numbers of axes: use zcinfer\.predict"):
        predictor.like(da.zeros((10, 2), chunks=5, dtype=int), da.zeros(10, chunks=5))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (da.zeros((6, 4), chunks=2), r"x\.rechunk\(\{1: -1\}\)"),
        (np.zeros((6, 4)), "an input is a ndarray: give dask arrays"),
    ],
)
def test_like_refuses_arrays_that_map_blocks_cannot_take(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Predictor(zc.put(mlp(), "model")).like(array)


# Several inputs


@pytest.mark.parametrize("how", ["position", "keyword", "mixed"])
def test_inputs_of_different_axes(how: str) -> None:
    model = Pair().eval()
    zc.put(model, "model")
    ids, weights = np.arange(60).reshape(10, 6) % 9, normal(10)
    x, w = da.from_array(ids, chunks=(4, 6)), da.from_array(weights, chunks=4)
    with nothing_is_computed():
        y = {
            "position": lambda: zc.predict("model", x, w),
            "keyword": lambda: zc.predict("model", weights=w, ids=x),
            "mixed": lambda: zc.predict("model", x, weights=w),
        }[how]()
    assert np.array_equal(compute(y), by_hand(model, (4, 4, 2), 1024, ids, weights))


@pytest.mark.parametrize("lazy", ["ids", "weights"])
def test_numpy_beside_dask(lazy: str) -> None:
    model = Pair().eval()
    zc.put(model, "model")
    inputs = {"ids": np.arange(60).reshape(10, 6) % 9, "weights": normal(10)}
    given = inputs | {lazy: da.from_array(inputs[lazy], chunks=(3, *inputs[lazy].shape[1:]))}
    y = zc.predict("model", **given)
    assert y.chunks[0] == (3, 3, 3, 1)
    assert np.array_equal(compute(y), by_hand(model, (3, 3, 3, 1), 1024, *inputs.values()))


def test_row_chunks_are_those_of_the_first_input() -> None:
    model = Pair().eval()
    zc.put(model, "model")
    ids, weights = np.arange(60).reshape(10, 6) % 9, normal(10)
    y = zc.predict("model", da.from_array(ids, chunks=((3, 7), 6)), da.from_array(weights, chunks=5))
    assert y.chunks == ((3, 7), (6,), (3,))
    assert np.array_equal(compute(y), by_hand(model, (3, 7), 1024, ids, weights))


def test_other_axes_are_put_into_one_chunk() -> None:
    zc.put(mlp(), "model")
    x = normal(10, 4)
    with nothing_is_computed():
        y = zc.predict("model", da.from_array(x, chunks=(4, 1)))
    assert y.chunks == ((4, 4, 2), (3,))
    assert np.array_equal(compute(y), by_hand(mlp(), (4, 4, 2), 1024, x))


@pytest.mark.parametrize("lazy", [True, False])
def test_different_numbers_of_rows_are_refused(lazy: bool) -> None:
    zc.put(Pair().eval(), "model")
    ids: Any = np.zeros((10, 6), int)
    with pytest.raises(InputError, match=r"different numbers of rows.*9.* 10"):
        zc.predict("model", da.from_array(ids, chunks=(4, 6)) if lazy else ids, normal(9))


def test_other_values_are_constants() -> None:
    zc.put(Scaled().eval(), "model")
    x = normal(10, 4)
    assert np.array_equal(compute(zc.predict("model", da.from_array(x, chunks=(5, 4)), factor=3)), x * 3)


# Rows whose number is not known


def positive(x: np.ndarray, rows: int) -> da.Array:
    array = da.from_array(x, chunks=(rows, *x.shape[1:]))
    return array[array[(slice(None), *(0,) * (x.ndim - 1))] > 0]


def test_unknown_chunks() -> None:
    zc.put(mlp(), "model")
    x = normal(20, 4)
    with nothing_is_computed():
        y = zc.predict("model", positive(x, 6))
    assert np.isnan(y.shape[0])
    lengths = tuple(int((x[start : start + 6, 0] > 0).sum()) for start in range(0, 20, 6))
    assert np.array_equal(compute(y), by_hand(mlp(), lengths, 1024, x[x[:, 0] > 0]))


def test_unknown_chunks_of_two_inputs() -> None:
    model = Pair().eval()
    zc.put(model, "model")
    ids, weights = np.arange(60).reshape(20, 3) % 9, normal(20)
    lazy = da.from_array(weights, chunks=5)
    y = zc.predict("model", da.from_array(ids, chunks=(5, 3))[lazy > 0], lazy[lazy > 0])
    assert np.array_equal(compute(y), by_hand(model, (20,), 1024, ids[weights > 0], weights[weights > 0]))


@pytest.mark.parametrize("other", [normal(20), da.from_array(normal(20), chunks=10)], ids=["numpy", "dask"])
def test_unknown_beside_known_chunks_is_refused(other: Any) -> None:
    zc.put(Pair().eval(), "model")
    with pytest.raises(InputError, match=r"compute_chunk_sizes\(\)"):
        zc.predict("model", positive(np.ones((20, 3), int), 5), other)


def test_branches_on_data_look_at_the_first_rows_alone() -> None:
    zc.put(Refusing().eval(), "model")
    seen = []

    def source(block_id: tuple[int, ...] = ()) -> np.ndarray:
        seen.append(block_id[0])
        return np.ones((5, 4), np.float32)

    x = da.map_blocks(source, chunks=((5,) * 4, (4,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))
    y = zc.predict("model", x)
    assert set(seen) == {0}
    assert compute(y).shape == (20, 4)


def test_branches_on_data_with_unknown_chunks() -> None:
    zc.put(Refusing().eval(), "model")
    x = normal(20, 4)
    assert np.array_equal(compute(zc.predict("model", positive(x, 6))), x[x[:, 0] > 0])


# What is refused when the graph is built


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (da.zeros((), dtype="f4"), "single number"),
        (np.zeros((), "f4"), "single number"),
        (da.ma.masked_greater(da.zeros((6, 4), dtype="f4"), 0), r"masked array.*x\.filled"),
        (da.zeros((6, 4), dtype=object, chunks=6), "dtype object, which is not numeric"),
        (da.zeros((6, 4), dtype="U3"), "dtype <U3, which is not numeric"),
        ([[1.0] * 4], "input 0 is a list: give a NumPy or dask array"),
        (da.zeros((6, 5), dtype="f4"), r"found input 0 \(rows, 5\) float32; Linear '0' expects in_features=4"),
    ],
    ids=["0-d", "0-d numpy", "masked", "object", "str", "list", "shape"],
)
def test_impossible_input_is_refused_before_any_work(array: Any, message: str) -> None:
    zc.put(mlp(), "model")
    with pytest.raises(InputError, match=message):
        zc.predict("model", array)


def test_no_input_is_refused() -> None:
    zc.put(mlp(), "model")
    with pytest.raises(InputError, match="no input given"):
        zc.predict("model", factor=3)


def test_predictor_keeps_its_own_settings() -> None:
    predictor = Predictor(zc.put(Pair().eval(), "model"), keywords=("weights",), batch_size=4)
    ids, weights = np.arange(60).reshape(10, 6) % 9, normal(10)
    expected = by_hand(Pair().eval(), (10,), 4, ids, weights)
    assert np.array_equal(zc.predict(predictor, ids, weights), expected)
    assert np.array_equal(zc.predict(predictor, ids=ids, weights=weights), expected)
    assert (predictor.keywords, predictor.binding) == (("weights",), None)


@pytest.mark.parametrize("setting", [{"batch_size": 4}, {"output": 0}, {"device": "cpu"}, {"factor": 3}], ids=str)
def test_predictor_with_other_settings_is_refused(setting: dict[str, Any]) -> None:
    predictor = Predictor(zc.put(Scaled().eval(), "model"))
    with pytest.raises(SettingsError, match="a Predictor brings its own settings"):
        zc.predict(predictor, normal(3, 4), **setting)


# The graph


def graph_bytes(array: da.Array) -> int:
    return len(cloudpickle.dumps(dict(array.__dask_graph__())))


@pytest.mark.parametrize("hidden", [8, 100_000])
@pytest.mark.parametrize("optimised", [True, False])
def test_a_hundred_blocks_put_under_100_kb_into_the_graph(hidden: int, optimised: bool) -> None:
    # 100,000: 52 MB of weights
    zc.put(nn.Sequential(nn.Linear(128, hidden), nn.Linear(hidden, 2)).eval(), "model")
    x = da.zeros((1000, 128), chunks=(10, 128), dtype="f4")
    y = zc.predict("model", x)
    if optimised:
        x, y = dask.optimize(x)[0], dask.optimize(y)[0]
    assert len(y.chunks[0]) == 100
    assert graph_bytes(y) - graph_bytes(x) < 100_000


def test_same_call_gives_the_same_keys() -> None:
    zc.put(mlp(), "model")
    x = da.from_array(normal(10, 4), chunks=(4, 4))
    assert zc.predict("model", x).name == zc.predict("model", x).name
    names = {
        zc.predict("model", x).name,
        zc.predict("model", x, batch_size=3).name,
        zc.predict("model", x + 1).name,
        zc.predict("model", x, output=lambda out, _: out * 2).name,
    }
    assert len(names) == 4


def test_name_means_its_version_when_the_graph_was_built() -> None:
    zc.put(Apply(lambda x: x + 1).eval(), "model")
    x = da.zeros((4, 2), chunks=2)
    y = zc.predict("model", x)
    zc.put(Apply(lambda x: x + 2).eval(), "model")
    assert compute(y).max() == 1
    assert compute(zc.predict("model", x)).max() == 2
    assert compute(zc.predict("model@1", x)).max() == 1


@pytest.mark.parametrize(("rows", "blocks"), [(slice(0, 250), [0, 1, 2]), (slice(450, 460), [4]), ([5, 905], [0, 9])])
def test_slices_compute_their_blocks_alone(rows: Any, blocks: list[int]) -> None:
    zc.put(mlp(), "model")
    seen: list[int] = []

    def source(block_id: tuple[int, ...] = ()) -> np.ndarray:
        seen.append(block_id[0])
        return normal(1000, 4)[block_id[0] * 100 : block_id[0] * 100 + 100]

    x = da.map_blocks(source, chunks=((100,) * 10, (4,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))
    found = compute(zc.predict("model", x)[rows])
    assert sorted(seen) == blocks
    assert np.array_equal(found, by_hand(mlp(), (100,) * 10, 1024, normal(1000, 4))[rows])


def test_reductions_over_fused_blocks() -> None:
    zc.put(mlp(), "model")
    x = normal(1000, 4)
    y = zc.predict("model", da.from_array(x, chunks=(100, 4)) * 2)
    expected = da.from_array(by_hand(mlp(), (100,) * 10, 1024, x * 2), chunks=(100, 3))
    assert np.array_equal(compute(y.sum(axis=0)), compute(expected.sum(axis=0)))
    assert np.array_equal(compute((y + 1).mean()), compute((expected + 1).mean()))


def test_predictions_of_predictions() -> None:
    zc.put(mlp(), "first")
    zc.put(nn.Linear(3, 2).eval(), "second")
    x = normal(10, 4)
    y = zc.predict("second", zc.predict("first", da.from_array(x, chunks=(4, 4))))
    both = nn.Sequential(mlp(), zc.load("second"))
    assert np.array_equal(compute(y), by_hand(both, (4, 4, 2), 1024, x))


@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 1, 1)])
def test_blocks_are_not_copied_on_their_way(shape: tuple[int, ...]) -> None:
    zc.put(Apply(lambda x: x.flatten(1).sum(1)).eval(), "model")
    length = 1 << 17
    x = da.map_blocks(
        lambda: np.zeros((length, *shape), "f4"),
        chunks=((length,) * 2, *((n,) for n in shape)),
        dtype="f4",
        meta=np.empty((0,) * (1 + len(shape)), "f4"),
    )
    y = zc.predict("model", x, batch_size=64)
    tracemalloc.start()
    try:
        compute(y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * length * 16 + 2 * length * 4  # one block, and all results


def test_model_that_writes_to_its_input_does_not_change_other_tasks() -> None:
    zc.put(Apply(lambda x: x.add_(1)).eval(), "model")
    x = da.from_array(normal(10, 4), chunks=(5, 4)) * 2
    found, source = dask.compute(zc.predict("model", x), x, scheduler="sync")
    assert np.array_equal(source, normal(10, 4) * 2)
    assert np.array_equal(found, source + 1)


# Errors while computing


def with_bad_row(row: int) -> da.Array:
    x = normal(100, 4)
    x[row] = 1e7
    return da.from_array(x, chunks=(20, 4))


def test_failing_row_names_block_rows_and_version() -> None:
    zc.put(mlp(), "model")
    zc.put(Refusing().eval(), "model")
    y = zc.predict("model", with_bad_row(47), batch_size=4)
    with pytest.raises(BlockError, match=r"block 2, rows 44–47, of model@2: in Refusing: ValueError: too large"):
        compute(y)
    assert np.array_equal(compute(y[:40]), normal(100, 4)[:40])


def test_failing_row_of_plain_map_blocks_is_counted_in_its_block() -> None:
    predictor = Predictor(zc.put(Refusing().eval(), "model"), batch_size=4)
    x = with_bad_row(47)
    with pytest.raises(BlockError, match="block 2, rows 4–7 of the block, of model@1"):
        compute(x.map_blocks(predictor, **predictor.like(x)))


def test_failing_row_of_unknown_chunks_is_counted_in_its_block() -> None:
    zc.put(Refusing().eval(), "model")
    x = with_bad_row(47)
    with pytest.raises(BlockError, match=r"block 2, rows \d+–\d+ of the block, of model@1"):
        compute(zc.predict("model", x[x[:, 0] > 0], batch_size=4))


def test_blocks_of_other_lengths_than_announced_are_refused() -> None:
    zc.put(Pair().eval(), "model")
    weights = normal(20)
    chosen = da.from_array(weights, chunks=10)[da.from_array(weights, chunks=10) > 0]
    y = zc.predict("model", da.zeros((20, 3), chunks=10, dtype=int), chosen)
    with pytest.raises(InputError, match=r"block \d: the inputs have different numbers of rows"):
        compute(y)


# On a cluster


def test_cluster_computes_the_same(client: Client) -> None:
    zc.put(mlp(), "model")
    x = normal(100, 4)
    y = zc.predict(
        "model", da.from_array(x, chunks=(7, 4)), batch_size=3, output=lambda out, inputs: out - inputs[0][:, :3]
    )
    expected = by_hand(mlp(), (7,) * 14 + (2,), 3, x) - x[:, :3]
    # The workers have other numbers of threads.
    assert np.allclose(y.compute(), expected, rtol=0, atol=1e-6)
    assert np.array_equal(y.compute(), y.compute())


def test_errors_from_a_cluster_name_block_rows_and_version(client: Client) -> None:
    zc.put(Refusing().eval(), "model")
    y = zc.predict("model", with_bad_row(47), batch_size=4)
    with pytest.raises(BlockError, match=r"block 2, rows 44–47, of model@1: in Refusing: ValueError: too large"):
        y.compute()


FARAWAY = """
import torch

class Doubled(torch.nn.Module):
    def forward(self, x):
        return x * 2
"""


@pytest.fixture
def faraway(tmp_path: Path) -> Iterator[Path]:
    """Directory of a module whose model is published, and which this process cannot import any more."""
    (tmp_path / "faraway.py").write_text(FARAWAY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        zc.put(importlib.import_module("faraway").Doubled().eval(), "faraway")
    yield tmp_path
    sys.modules.pop("faraway", None)


def test_missing_code_here_names_the_package(faraway: Path) -> None:
    del sys.modules["faraway"]
    for x in (normal(6, 4), da.from_array(normal(6, 4), chunks=(3, 4))):
        with pytest.raises(
            ModelCodeMissing, match=r"faraway\.Doubled needs code .* make the module 'faraway' importable"
        ):
            zc.predict("faraway", x)


def test_missing_code_on_the_workers_names_the_package(
    client: Client, faraway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(faraway)
    x = normal(6, 4)
    y = zc.predict("faraway", da.from_array(x, chunks=(3, 4)))
    assert np.array_equal(compute(y), x * 2)
    with pytest.raises(ModelCodeMissing, match=r"On every worker, make the module 'faraway' importable"):
        y.compute()


class File:
    """What dask slices without holding it, as an array of a file."""

    def __init__(self, *shape: int):
        self.shape, self.dtype, self.ndim = shape, np.dtype(np.float32), len(shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.ones([len(range(*i.indices(n))) for i, n in zip(index, self.shape, strict=True)], np.float32)


@pytest.mark.parametrize("outputs", [3, 5, 1])
def test_reading_predicting_and_writing_a_block_are_one_task(outputs: int) -> None:
    zc.put(nn.Linear(4, outputs).eval(), "layer")
    x = da.from_array(File(40, 4), chunks=(10, 4), inline_array=True)
    y = zc.predict("layer", x, batch_size=10)
    stored = da.store(y, np.zeros((40, outputs), np.float32), lock=False, compute=False)
    (optimised,) = dask.optimize(stored)
    written = [key for key in optimised.__dask_graph__() if isinstance(key, tuple)]
    assert len(written) == 4
    assert y.chunks == ((10,) * 4, (outputs,))
    assert np.array_equal(y.compute(), zc.predict("layer", np.ones((40, 4), np.float32), batch_size=10))
