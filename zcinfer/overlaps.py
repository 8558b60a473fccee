"""Tensors that lie in one memory without torch knowing of it: over parts of one array, each with a storage of its own.

Not for views, which have one storage (`skeleton`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .blame import place_of
from .description import Bytes
from .errors import SplitError
from .skeleton import Taken

# Steps that NumPy may take to find an element that two arrays share; thousands do for axes by the dozen.
_MOST_WORK: Any = 1_000_000  # NumPy annotates it as one of two numbers


def refuse_overlaps(taken: Taken, sources: Sequence[Bytes], model: Any) -> None:
    """Refuse tensors of different storages that share elements: each storage is carried for itself.

    Raises
    ------
    SplitError
        Names two of them.
    """
    for one, other in _overlapping(taken.storages):
        for first, a in _parts(taken, sources, one):
            for second, b in _parts(taken, sources, other):
                if _share(a, b):
                    raise SplitError(
                        f"{place_of(first, model)} and {place_of(second, model)} lie over parts of one memory, as "
                        "tensors over parts of a NumPy array do, and would be two afterwards: make one a view of the "
                        "other (torch.from_numpy(array), then its part), or give one a memory of its own (.clone())"
                    )


def _overlapping(storages: Sequence[torch.UntypedStorage]) -> Iterator[tuple[int, int]]:
    """Pairs of storages whose bytes overlap, by number."""
    found = [(s.data_ptr(), s.data_ptr() + s.nbytes(), n) for n, s in enumerate(storages) if s.device.type == "cpu"]
    before: list[tuple[int, int]] = []  # ends and numbers of those that reach as far as the next begins
    for start, end, number in sorted(span for span in found if span[0] < span[1]):
        before = [(reach, other) for reach, other in before if reach > start]
        yield from ((other, number) for _, other in before)
        before.append((end, number))


def _parts(taken: Taken, sources: Sequence[Bytes], number: int) -> list[tuple[Any, Bytes]]:
    """Tensors over a storage, with their bytes; the storage itself, where it is one of an unusual tensor."""
    flat = sources[number]
    tensors = [tensor for tensor, spec in zip(taken.tensors, taken.specs, strict=True) if spec.storage == number]
    return [(tensor, _bytes_of(tensor, flat)) for tensor in tensors] or [(taken.storages[number], flat)]


def _bytes_of(tensor: torch.Tensor, flat: Bytes) -> Any:
    size = tensor.element_size()
    strides = (*(step * size for step in tensor.stride()), 1)
    return np.ndarray((*tensor.shape, size), np.uint8, flat, tensor.storage_offset() * size, strides)


def _share(one: Any, other: Any) -> bool:
    try:
        return np.shares_memory(one, other, max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return True
