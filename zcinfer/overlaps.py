"""Tensors and arrays in one memory without torch knowing of it: over parts of one array, each with bytes of its own.

Not for views, which have one storage (`skeleton`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from .blame import place_of
from .description import Bytes
from .errors import SplitError
from .taken import Taken

# Steps that NumPy may take to find an element that two arrays share; thousands do for axes by the dozen.
_MOST_WORK: Any = 1_000_000  # NumPy annotates it as one of two numbers


def refuse_overlaps(taken: Taken, sources: Sequence[Bytes], model: Any) -> None:
    """Refuse tensors and arrays that share elements, but no storage: each is carried for itself.

    Raises
    ------
    SplitError
        Names two of them.
    """
    parts = cache(partial(_parts, taken, sources))  # of the columns of an array each pair overlaps
    for one, other in _overlapping(taken):
        for first, a in parts(one):
            for second, b in parts(other):
                # NumPy's own views are two after any pickle, unless they are large.
                own = isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
                if not (own and max(one, other) >= len(sources)) and _share(a, b):
                    raise SplitError(
                        f"{place_of(first, model)} and {place_of(second, model)} lie over parts of one memory, as "
                        "tensors over parts of a NumPy array do, and would be two afterwards: make one a view of the "
                        "other (torch.from_numpy(array), then its part), or give one a memory of its own (.clone(), or "
                        ".copy() of an array)"
                    )


def _overlapping(taken: Taken) -> Iterator[tuple[int, int]]:
    """Pairs of storages, and of arrays that are pickled, whose bytes overlap; by number, arrays after storages."""
    found = [
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes(), number)
        for number, storage in enumerate(taken.storages)
        if storage.device.type == "cpu"
    ]
    numbered = enumerate(taken.copied, len(taken.storages))
    found += [(*_span(array), number) for number, array in numbered if array.size and not array.dtype.hasobject]
    before: list[tuple[int, int]] = []  # ends and numbers of those that reach as far as the next begins
    for start, end, number in sorted(span for span in found if span[0] < span[1]):
        before = [(reach, other) for reach, other in before if reach > start]
        yield from ((other, number) for _, other in before)
        before.append((end, number))


def _parts(taken: Taken, sources: Sequence[Bytes], number: int) -> list[tuple[Any, Bytes]]:
    """Tensors and arrays over a storage, with their bytes; the storage itself, where it is one of an unusual tensor."""
    if number >= len(sources):
        array = taken.copied[number - len(sources)]
        return [(array, array)]
    flat = sources[number]
    tensors = [tensor for tensor, spec in zip(taken.tensors, taken.specs, strict=True) if spec.storage == number]
    found: list[tuple[Any, Bytes]] = [
        (taken.arrays.get(id(tensor), tensor), _bytes_of(tensor, flat)) for tensor in tensors
    ]
    return found or [(taken.storages[number], flat)]


def _span(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Where an array's memory begins, and ends."""
    steps = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    start = array.ctypes.data
    return start + sum(min(step, 0) for step in steps), start + sum(max(step, 0) for step in steps) + array.itemsize


def _bytes_of(tensor: torch.Tensor, flat: Bytes) -> Any:
    size = tensor.element_size()
    strides = (*(step * size for step in tensor.stride()), 1)
    return np.ndarray((*tensor.shape, size), np.uint8, flat, tensor.storage_offset() * size, strides)


def _share(one: Any, other: Any) -> bool:
    try:
        return np.shares_memory(one, other, max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return True
