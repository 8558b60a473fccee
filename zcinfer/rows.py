"""Rows of arrays on their way into a model and out of it: shapes, dtypes, NumPy to torch and back.

How an input's dtype becomes the model's, decided once when a predictor is bound:

1. floating inputs are cast to the dtype of the model's floating parameters;
2. booleans, integers and complex numbers stay as they are if the model takes them so (unsigned ones of more than
   eight bits, which torch hardly supports, become int64);
3. else integers and booleans become int64; if the model does not take those, its floating dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]

_TORCH_INTEGERS = frozenset(["uint8", "int8", "int16", "int32", "int64"])
_NUMPY_FLOATS = (torch.float32, torch.float64, torch.float16)


@dataclass(frozen=True)
class Rows:
    """Rows of one input or output: the shape of one row, and the dtype.

    Examples
    --------
    >>> str(Rows((64,), np.dtype("float32")))
    '(rows, 64) float32'
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"({', '.join(['rows', *map(str, self.shape)])}) {self.dtype}"

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


def rows_of(array: Any) -> Rows:
    """Row shape and dtype of a NumPy or dask array; refuses one without rows."""
    if array.ndim == 0:
        raise InputError("an input is a single number: the rows are along axis 0, so it needs at least one axis")
    dtype = array.dtype
    return Rows(tuple(array.shape[1:]), dtype if dtype.kind == "T" else dtype.newbyteorder("="))  # text has none


def first_rows(array: Any) -> Array:
    """Some of the first rows of a NumPy or dask array or windows, computed; none where the first block is empty."""
    if hasattr(array, "head"):
        head: Array = array.head(2)
        return head
    known = array.shape[0] == array.shape[0]
    rows: Array = np.asarray(array[:2] if known else array.blocks[0])
    return rows


def refuse_masked(array: Any, name: str = "an input") -> None:
    """Refuse an array of which values are to be skipped."""
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{name} is a masked array, and a model cannot skip values: fill it first, with x.filled(value)"
        )


def as_block(block: Any, name: str) -> Array:
    refuse_masked(block, name)
    if not isinstance(block, np.ndarray):
        raise InputError(f"{name} is a {type(block).__name__}: give a NumPy or dask array, for example np.asarray(x)")
    return block


def only(block: Any) -> Any:
    """The block that ``dask.array.blockwise`` nests in a list for each axis of one chunk that its result has not.

    (``concatenate=True`` would copy it out of there.)
    """
    while isinstance(block, list):
        (block,) = block
    return block


def candidate_casts(inputs: Sequence[Rows], floating: str) -> Iterator[tuple[str, ...]]:
    def cast(dtype: np.dtype[Any], integer: str) -> str:
        if dtype.kind == "f" and floating:
            return floating
        if dtype.kind in "iub":
            name = integer or dtype.name
            return name if name in _TORCH_INTEGERS or name == floating or dtype.kind == "b" else "int64"
        return dtype.name

    seen = set()
    for integer in ("", "int64", *([floating] if floating else [])):
        casts = tuple(cast(rows.dtype, integer) for rows in inputs)
        if casts not in seen:
            seen.add(casts)
            yield casts


def refuse_too_large(block: Array, cast: str) -> None:
    if block.dtype.kind == "u" and cast == "int64" and block.size and block.max() > np.iinfo(np.int64).max:
        raise InputError(f"uint64 values up to {block.max():,} do not fit into int64, which models take: convert them")


def to_tensor(block: Array, cast: str, device: torch.device) -> torch.Tensor:
    # Always a copy: a model may write to its input, which other tasks, or the caller, still use. It also takes
    # read-only, strided, Fortran-ordered and big-endian blocks.
    refuse_too_large(block, cast)
    if cast == "bfloat16":  # which NumPy has not
        dtype = np.dtype("float64") if block.itemsize > 8 else block.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(block, dtype=dtype, order="C")).to(device=device, dtype=torch.bfloat16)
    tensor = torch.from_numpy(np.array(block, dtype=cast, order="C"))
    return tensor if device.type == "cpu" else tensor.to(device)


def to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.cpu()
    try:
        array: Array = tensor.numpy()
    except (RuntimeError, TypeError):  # to ask beforehand takes longer, and nearly all are as NumPy has them
        tensor = tensor.detach().resolve_conj().resolve_neg().to_dense()
        array = (tensor if tensor.dtype in _NUMPY_FLOATS or not tensor.is_floating_point() else tensor.float()).numpy()
    return array


def zeros(inputs: Sequence[Rows]) -> list[Array]:
    return [np.zeros((2, *rows.shape), rows.dtype) for rows in inputs]


def two_rows(rows: Rows, array: Array) -> Array:
    if len(array) == 0:
        return np.zeros((2, *rows.shape), rows.dtype)
    return np.concatenate([array[:1], array[-1:]]) if len(array) == 1 else array[:2]
