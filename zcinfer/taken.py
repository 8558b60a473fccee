"""What the skeleton's pickler takes out of a model, or notes of it: tensors, storages, arrays, programs.

Not for their bytes (`parts`), nor for what may not be taken (`overlaps`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .description import BUFFER_DTYPES, TensorSpec
from .pickling import shared_bytes, storage_key


class Taken:
    """Tensors and storages met by the pickler, each once."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []
        self.tensors: list[torch.Tensor] = []  # keeps ids valid
        self.storages: list[torch.UntypedStorage] = []
        self.private: list[tuple[Any, int]] = []  # what each process holds for itself, and its bytes
        self.programs: dict[int, tuple[Any, bytes]] = {}  # by id, with their bytes
        self.uses: list[int] = []  # of each storage: tensors and bare storages that refer to it
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}  # those that are shared, by the ids of their bytes' tensors
        self.copied: list[np.ndarray[Any, Any]] = []  # arrays that are pickled
        self.arrays_under_tensors: frozenset[int] = frozenset()  # ids of small arrays that are shared nevertheless
        self._tensor_index: dict[int, int] = {}
        self._storage_index: dict[tuple[Any, ...], int] = {}

    def tensor(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._tensor_index:
            self._tensor_index[id(tensor)] = len(self.specs)
            self.tensors.append(tensor)
            self.specs.append(
                TensorSpec(
                    self.storage(tensor.untyped_storage()),
                    str(tensor.dtype).removeprefix("torch."),
                    int(tensor.storage_offset()),
                    tuple(tensor.size()),
                    tuple(tensor.stride()),
                    tensor.requires_grad,
                    isinstance(tensor, torch.nn.Parameter),
                    False,
                )
            )
        return self._tensor_index[id(tensor)]

    def storage(self, storage: torch.UntypedStorage) -> int:
        key = storage_key(storage)
        if key not in self._storage_index:
            self._storage_index[key] = len(self.storages)
            self.storages.append(storage)
            self.uses.append(0)
        self.uses[self._storage_index[key]] += 1
        return self._storage_index[key]

    def small_arrays_under_tensors(self) -> frozenset[int]:
        """Ids of arrays that were pickled, and are the memory of a tensor."""
        flats = [(id(array), shared_bytes(array, small=True)) for array in self.copied]
        return frozenset(n for n, flat in flats if flat is not None and self._has(flat.untyped_storage()))

    def _has(self, storage: torch.UntypedStorage) -> bool:
        return storage_key(storage) in self._storage_index

    def table(self) -> tuple[TensorSpec, ...]:
        def whole(tensor: torch.Tensor, spec: TensorSpec) -> bool:
            usual = torch.empty(spec.size, device="meta").stride()  # of an axis of length 1 any stride is contiguous
            covers = spec.stride == usual and tensor.nbytes == self.storages[spec.storage].nbytes() > 0
            return covers and self.uses[spec.storage] == 1 and spec.dtype in BUFFER_DTYPES

        return tuple(s._replace(whole=whole(t, s)) for t, s in zip(self.tensors, self.specs, strict=True))
