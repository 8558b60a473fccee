"""``predict`` on DataArrays: rows keep their coordinates, lazy stays lazy, and unlike rows do not meet."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn

import zcinfer as zc
from zcinfer.errors import InputError, SettingsError

pytestmark = pytest.mark.usefixtures("registry")


def linear(columns: int = 4, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(columns, outputs).eval()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def plain(model: nn.Module, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(*(torch.from_numpy(x.copy()) for x in inputs)).numpy()
    return result


def series(rows: int = 6, start: str = "2026-01-01") -> xr.DataArray:
    """Rows along time: with an index, and coordinates of the rows, of the features, of both and of neither."""
    return xr.DataArray(
        normal(rows, 4),
        dims=("time", "feature"),
        coords={
            "time": pd.date_range(start, periods=rows),
            "station": ("time", [*"abcdefgh"[:rows]]),
            "feature": [*"wxyz"],
            "weight": (("time", "feature"), np.ones((rows, 4))),
            "level": 500,
        },
        attrs={"source": "a sensor"},
        name="t",
    )


def nothing_is_computed() -> Any:
    """While this holds, computing anything fails."""

    def refuse(graph: Any, keys: Any, **_: Any) -> None:
        raise AssertionError("something was computed")

    return dask.config.set(scheduler=refuse)


class Added(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": x.sum(1), "twice": x * 2}


class Smooth(nn.Module):
    """``(rows, y, x)`` in and out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 2)


# In and out


def test_numpy_backed() -> None:
    model, x = linear(), series()
    zc.put(model, "model")
    y = zc.predict("model", x, batch_size=8)
    rows = x.coords.to_dataset().drop_dims("feature").coords
    xr.testing.assert_identical(
        y, xr.DataArray(plain(model, x.values), dims=("time", "output_0"), coords=rows, attrs={"source": "a sensor"})
    )
    assert type(y.data) is np.ndarray
    assert y.sel(time="2026-01-03").station == "c"


def test_dask_backed_stays_lazy() -> None:
    model, x = linear(), series()
    zc.put(model, "model")
    lazy = x.chunk({"time": 4})
    with nothing_is_computed():
        y = zc.predict("model", lazy, batch_size=8)
    assert isinstance(y.data, da.Array)
    assert y.chunks == ((4, 2), (3,))
    assert isinstance(y["station"].data, da.Array)
    assert y.name is None
    found = y.compute(scheduler="sync")
    expected = zc.predict("model", x)
    xr.testing.assert_equal(found.drop_vars("station"), expected.drop_vars("station"))
    assert np.array_equal(found.values[:4], plain(model, x.values[:4]))


def test_rows_of_several_levels() -> None:
    zc.put(linear(), "model")
    levels = pd.MultiIndex.from_product([[1, 2, 3], ["a", "b"]], names=["run", "part"])
    x = xr.DataArray(normal(6, 4), dims=("row", "f"), coords=xr.Coordinates.from_pandas_multiindex(levels, "row"))
    y = zc.predict("model", x)
    assert y.indexes["row"].equals(levels)
    assert y.sel(run=2, part="b").shape == (3,)
    assert y.unstack("row").dims == ("output_0", "run", "part")


def test_without_coordinates() -> None:
    zc.put(linear(4, 1), "model")
    y = zc.predict("model", xr.DataArray(normal(5, 4)), output=lambda y, _: y[:, 0])
    assert (y.dims, y.shape, [*y.coords], y.attrs) == (("dim_0",), (5,), [], {})


def test_no_rows() -> None:
    zc.put(linear(), "model")
    y = zc.predict("model", series()[:0])
    assert (y.sizes, y.dtype, y.indexes["time"].size) == ({"time": 0, "output_0": 3}, np.float32, 0)


def test_attributes_follow_the_option_of_xarray() -> None:
    zc.put(linear(), "model")
    with xr.set_options(keep_attrs=False):
        assert zc.predict("model", series()).attrs == {}


def test_several_outputs() -> None:
    zc.put(Two().eval(), "model")
    x = series()
    for given in (x, x.chunk({"time": 4})):
        total, twice = zc.predict("model", given, output=["sum", "twice"])
        assert (total.dims, twice.dims) == (("time",), ("time", "output_0"))
        assert np.allclose(total.values, x.values.sum(1), atol=1e-6)
        assert np.array_equal(twice.values, x.values * 2)
        assert total.indexes["time"].equals(x.indexes["time"])
    _, twice = zc.predict("model", x, output=["sum", "twice"], into=[[], "feature"])
    assert twice["feature"].values.tolist() == [*"wxyz"]


def test_several_models() -> None:
    zc.put(linear(), "model")
    zc.put(Two().eval(), "two")
    x = series()
    for given in (x, x.chunk({"time": 4})):
        classes, (total, twice) = zc.predict(
            [zc.Predictor("model"), zc.Predictor("two", output=["sum", "twice"])], given, into=["class", [], "feature"]
        )
        assert (classes.dims, total.dims, twice.dims) == (("time", "class"), ("time",), ("time", "feature"))
        assert np.allclose(classes.values, plain(linear(), x.values), atol=1e-6)
        assert np.array_equal(twice.values, x.values * 2)
        assert classes.indexes["time"].equals(x.indexes["time"])


# Axes after the first


