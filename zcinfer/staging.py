"""Rows on their way into pinned memory: where each lies there, cast, and copied by several threads where it is much.

One thread copies some 10 GB/s, and the bus takes several times that. Not for when it is done (`pipeline`), nor for
weights, which go over as they are, in pieces of their own (`transfer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from .batches import Index
from .description import ALIGNMENT
from .lanes import Buffer
from .rows import Array, Rows, refuse_too_large

# Threads that copy, no more than the process may compute with; and bytes that are worth another one.
COPIERS, WORTH = 4, 1 << 20


@dataclass
class Piece:
    """Rows that lie side by side in a slot: one batch after the other.

    Attributes
    ----------
    rows : slice or numpy.ndarray
        Which of the block's they are.
    arrays : list of numpy.ndarray
        ``(rows, ...)`` each.
    names : tuple of str
        By which the model gets the last of them.
    trimmed : tuple of int, optional
        The length that they were cut to along axis 1, and the one that they had.
    inputs, outputs : list of int
        Where each input, and each output, begins in the slot.
    """

    rows: Index
    arrays: Sequence[Array]
    names: tuple[str, ...]
    trimmed: tuple[int, int] | None = None
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.arrays[0])

    def part(self, start: int, stop: int) -> Index:
        """Some of its rows, as the block counts."""
        if isinstance(self.rows, slice):
            return slice(self.rows.start + start, self.rows.start + stop)
        return self.rows[start:stop]


def dtype_of(rows: Rows) -> torch.dtype:
    """torch's dtype of an output."""
    return torch.from_numpy(np.empty(0, rows.dtype)).dtype


def lay_out(pieces: Sequence[Piece], casts: Sequence[str], outputs: Sequence[Rows]) -> tuple[int, int]:
    """Give every input and output of the pieces its place; bytes of all inputs, and of all outputs."""
    inward = outward = 0
    for piece in pieces:
        piece.inputs, piece.outputs = [], []
        for array, cast in zip(piece.arrays, casts, strict=True):
            piece.inputs.append(inward)
            inward += _aligned(array.size * getattr(torch, cast).itemsize)
        for rows in outputs:
            piece.outputs.append(outward)
            outward += _aligned(len(piece) * rows.nbytes)
    return inward, outward


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def stage(buffer: Buffer, piece: Piece, casts: Sequence[str]) -> None:
    """Copy the rows of a piece into pinned memory, as the dtypes that the model gets."""
    for array, cast, offset in zip(piece.arrays, casts, piece.inputs, strict=True):
        refuse_too_large(array, cast)
        target = buffer.at(offset, array.shape, getattr(torch, cast), there=False)
        parts = min(COPIERS, torch.get_num_threads(), len(array), 1 + array.nbytes // WORTH)
        if parts < 2:
            _copy(target, array, cast)
            continue
        ends = [len(array) * number // parts for number in range(parts + 1)]
        others = list(pairwise(ends[1:]))
        waiting = [_copiers().submit(_copy, target[a:b], array[a:b], cast) for a, b in others]
        _copy(target[: ends[1]], array[: ends[1]], cast)
        for one in waiting:
            one.result()


def _copy(target: torch.Tensor, array: Array, cast: str) -> None:
    if cast == "bfloat16":  # which NumPy has not
        dtype = np.dtype("float64") if array.itemsize > 8 else array.dtype.newbyteorder("=")
        target.copy_(torch.from_numpy(np.array(array, dtype=dtype, order="C")))
    else:
        np.copyto(target.numpy(), array, casting="unsafe")


@cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COPIERS - 1, thread_name_prefix="zcinfer-staging")
