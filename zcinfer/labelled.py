"""``predict`` on xarray.DataArrays: taken off their rows' labels, and put back under them. Not for frames (`frames`).

Rows lie along the first dimension. xarray is imported only where a DataArray is given.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .columns import is_a
from .errors import InputError, SettingsError
from .rows import Rows


@dataclass(frozen=True)
class Labels:
    """What labels the rows of all inputs.

    Attributes
    ----------
    first : xarray.DataArray
        The first labelled input: its attributes, and the coordinates of axes that outputs keep.
    coords : xarray.Dataset
        The coordinates of the rows, and those without a dimension.
    into : object
        Names of the outputs' further axes, as for ``predict``.
    """

    first: Any
    coords: Any
    into: Any

    @classmethod
    def of(cls, arrays: Sequence[Any], inputs: Mapping[str, Any], into: Any) -> Labels | None:
        """Labels of the arguments of ``predict``; None if there is no DataArray among them.

        Raises
        ------
        InputError
            Rows have different labels, or the rows of one input are the second axis of another.
        """
        values = {**{f"input {n}": array for n, array in enumerate(arrays)}, **inputs}
        for name, value in values.items():
            if is_a(value, "xarray", "Dataset"):
                raise InputError(f"{name} is a Dataset: give its variables, for example ds['t'], each as an input")
        given = {name: value for name, value in values.items() if is_a(value, "xarray", "DataArray")}
        if not given:
            if into is not None:
                raise SettingsError(
                    "into names new columns of a DataFrame, or axes of a DataArray, and none is given: leave it out"
                )
            return None
        for name, value in given.items():
            if value.ndim == 0:
                raise InputError(f"{name} is a single number: the rows are along the first dimension, so it needs one")
        first = next(iter(given.values()))
        return cls(first, _coords(given), into)

    def dims(self, outputs: Sequence[Rows], several: bool) -> tuple[tuple[Hashable, ...], ...]:
        """The dimensions of each output.

        Raises
        ------
        SettingsError
            ``into`` does not fit the outputs.
        """
        row = self.first.dims[0]
        taken = {row, *self.coords.coords}
        free = [name for name in map("output_{}".format, range(64 + len(taken))) if name not in taken]
        if several and self.into is not None and not (isinstance(self.into, list) and len(self.into) == len(outputs)):
            raise SettingsError(
                f"into is {self.into!r}, and there are {len(outputs)} outputs: give a list with the names of each"
            )
        found = []
        wanted = self.into if several and self.into is not None else [self.into] * len(outputs)
        for output, names in zip(outputs, wanted, strict=True):
            axes = len(output.shape)
            names = free[:axes] if names is None else list(names) if isinstance(names, list | tuple) else [names]
            if len(names) != axes:
                raise SettingsError(f"into names {len(names)} axes, and the output is {output}: name {axes}")
            if len({*names, *taken}) != len(names) + len(taken):
                raise SettingsError(f"into is {names}: its names must differ, also from those of the rows, {taken}")
            found.append((row, *names))
        return tuple(found)

    def put_on(self, result: Any, dims: tuple[Hashable, ...]) -> Any:
        """An output as a DataArray."""
        import xarray as xr

        sizes = dict(zip(dims, result.shape, strict=True))
        others = [dim for dim in self.first.dims if sizes.get(dim) != self.first.sizes[dim]]
        kept = self.first.coords.to_dataset().drop_dims(others, errors="ignore")
        kept = kept.drop_vars([name for name in kept.coords if not kept[name].dims or kept[name].dims == dims[:1]])
        coords = xr.merge([self.coords, kept], compat="override", join="exact").coords
        attrs = {} if xr.get_options()["keep_attrs"] is False else dict(self.first.attrs)
        array = xr.DataArray(result, dims=dims, coords=coords, attrs=attrs)
        array.name = None  # else a lazy one has its task's
        return array


def unlabelled(value: Any) -> Any:
    """The NumPy or dask array in a DataArray; other values as they are."""
    return value.data if is_a(value, "xarray", "DataArray") else value


def _coords(given: Mapping[str, Any]) -> Any:
    """The coordinates of the rows of all inputs together, as a Dataset."""
    import xarray as xr

    (name, first), *rest = given.items()
    row = first.dims[0]
    coords = _of_rows(first)
    unlike = set()
    for other_name, other in rest:
        if other.dims[0] != row:
            raise InputError(
                f"the rows of {name} lie along {row!r}, those of {other_name} along {other.dims[0]!r}: rows are the "
                "first dimension (x.transpose), and need one name (x.rename)"
            )
        if row in first.indexes and row in other.indexes:
            try:
                aside = {dim for x in (first, other) for dim in x.dims[1:]}
                xr.align(first, other, join="exact", copy=False, exclude=aside)
            except ValueError as error:
                raise InputError(
                    f"{name} and {other_name} have different coordinates along {row!r}: a, b = xr.align(a, b, "
                    f"join='inner', exclude={sorted(map(str, aside))}) keeps the rows that both have"
                ) from error
        if other.sizes[row] != first.sizes[row]:
            raise InputError(
                f"the inputs have different numbers of rows: {name} has {first.sizes[row]:,}, "
                f"{other_name} {other.sizes[row]:,}"
            )
        more = _of_rows(other)
        for coord in coords.coords.keys() & more.coords.keys():
            if _equal(coords[coord].variable, more[coord].variable):
                continue
            if coords[coord].ndim == 0:
                unlike.add(coord)
                continue
            raise InputError(
                f"the rows of {name} and {other_name} have different coordinates {coord!r}: which are the result's? "
                f"Drop the others, with x.drop_vars({coord!r})"
            )
        coords = xr.merge([coords, more], compat="override", join="exact")
    return coords.drop_vars(unlike)


def _of_rows(array: Any) -> Any:
    return array.coords.to_dataset().drop_dims(array.dims[1:], errors="ignore")


def _equal(one: Any, other: Any) -> bool:
    """Whether two variables are equal; lazy ones only if they are the same by name, since nothing may be computed."""
    names = [getattr(variable.data, "name", None) for variable in (one, other) if variable.chunks is not None]
    if names:
        return len(names) == 2 and names[0] == names[1]
    return bool(one.equals(other))
