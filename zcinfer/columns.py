"""Columns of a DataFrame as inputs of a model: which, of what dtype, and their values. Not for results (`frames`)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputError, SettingsError
from .rows import Array, Rows

_NUMERIC = "biufc"


def is_a(value: Any, package: str, name: str) -> bool:
    """Whether a value is of this class or one derived from it; asks without importing the package."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(value).__mro__)


@dataclass(frozen=True)
class Choice:
    """Columns that make one input.

    Attributes
    ----------
    labels : tuple
        Of the columns.
    alone : bool
        One column, as ``(rows,)``; else ``(rows, columns)``.
    """

    labels: tuple[Hashable, ...]
    alone: bool

    @classmethod
    def of(cls, columns: Any) -> Choice:
        """One label, or a list of them."""
        if is_a(columns, "pandas", "Index") or isinstance(columns, np.ndarray):
            columns = columns.tolist()
        if not isinstance(columns, list):
            return cls((columns,), True)
        if not columns:
            raise SettingsError("columns names no column: name one or more")
        return cls(tuple(columns), False)

    def rows(self, frame: Any, converted: bool) -> Rows:
        """The input's row shape and dtype; ``converted``: ``preprocess`` makes numbers of what are none."""
        columns = {label: frame[label].dtype for label in self.labels}
        found = {_numpy_dtype(dtype) for dtype in columns.values()}
        for label, dtype in columns.items():
            if _numpy_dtype(dtype).kind not in _NUMERIC and not converted:
                raise InputError(
                    f"column {label!r} has dtype {dtype}, which is not numeric: convert it first (.astype('float32'), "
                    "or .cat.codes of categories), or give preprocess=, which gets its values as they are and can make "
                    "rows of them, for example with np.stack where they are lists of one length"
                )
        shape = () if self.alone else (len(self.labels),)
        if len(found) == 1:
            return Rows(shape, *found)
        if any(dtype.kind not in _NUMERIC for dtype in found):
            return Rows(shape, np.dtype(object))
        common = np.result_type(*found)
        if common.kind == "f" and all(dtype.kind in "iu" for dtype in found):
            raise InputError(
                f"the columns {list(self.labels)} are integers of dtypes that only {common} has in common, which would "
                "round large ones: convert them to one, for example with .astype('int64')"
            )
        return Rows(shape, common)

    def block(self, frame: Any, rows: Rows) -> Array:
        """The columns of a pandas frame as an input, ``(rows, ...)``."""
        values = [_values(frame[label], label, rows.dtype) for label in self.labels]
        return values[0] if self.alone else np.stack(values, axis=1)


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """What NumPy has for a column's dtype: object for texts and categories."""
    found = dtype if isinstance(dtype, np.dtype) else getattr(dtype, "numpy_dtype", None)
    return np.dtype(object) if found is None or found.kind in "SUV" else found


def _values(column: Any, label: Hashable, dtype: np.dtype[Any]) -> Array:
    """A column's values as NumPy; what is missing is nan in a floating one, and refused in others."""
    found = _numpy_dtype(column.dtype)
    if not np.can_cast(found, dtype, "safe"):
        raise InputError(
            f"column {label!r} is {column.dtype} here, and the frame said that it would fit into {dtype}: convert it, "
            f"for example with .astype('{dtype}')"
        )
    if isinstance(column.dtype, np.dtype) or dtype.kind == "O":
        values: Array = column.to_numpy(dtype=dtype)
        return values
    missing = column.isna().to_numpy()
    if found.kind != "f" and missing.any():
        raise InputError(
            f"column {label!r} ({column.dtype}) has missing values ({int(missing.sum())}, the first at index "
            f"{column.index[missing][0]}), which models have no number for: fill them, with .fillna(value), or drop "
            "those rows, with .dropna()"
        )
    filled: Array = column.to_numpy(dtype=dtype, na_value=np.nan) if missing.any() else column.to_numpy(dtype=dtype)
    return filled
