"""The tensors of a table, as views of a flat buffer: no byte is copied, and each storage is what it was.

A storage of its own for each tensor, and not one for all: models compare storages to find their ties, and write them
out one by one.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import torch

from .description import Description

_PAGE = 4096


def view(
    buffer: Any, description: Description, copy_small: bool, base: Any = None
) -> tuple[list[torch.Tensor], list[torch.UntypedStorage | None]]:
    """Tensors of the table as views of the buffer, and the storages that are not some tensor's alone.

    Parameters
    ----------
    buffer : writable buffer of bytes
    description : Description
    copy_small : bool
    base : writable buffer of bytes, optional
        As for `zcinfer.parts.join`.

    Returns
    -------
    tensors : list of torch.Tensor
    storages : list of torch.UntypedStorage or None
    """
    storages: list[Any] = _storages(buffer, description, copy_small, base)
    columns = description.columns
    # Never under inference_mode: such tensors cannot be trained, or cast, later.
    with torch.inference_mode(False):
        # NumPy makes an array over a place in a buffer, and torch a tensor over the array, in a fifth of the time that
        # torch.frombuffer and resize_ take.
        make: Any = np.ndarray
        buffers = repeat(buffer) if base is None else [base if elsewhere else buffer for elsewhere in columns.in_base]
        arrays = map(make, columns.sizes, columns.dtypes, buffers, columns.offsets)
        tensors = list(map(torch.from_numpy, arrays))
        if copy_small or len(tensors) < len(description.tensors):
            tensors = _complete(tensors, buffer, description, storages, copy_small, base)
        for number in columns.parameters:
            tensors[number].__class__ = torch.nn.Parameter  # nn.Parameter() in its plain case, at a fifth of the time
        for number in columns.with_gradient:
            tensors[number].requires_grad = True
    return tensors, storages


def _complete(
    arrays: list[torch.Tensor],
    buffer: Any,
    description: Description,
    storages: list[Any],
    copy_small: bool,
    base: Any,
) -> list[torch.Tensor]:
    """All tensors of the table in their order, given those of its columns."""
    found = dict(zip(description.columns.numbers, arrays, strict=True))
    tensors = []
    for number, spec in enumerate(description.tensors):
        place, dtype = description.storages[spec.storage], getattr(torch, spec.dtype)
        tensor = found.get(number)
        if tensor is None and spec.whole:
            count = place.nbytes // dtype.itemsize
            where = base if spec.storage in description.in_base else buffer
            tensor = torch.frombuffer(where, dtype=dtype, count=count, offset=place.offset)
            if len(spec.size) != 1:
                tensor.resize_(spec.size)
        elif tensor is None:
            tensor = torch.empty(0, dtype=dtype).set_(storages[spec.storage], spec.offset, spec.size, spec.stride)
        if copy_small and spec.whole and (not spec.parameter or place.nbytes < _PAGE):
            tensor = tensor.clone()
        tensors.append(tensor)
    return tensors


def view_fake(description: Description) -> list[torch.Tensor]:
    """Tensors of the table without contents; under ``FakeTensorMode``."""
    tensors = []
    for spec in description.tensors:
        tensor = torch.empty_strided(spec.size, spec.stride, dtype=getattr(torch, spec.dtype))
        tensors.append(torch.nn.Parameter(tensor, spec.requires_grad) if spec.parameter else tensor)
    return tensors


def _storages(buffer: Any, description: Description, copy_small: bool, base: Any) -> list[torch.UntypedStorage | None]:
    storages: list[Any] = [None] * len(description.storages)
    own = {spec.storage for spec in description.tensors if spec.whole}
    for number, place in enumerate(description.storages):
        if number not in own:
            storage: Any = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
            if place.nbytes:
                where = base if number in description.in_base else buffer
                flat = torch.frombuffer(where, dtype=torch.uint8, count=place.nbytes, offset=place.offset)
                storage = flat.untyped_storage()
            storages[number] = storage.clone() if copy_small and place.nbytes < _PAGE else storage
    return storages
