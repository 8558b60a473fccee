"""Rows that carry their number in their first column, so that a model can tell them apart, and zarr arrays of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

ROWS, BLOCK = 23, 5


def rows(count: int = ROWS) -> np.ndarray:
    """``(count, 4)`` of float32."""
    x = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    x[:, 0] = np.arange(count)
    return x


def save(path: Path, x: np.ndarray, **options: Any) -> Path:
    """Write an array in chunks of `BLOCK` rows, if nothing else is asked."""
    chunks = options.pop("chunks", (BLOCK, *x.shape[1:]))
    zarr.create_array(str(path), shape=x.shape, dtype=x.dtype, chunks=chunks, **options)[...] = x
    return path


def read(path: Path) -> np.ndarray:
    """The whole of an array of zarr's third format."""
    array = zarr.open_array(str(path), mode="r")
    assert array.metadata.zarr_format == 3
    found: np.ndarray = array[...]  # type: ignore[assignment]
    return found
