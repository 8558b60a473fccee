"""A model whose weights lie on a device already: what ``model.to`` makes of it, without the copies.

Not for getting them there (`upload`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from .pickling import is_plain
from .placement import Place, asked_for

# Whose ways of moving a model do no more than torch's where its tensors are on the device before
_KNOWN = ("torch", "transformers")


class Views(TorchFunctionMode):
    """Tensors of a model's flat buffers, as views of what lies on the device.

    Parameters
    ----------
    model : torch.nn.Module
        In host memory.
    places : dict of int to Place
    memory : sequence of torch.Tensor
        uint8, on the device. Need not be written yet.
    device : torch.device
        As ``model.to`` is given it.
    """

    def __init__(
        self, model: torch.nn.Module, places: dict[int, Place], memory: Sequence[torch.Tensor], device: torch.device
    ):
        super().__init__()
        self._model = model
        self._device = device
        # A storage of its own for each that the model had, which no other way gives without a copy
        self._storages = {
            address: from_dlpack(to_dlpack(memory[piece][start : start + nbytes])).untyped_storage()
            for address, (piece, start, nbytes) in places.items()
        }
        # By the numbers of the tensors, which are kept so that these stay theirs. A buffer that a model has twice is
        # one here, of which `.to` would make two
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for tensor, _ in asked_for(model):
            self._view(tensor)

    def move(self) -> torch.nn.Module:
        """Have ``model.to`` run, over views instead of copies."""
        if _moves_as_torch_does(self._model):
            for module in torch.nn.Module.modules(self._model):
                for tensor in vars(module).get("_parameters", {}).values():
                    view = self._view(tensor) if tensor is not None else None
                    if view is not None:
                        tensor.data = view  # as `.to` does
                buffers = vars(module).get("_buffers", {})
                for name, tensor in buffers.items():
                    view = self._view(tensor) if tensor is not None else None
                    if view is not None:
                        buffers[name] = view
            return self._model.to(self._device)
        # A way of its own is not to find them moved before it moves them. 12 µs a tensor more
        with self:
            return self._model.to(self._device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and not kwargs and args[1:2] == (self._device,):
            dtype = args[2] if len(args) > 2 else None
            if dtype in (None, args[0].dtype):
                found = self._view(args[0])
                if found is not None:
                    return found
        return func(*args, **(kwargs or {}))

    def _view(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if id(tensor) in self._made:
            return self._made[id(tensor)][1]
        if tensor.device.type != "cpu" or not is_plain(tensor):
            return None
        storage = self._storages.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return None
        # Never of inference_mode: such tensors cannot be trained, or cast, later
        with torch.inference_mode(False):
            made = torch.empty(0, dtype=tensor.dtype, device=self._device)
            made.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        self._made[id(tensor)] = tensor, made
        return made


def _moves_as_torch_does(model: torch.nn.Module) -> bool:
    modules = list(torch.nn.Module.modules(model))
    ways: list[Callable[..., Any]] = [type(model).to, *{type(module)._apply for module in modules}]
    own = any("_apply" in vars(module) for module in modules) or "to" in vars(model)
    return not own and all(_home_of(way).partition(".")[0] in _KNOWN for way in ways)


def _home_of(function: Any) -> str:
    # Not __module__, which decorators copy
    return str(getattr(function, "__globals__", {}).get("__name__", ""))
