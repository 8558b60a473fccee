"""Several models over one array: ensembles, and a model for each row."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, OutputError, SettingsError
from zcinfer.predictor import Predictor

pytestmark = pytest.mark.usefixtures("registry")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def model(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, outputs)).eval()


def by_hand(seed: int, x: np.ndarray, batch: int = 1000, outputs: int = 3) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([model(seed, outputs)(part) for part in torch.from_numpy(x).split(batch)]).numpy()


class Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x > 1e6).any():
            raise ValueError("too large")
        return x[:, :3] * 1.0


def test_an_ensemble_reads_each_block_once() -> None:
    for seed in (0, 1):
        zc.put(model(seed), f"m{seed}")
    zc.put(model(2, 5), "m2")
    x = normal(40, 4)
    reads: list[int] = []

    def read(block: np.ndarray) -> np.ndarray:
        reads.append(len(block))
        return block

    lazy = da.from_array(x, chunks=(10, 4)).map_blocks(read, dtype="f4", meta=np.empty((0, 0), "f4"))
    pair = Predictor("m2", output=[lambda output, _: output, lambda output, _: output.sum(1)], batch_size=5)
    one, two, (three, total) = zc.predict([Predictor("m0", batch_size=5), Predictor("m1", batch_size=5), pair], lazy)
    assert not reads
    found = dask.compute(one, two, three, total, scheduler="sync")
    assert reads == [10] * 4
    right = [by_hand(0, x, 5), by_hand(1, x, 5), by_hand(2, x, 5, 5)]
    for y, expected in zip(found, right, strict=False):
        assert np.array_equal(y, expected)
    assert np.allclose(found[3], right[2].sum(1), atol=1e-5)
    at_once = zc.predict(["m0", "m1"], x, batch_size=5)
    assert all(map(np.array_equal, at_once, right[:2]))


def test_an_ensemble_of_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="no model given"):
        zc.predict([], normal(3, 4))
    with pytest.raises(SettingsError, match="no model given"):
        zc.predict_by({}, normal(3, 4), by=np.zeros(3))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rows=st.integers(0, 40), batch=st.integers(1, 12), labels=st.sampled_from(["<U2", "i8", "O"]))
def test_each_row_goes_to_its_model(data: st.DataObject, rows: int, batch: int, labels: str) -> None:
    for seed in range(3):
        zc.put(model(seed), f"m{seed}")
    chunks = [1]
    if rows:
        cuts = sorted(data.draw(st.sets(st.integers(1, rows))) | {rows})
        chunks = np.diff([0, *cuts]).tolist()
    names = np.array(["en", "fr", "de"]).astype(labels) if labels != "i8" else np.array([7, -1, 0])
    which = np.array(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)), int)
    x, by = normal(rows, 4), names[which]
    models = {name: f"m{seed}" for seed, name in enumerate(names.tolist())}
    expected = np.zeros((rows, 3), np.float32)
    start = 0
    for length in chunks if rows else []:
        block = np.arange(start, start + length)
        for seed in range(3):
            mine = block[which[block] == seed]
            if len(mine):
                expected[mine] = by_hand(seed, x[mine], batch)
        start += length
    if rows:
        lazy = zc.predict_by(models, da.from_array(x, chunks=(tuple(chunks), 4)), by=by, batch_size=batch)
        assert np.array_equal(lazy.compute(scheduler="sync"), expected)
        labels_lazy = da.from_array(by, chunks=rows)
        lazy = zc.predict_by(models, da.from_array(x, chunks=(tuple(chunks), 4)), by=labels_lazy, batch_size=batch)
        assert np.array_equal(lazy.compute(scheduler="sync"), expected)
    else:
        assert zc.predict_by(models, x, by=by).shape == (0, 3)


def test_a_label_without_a_model_is_told() -> None:
    zc.put(model(0), "m0")
    x, by = normal(20, 4), np.array(["en"] * 17 + ["fr"] * 3)
    lazy = zc.predict_by({"en": "m0"}, da.from_array(x, chunks=(10, 4)), by=by)
    with pytest.raises(
        BlockError, match=r"block 1: 3 rows have labels without a model \('fr'; rows 17, 18, 19\).*models for 'en'"
    ):
        lazy.compute(scheduler="sync")


def test_a_failing_row_is_named_by_its_place_in_the_array() -> None:
    zc.put(Refusing().eval(), "refusing")
    zc.put(model(0), "m0")
    x = normal(20, 4)
    x[13] = 1e7
    by = np.array([0, 1] * 10)
    lazy = zc.predict_by({0: "m0", 1: "refusing"}, da.from_array(x, chunks=(10, 4)), by=by, batch_size=2)
    with pytest.raises(BlockError, match=r"block 1, rows 11, 13, of refusing@1: .*too large"):
        lazy.compute(scheduler="sync")


def test_models_of_one_array_give_rows_of_one_kind() -> None:
    zc.put(model(0), "m0")
    zc.put(model(2, 5), "m2")
    with pytest.raises(
        OutputError, match=r"m0@1 \('a'\) gives \(rows, 3\) float32 and m2@1 \('b'\) \(rows, 5\) float32"
    ):
        zc.predict_by({"a": "m0", "b": "m2"}, normal(3, 4), by=np.array(["a", "b", "a"]))
    best = zc.predict_by(
        {"a": "m0", "b": "m2"}, x := normal(3, 4), by=np.array(["a", "b", "a"]), postprocess=lambda y: y.argmax(1)
    )
    assert best.tolist() == [by_hand(0, x)[0].argmax(), by_hand(2, x, outputs=5)[1].argmax(), by_hand(0, x)[2].argmax()]


def test_labels_are_one_a_row() -> None:
    zc.put(model(0), "m0")
    with pytest.raises(InputError, match=r"the labels are \(rows, 2\) float64: give one for each row"):
        zc.predict_by({0: "m0"}, normal(3, 4), by=np.zeros((3, 2)))
    with pytest.raises(InputError, match="the labels are a list: give a NumPy or dask array"):
        zc.predict_by({0: "m0"}, normal(3, 4), by=[0, 0, 0])
    with pytest.raises(InputError, match="different numbers of rows"):
        zc.predict_by({0: "m0"}, da.zeros((4, 4)), by=np.zeros(3))