def test_axes_named_like_the_inputs_keep_their_coordinates() -> None:
    zc.put(Smooth().eval(), "model")
    x = xr.DataArray(
        normal(3, 2, 4),
        dims=("time", "lat", "lon"),
        coords={"lat": [10, 20], "lon": [1, 2, 3, 4], "height": (("lat", "lon"), np.ones((2, 4)))},
    )
    y = zc.predict("model", x, into=["lat", "lon"])
    xr.testing.assert_identical(y, x.roll(lon=1))
    partly = zc.predict("model", x, into=["lat", "shifted"])
    assert (partly.dims, {*partly.coords}) == (("time", "lat", "shifted"), {"lat"})
    # A coordinate of rows and features together stays with both only.
    zc.put(linear(4, 4), "square")
    assert {*zc.predict("square", series(), into="feature").coords} == {*series().coords}
    assert {*zc.predict("square", series()).coords} == {"time", "station", "level"}


def test_an_axis_of_another_length_drops_its_coordinates() -> None:
    zc.put(linear(), "model")
    y = zc.predict("model", series(), into="feature")
    assert (y.dims, y.shape, {*y.coords}) == (("time", "feature"), (6, 3), {"time", "station", "level"})


def test_names_that_are_taken_are_passed_over() -> None:
    zc.put(linear(), "model")
    x = series().rename(station="output_0")
    assert zc.predict("model", x).dims == ("time", "output_1")
    again = zc.predict("model", zc.predict("model", xr.DataArray(normal(6, 4))).pad(output_0=(0, 1), constant_values=0))
    assert again.dims == ("dim_0", "output_0")


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (["a", "b"], r"names 2 axes, and the output is \(rows, 3\) float32: name 1"),
        ("time", "must differ"),
        ("station", "must differ"),
        ([], "names 0 axes"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_the_model_runs(into: Any, says: str) -> None:
    zc.put(linear(), "model")
    with nothing_is_computed(), pytest.raises(SettingsError, match=says):
        zc.predict("model", series().chunk({"time": 2}), into=into)


# Several inputs


def test_inputs_of_the_same_rows() -> None:
    zc.put(Added().eval(), "model")
    a, b = series(), series().drop_vars(["station", "level"]).assign_coords(quality=("time", range(6)))
    expected = a.values + b.values
    for y in (
        zc.predict("model", a, b),
        zc.predict("model", a=a, b=b),
        zc.predict("model", a, b=b.chunk({"time": 2})),
        zc.predict("model", a, b.drop_vars("time")),
        zc.predict("model", a.drop_vars("time"), b),
        zc.predict("model", a, b.values),
    ):
        assert np.array_equal(y.compute(scheduler="sync").values, expected)
        assert {"time", "station", "level"} <= {*y.coords}
        assert y.indexes["time"].equals(a.indexes["time"])
    assert "quality" in zc.predict("model", a, b).coords


def test_rows_with_other_coordinates_are_refused() -> None:
    zc.put(Added().eval(), "model")
    a, b = series(), series(start="2026-01-02")
    for other in (b, b[:5], a[:5]):
        with pytest.raises(InputError, match=r"input 0 and b have different coordinates along 'time'.*join='inner'"):
            zc.predict("model", a, b=other)
    a, b = xr.align(a, b.drop_vars("station"), join="inner", exclude=["feature"])
    assert zc.predict("model", a, b).sizes["time"] == 5


def test_rows_of_other_dimensions_or_lengths_are_refused() -> None:
    zc.put(Added().eval(), "model")
    with pytest.raises(InputError, match=r"'time', those of input 1 along 'feature'.*transpose"):
        zc.predict("model", series(4), series(4).T)
    with pytest.raises(InputError, match="numbers of rows: input 0 has 6, input 1 5"):
        zc.predict("model", series(), series()[:5].drop_vars("time"))
    with pytest.raises(InputError, match="different numbers of rows"):
        zc.predict("model", series(), normal(5, 4))


def test_other_coordinates_that_differ() -> None:
    zc.put(Added().eval(), "model")
    a, b = series(), series().assign_coords(level=850)
    assert "level" not in zc.predict("model", a, b).coords
    assert "level" not in zc.predict("model", a=a, b=b).coords
    b = series().assign_coords(station=("time", [*"bcdefg"]))
    with pytest.raises(InputError, match=r"different coordinates 'station'.*drop_vars\('station'\)"):
        zc.predict("model", a, b)
    assert zc.predict("model", a, b.drop_vars("station")).station.values.tolist() == [*"abcdef"]


def test_lazy_coordinates_are_compared_by_name() -> None:
    zc.put(Added().eval(), "model")
    a, b = series().chunk({"time": 2}), series().chunk({"time": 3})
    with nothing_is_computed():
        assert zc.predict("model", a, a + 1).sizes["time"] == 6
        with pytest.raises(InputError, match="different coordinates 'station'"):
            zc.predict("model", a, b)


# What is refused


def test_what_has_no_rows_or_is_several_arrays() -> None:
    zc.put(linear(), "model")
    with pytest.raises(InputError, match=r"input 0 is a Dataset: give its variables, for example ds\['t'\]"):
        zc.predict("model", series().to_dataset())
    with pytest.raises(InputError, match="x is a Dataset"):
        zc.predict("model", x=series().to_dataset())
    with pytest.raises(InputError, match="input 0 is a single number"):
        zc.predict("model", xr.DataArray(1.0))
    with pytest.raises(SettingsError, match="columns chooses from a DataFrame"):
        zc.predict("model", series(), columns=["t"])
    with pytest.raises(InputError, match="expects in_features=4"):
        zc.predict("model", series()[:, :2])


def test_a_predictor_takes_them_too() -> None:
    zc.put(linear(), "model")
    predictor = zc.Predictor("model", postprocess=lambda y: y.argmax(axis=1))
    y = zc.predict(predictor, series())
    assert (y.dims, y.dtype) == (("time",), np.int64)
