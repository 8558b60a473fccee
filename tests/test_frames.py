"""``predict`` on DataFrames of pandas and dask: chosen columns in, the frame with new columns out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, OutputError, SettingsError

pytestmark = pytest.mark.usefixtures("registry")


def linear(columns: int = 2, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(columns, outputs).eval()


def table(rows: int = 7) -> pd.DataFrame:
    """Floating, integer, boolean, nullable and text columns, under an index with labels that come twice."""
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "a": random.normal(size=rows),
            "b": random.normal(size=rows).astype("float32"),
            "id": np.arange(rows) % 5,
            "whole": pd.array([*range(rows)], dtype="Int64"),
            "gap": pd.array([None if n == rows - 1 else n for n in range(rows)], dtype="Int64"),
            "text": ["word"] * rows,
        },
        index=pd.Index(np.arange(rows) // 2 * 10, name="when"),
    )


def plain(model: nn.Module, values: Any) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(torch.from_numpy(np.ascontiguousarray(values, np.float32))).numpy()
    return result


def parts(frame: pd.DataFrame, *lengths: int) -> Any:
    """A dask frame whose partitions have these lengths, as it is after a filter: without divisions."""
    edges = np.cumsum([0, *lengths])
    pieces = [frame.iloc[start:stop] for start, stop in pairwise(edges)]
    with dask.config.set({"dataframe.convert-string": False}):  # texts as they are
        return dd.from_map(lambda piece: piece, pieces, meta=frame.iloc[:0])


def nothing_is_computed() -> Any:
    """While this holds, computing anything fails."""

    def refuse(graph: Any, keys: Any, **_: Any) -> None:
        raise AssertionError("something was computed")

    return dask.config.set(scheduler=refuse)


def compute(frame: Any) -> pd.DataFrame:
    result: pd.DataFrame = frame.compute(scheduler="sync")
    return result


class Pooled(nn.Module):
    """Takes ``ids`` ``(rows,)`` and ``x`` ``(rows, 2)``; gives ``(rows,)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 2)

    def forward(self, ids: torch.Tensor, x: torch.Tensor, factor: float = 1) -> torch.Tensor:
        return (self.embedding(ids) * x).sum(1) * factor


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x.sum(1), "twice": x * 2}


class Images(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None] * x[:, None, :]


# In and out


def test_pandas_in_pandas_out() -> None:
    model, frame = linear(), table()
    zc.put(model, "model")
    before = frame.copy()
    found = zc.predict("model", frame, columns=["a", "b"], batch_size=3)
    names = [f"prediction_{n}" for n in range(3)]
    assert [*found.columns] == [*frame.columns, *names]
    pd.testing.assert_frame_equal(found[[*frame.columns]], before)
    pd.testing.assert_frame_equal(frame, before)
    values = frame[["a", "b"]].to_numpy()
    expected = np.concatenate([plain(model, values[n : n + 3]) for n in (0, 3, 6)])
    assert np.array_equal(found[names].to_numpy(), expected)
    assert {*found[names].dtypes} == {np.dtype("float32")}


@pytest.mark.parametrize("lengths", [(7,), (3, 4), (0, 3, 0, 4), (7, 0)])
def test_dask_in_lazy_dask_out(lengths: tuple[int, ...]) -> None:
    model, frame = linear(), table()
    zc.put(model, "model")
    given = parts(frame, *lengths)
    with nothing_is_computed():
        lazy = zc.predict("model", given, columns=["a", "b"], into=["x", "y", "z"], batch_size=2)
        assert isinstance(lazy, dd.DataFrame)
    assert (lazy.npartitions, lazy.divisions) == (given.npartitions, given.divisions)
    found = compute(lazy)
    pd.testing.assert_frame_equal(lazy._meta, found.iloc[:0])
    pd.testing.assert_frame_equal(found[[*frame.columns]], frame)
    values, start, expected = frame[["a", "b"]].to_numpy(), 0, []
    for length in lengths:
        for first in range(start, start + length, 2):
            expected.append(plain(model, values[first : min(first + 2, start + length)]))
        start += length
    assert np.array_equal(found[["x", "y", "z"]].to_numpy(), np.concatenate(expected))


def test_dask_keeps_divisions_and_takes_a_measured_batch_size() -> None:
    zc.put(linear(), "model")
    frame = table().reset_index(drop=True)
    given = dd.from_pandas(frame, npartitions=3)
    lazy = zc.predict("model", given, columns=["a", "b"])
    assert lazy.divisions == given.divisions
    assert np.allclose(compute(lazy).iloc[:, -3:], plain(linear(), frame[["a", "b"]]), atol=1e-6)


def test_all_partitions_are_empty() -> None:
    zc.put(linear(), "model")
    lazy = parts(table(), 3, 4)
    found = compute(zc.predict("model", lazy[lazy["a"] > 1e9], columns=["a", "b"]))
    assert found.shape == (0, 9)
    assert found.dtypes.iloc[-1] == np.float32
    assert zc.predict("model", table().iloc[:0], columns=["a", "b"]).shape == (0, 9)


def test_a_graph_is_named_by_model_columns_and_settings() -> None:
    zc.put(linear(), "model")
    given = parts(table(), 3, 4)

    def name(**settings: Any) -> str:
        return str(zc.predict("model", given, **{"columns": ["a", "b"], "batch_size": 4, **settings})._name)

    assert name() == name()
    assert len({name(), name(columns=["b", "a"]), name(batch_size=3), name(into="p"), name(device="cpu")}) == 5


# Columns


@pytest.mark.parametrize("lazy", [False, True])
def test_inputs_by_name(lazy: bool) -> None:
    model, frame = Pooled().eval(), table()
    zc.put(model, "model")
    given = parts(frame, 3, 4) if lazy else frame
    result = zc.predict("model", given, columns={"x": ["a", "b"], "ids": "id"}, into="score", factor=2.0)
    found = compute(result) if lazy else result
    with torch.no_grad():
        x = torch.from_numpy(frame[["a", "b"]].to_numpy().astype(np.float32))
        expected = model(torch.tensor(frame["id"].tolist()), x, 2.0).numpy()
    assert [*found.columns] == [*frame.columns, "score"]
    assert np.allclose(found["score"].to_numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["a", "b"], "float64"),
        (["b"], "float32"),
        (["id", "b"], "float64"),
        (["id", "whole"], "int64"),
        ("whole", "int64"),
        (["yes", "id"], "int64"),
        ("yes", "bool"),
        (["arrow", "whole"], "int64"),
        (["arrow", "b"], "float64"),
    ],
)
def test_columns_in_their_common_dtype(columns: Any, kind: str) -> None:
    zc.put(nn.Identity().eval(), "model")
    seen = []

    def look(block: np.ndarray) -> np.ndarray:
        seen.append((block.dtype, block.shape[1:]))
        return block

    frame = table().assign(yes=True, arrow=pd.array(range(7), dtype="int64[pyarrow]"))
    found = zc.predict("model", frame, columns=columns, preprocess=look)
    assert {*seen} == {(np.dtype(kind), (len(columns),) if isinstance(columns, list) else ())}
    new = found.iloc[:, frame.shape[1] :].to_numpy()
    expected = frame[columns if isinstance(columns, list) else [columns]]
    assert np.array_equal(new, np.stack([expected[c].to_numpy() for c in expected], 1))


def test_an_index_or_array_of_labels() -> None:
    zc.put(linear(), "model")
    frame = table()
    expected = zc.predict("model", frame, columns=["a", "b"])
    pd.testing.assert_frame_equal(zc.predict("model", frame, columns=frame.columns[:2]), expected)
    pd.testing.assert_frame_equal(zc.predict("model", frame, columns=np.array(["a", "b"])), expected)


def test_missing_floats_are_nan() -> None:
    zc.put(nn.Identity().eval(), "model")
    frame = pd.DataFrame({"x": pd.array([1.5, None], dtype="Float32")})
    assert zc.predict("model", frame, columns="x")["prediction"].tolist() == [1.5, pytest.approx(np.nan, nan_ok=True)]


@pytest.mark.parametrize("lazy", [False, True])
def test_missing_integers_are_refused(lazy: bool) -> None:
    zc.put(linear(1, 1), "model")
    says = r"column 'gap' \(Int64\) has missing values \(1, the first at index 30\).*fillna"
    if lazy:
        frame = zc.predict("model", parts(table(), 3, 4), columns=["gap"])
        with pytest.raises(InputError, match=says):
            compute(frame)
    else:
        with pytest.raises(InputError, match=says):
            zc.predict("model", table(), columns=["gap"])


@pytest.mark.parametrize("lazy", [False, True])
def test_lists_and_texts_with_preprocess(lazy: bool) -> None:
    zc.put(linear(), "model")
    frame = pd.DataFrame({"pair": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "text": ["1 2", "3 4", "5 6"]})
    frame["pair"] = frame["pair"].astype(object)
    expected = plain(linear(), [[1, 2], [3, 4], [5, 6]])
    given: Any = parts(frame, 2, 1) if lazy else frame
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "pair": lambda rows: np.stack([np.asarray(row, np.float32) for row in rows]),
        "text": lambda rows: np.array([row.split() for row in rows], np.float32),
    }
    for column, preprocess in ways.items():
        result = zc.predict("model", given, columns=column, preprocess=preprocess)
        found = compute(result) if lazy else result
        assert np.allclose(found.iloc[:, -3:].to_numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("column", ["text", "kind", "time", "lists"])
def test_columns_that_are_no_numbers_are_refused(column: str) -> None:
    zc.put(linear(1, 1), "model")
    frame = table(2).assign(kind=pd.Categorical(["x", "y"]), time=pd.Timestamp("2026-01-01"))
    frame["lists"] = pd.Series([[1], [2]], index=frame.index, dtype=object)
    for given in (frame, parts(frame, 1, 1)):
        with pytest.raises(InputError, match=rf"column '{column}' has dtype .* not numeric.*preprocess"):
            zc.predict("model", given, columns=[column])


def test_integers_that_only_floats_have_in_common_are_refused() -> None:
    zc.put(linear(), "model")
    with pytest.raises(InputError, match=r"only float64 has in common.*astype\('int64'\)"):
        zc.predict("model", table().assign(u=np.uint64(2**63)), columns=["id", "u"])


def test_a_partition_of_another_dtype_is_refused() -> None:
    zc.put(linear(1, 1), "model")
    frame = table()
    lazy = parts(frame, 3, 4).map_partitions(lambda p: p.astype({"id": "float64"}), meta=frame.iloc[:0])
    with pytest.raises(InputError, match=r"partition that begins at index \d+: column 'id' is float64 here"):
        compute(zc.predict("model", lazy, columns=["id"]))


# New columns


def test_one_column() -> None:
    zc.put(linear(2, 1), "model")
    frame = table()
    expected = plain(linear(2, 1), frame[["a", "b"]])[:, 0]
    for into, name in ((None, "prediction"), ("score", "score"), (["score"], "score"), (5, 5), (("a", 1), ("a", 1))):
        found = zc.predict("model", frame, columns=["a", "b"], into=into, batch_size=8)
        assert [*found.columns] == [*frame.columns, name]
        assert np.array_equal(found[name].to_numpy(), expected)


def test_several_outputs() -> None:
    zc.put(Two().eval(), "model")
    frame, outputs = table(), ["sum", "twice"]
    new = ["prediction_0", "prediction_1_0", "prediction_1_1"]
    found = zc.predict("model", frame, columns=["a", "b"], output=outputs)
    assert [*found.columns][6:] == new
    found = compute(zc.predict("model", parts(frame, 3, 4), columns=["a", "b"], output=outputs, into=["s", ["u", "v"]]))
    assert [*found.columns][6:] == ["s", "u", "v"]
    values = frame[["a", "b"]].to_numpy()
    assert np.allclose(found["s"].to_numpy(), values.sum(1))
    assert np.array_equal(found[["u", "v"]].to_numpy(), values * 2)
    with pytest.raises(SettingsError, match="there are 2 outputs: give a list"):
        zc.predict("model", frame, columns=["a", "b"], output=outputs, into="s")


@pytest.mark.parametrize("lazy", [False, True])
def test_several_models(lazy: bool) -> None:
    zc.put(linear(), "three")
    zc.put(linear(2, 1), "one")
    frame = table()
    given = parts(frame, 3, 4) if lazy else frame
    result = zc.predict(["three", "one"], given, columns=["a", "b"], into=[["x", "y", "z"], "score"])
    if lazy:
        again = zc.predict(["three", "one"], given, columns=["a", "b"], into=[["x", "y", "z"], "score"])
        assert result._name == again._name
    found = compute(result) if lazy else result
    assert [*found.columns][6:] == ["x", "y", "z", "score"]
    assert np.allclose(found[["x", "y", "z"]], plain(linear(), frame[["a", "b"]]), atol=1e-6)
    assert np.allclose(found[["score"]], plain(linear(2, 1), frame[["a", "b"]]), atol=1e-6)


@pytest.mark.parametrize(
    ("into", "says"),
    [
        ("text", "one"),
        (["x", "y"], r"names 2 columns, and the output is \(rows, 3\) float32: name 3"),
        (["x", "y", "x"], "'x' twice"),
        (["x", "y", "a"], "has a column 'a'"),
        (7, "give a list of 3 labels"),
    ],
)
def test_names_that_do_not_fit_are_refused(into: Any, says: str) -> None:
    zc.put(linear(), "model")
    frame = table().assign(text_1=1)
    for given in (frame, parts(frame, 3, 4)):
        with pytest.raises(SettingsError, match="has a column 'text_1'" if says == "one" else says):
            zc.predict("model", given, columns=["a", "b"], into=into)


def test_predicting_again_needs_another_name() -> None:
    zc.put(linear(2, 1), "model")
    once = zc.predict("model", table(), columns=["a", "b"])
    with pytest.raises(SettingsError, match=r"has a column 'prediction'.*into="):
        zc.predict("model", once, columns=["a", "b"])
    assert zc.predict("model", once, columns=["a", "b"], into="again").shape == (7, 8)


def test_outputs_that_are_no_columns_are_refused_with_the_remedy() -> None:
    zc.put(Images().eval(), "model")
    with pytest.raises(OutputError, match=r"\(rows, 2, 2\) float64, which columns.*reshape"):
        zc.predict("model", table(), columns=["a", "b"])
    flat = zc.predict("model", table(), columns=["a", "b"], postprocess=lambda y: y.reshape(len(y), -1))
    assert flat.shape == (7, 10)


# What is refused


def test_arguments_that_do_not_fit() -> None:
    zc.put(linear(), "model")
    frame, array = table(), np.ones((7, 2), np.float32)

    def refused(error: type[Exception], says: str, *arrays: Any, **settings: Any) -> None:
        with pytest.raises(error, match=says):
            zc.predict("model", *arrays, **settings)

    refused(SettingsError, r"Give columns=\[...\]; there are 'a', 'b', 'id', 'whole', 'gap', 'text'$", frame)
    refused(SettingsError, "no column 'c' in the frame", frame, columns=["a", "c"])
    refused(SettingsError, "2 columns 'a' in the frame", pd.concat([frame, frame[["a"]]], axis=1), columns=["a"])
    refused(SettingsError, "no column: name one", frame, columns=[])
    refused(SettingsError, "empty dict", frame, columns={})
    refused(SettingsError, "'x' is given twice", frame, columns={"x": "a"}, x=3)
    refused(SettingsError, "columns chooses from a DataFrame, and none is given", array, columns=["a"])
    refused(SettingsError, "into names new columns", array, into="a")
    refused(InputError, "one DataFrame, alone", frame, frame, columns=["a"])
    refused(InputError, "one DataFrame, alone", frame, mask=array, columns=["a"])
    refused(InputError, "one DataFrame, alone", x=frame, columns=["a"])
    refused(InputError, "is a Series: give the DataFrame", frame["a"])
    refused(InputError, "is a Series: give the DataFrame", x=parts(frame, 7)["a"])
    refused(InputError, "several levels", frame.set_axis([[*"xxxxxx"], [*frame.columns]], axis=1), columns=["a"])
    refused(InputError, "expects in_features=2", frame, columns=["a"])


def test_a_failing_partition_is_named() -> None:
    zc.put(Pooled().eval(), "model")
    frame = table().assign(id=[0, 0, 0, 0, 0, 99, 0])
    lazy = zc.predict("model", parts(frame, 3, 4), columns={"ids": "id", "x": ["a", "b"]}, batch_size=2)
    with pytest.raises(BlockError, match="partition that begins at index 10, rows 2–3 of the block, of model"):
        compute(lazy)


@pytest.mark.slow
def test_frames_are_not_imported_for_arrays() -> None:
    script = """
import sys, tempfile
import numpy as np, torch
import zcinfer as zc
zc.connect("file:" + tempfile.mkdtemp())
zc.put(torch.nn.Linear(2, 1).eval(), "model")
zc.predict("model", np.ones((3, 2), np.float32))
print({"xarray", "pandas", "dask.dataframe"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
