"""A model that was joined in host memory, moved to a device: ``.to`` with the copying of each tensor left out.

Its storages go over in one stream (`transfer`); then ``model.to`` runs, and gets a view on the device wherever it asks
for a tensor of the flat buffer. So all that a model does of its own when it is moved stays as it is. Not for CPUs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from .description import ALIGNMENT
from .pickling import is_plain
from .transfer import Cuda, Side, Span, Staging
from .store import Fetched

log = logging.getLogger("zcinfer")


class Place(NamedTuple):
    """Where a storage lies in the memory of a device: number of the tensor, first byte, bytes."""

    buffer: int
    start: int
    nbytes: int


class Layout(NamedTuple):
    """What of a model's buffers goes to the device, and whereto.

    Attributes
    ----------
    spans : tuple of list of Span
        For each buffer, the model's own and its base's.
    nbytes : tuple of int
        Bytes that each takes there.
    places : dict of int to Place
        Of the storages, by the address that they have in host memory.
    """

    spans: tuple[list[Span], ...]
    nbytes: tuple[int, ...]
    places: dict[int, Place]


def to_device(model: torch.nn.Module, fetched: Fetched, device: torch.device) -> torch.nn.Module:
    """Move a model, as ``model.to(device)`` does.

    Parameters
    ----------
    model : torch.nn.Module
        As `parts.join` made it of ``fetched``.
    fetched : Fetched
    device : torch.device
        What is not CUDA is left to ``model.to``, and so is all where the upload fails, with a warning.

    Returns
    -------
    torch.nn.Module
        The same. Tensors that are views of one storage stay so.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return model.to(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return move(model, fetched, _side(torch.device("cuda", index)), torch.device("cuda", index))


def move(
    model: torch.nn.Module, fetched: Fetched, side: Side, device: torch.device, staging: Staging | None = None
) -> torch.nn.Module:
    """The same, with a given device side and pinned memory; by default those of this process."""
    views: Views | None = None
    why = ""
    try:
        views = _upload(model, fetched, side, device, staging)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
    # Only here: an exception that is being handled holds what was made of the memory
    if views is None:
        log.warning("weights go to %s tensor by tensor, since their upload failed (%s)", device, why)
        return model.to(device)
    with views:
        return model.to(device)


def layout(model: torch.nn.Module, fetched: Fetched) -> Layout:
    """Find the storages that ``model.to`` moves, and lay them out one after the other, on 256 bytes."""
    buffers = [fetched.buffer, *([] if fetched.base is None else [fetched.base])]
    described = fetched.description
    found = {
        (b := int(number in described.in_base), spec.offset, spec.nbytes): buffers[b].ctypes.data + spec.offset
        for number, spec in enumerate(described.storages)
        if spec.nbytes
    }
    asked = {tensor.untyped_storage().data_ptr() for tensor in _moved(model) if is_plain(tensor)}
    spans: tuple[list[Span], ...] = tuple([] for _ in buffers)
    ends, places = [0 for _ in buffers], {}
    for (buffer, offset, nbytes), address in sorted(found.items()):
        if address not in asked:
            continue
        start = -(-ends[buffer] // ALIGNMENT) * ALIGNMENT
        places[address] = Place(buffer, start, nbytes)
        last = spans[buffer][-1] if spans[buffer] else None
        gap = offset - (last.source + last.nbytes) if last is not None else 0
        if last is not None and 0 <= gap == start - ends[buffer]:
            spans[buffer][-1] = last._replace(nbytes=last.nbytes + gap + nbytes)
        else:
            spans[buffer].append(Span(offset, start, nbytes))
        ends[buffer] = start + nbytes
    return Layout(spans, tuple(ends), places)


class Views(TorchFunctionMode):
    """While it is in force, tensors of the flat buffers that are moved to the device are views of what lies there.

    Parameters
    ----------
    places : dict of int to Place
    memory : sequence of torch.Tensor
        uint8, on the device.
    device : torch.device
        As ``model.to`` is given it.
    """

    def __init__(self, places: dict[int, Place], memory: Sequence[torch.Tensor], device: torch.device):
        super().__init__()
        self._device = device
        # Of buffers that a model has twice, which `.to` would make two of
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # A storage of its own for each that the model had, which no other way gives without a copy
        self._storages = {
            address: from_dlpack(to_dlpack(memory[buffer][start : start + nbytes])).untyped_storage()
            for address, (buffer, start, nbytes) in places.items()
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and not kwargs and args[1:2] == (self._device,):
            dtype = args[2] if len(args) > 2 else None
            if dtype in (None, args[0].dtype):
                found = self._view(args[0])
                if found is not None:
                    return found
        return func(*args, **(kwargs or {}))

    def _view(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.device.type != "cpu" or not is_plain(tensor):
            return None
        storage = self._storages.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return None
        if id(tensor) in self._made:
            return self._made[id(tensor)][1]
        # Never of inference_mode: such tensors cannot be trained, or cast, later
        with torch.inference_mode(False):
            made = torch.empty(0, dtype=tensor.dtype, device=self._device)
            made.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        if not isinstance(tensor, torch.nn.Parameter):
            self._made[id(tensor)] = tensor, made  # the first keeps the number its own
        return made


def _upload(
    model: torch.nn.Module, fetched: Fetched, side: Side, device: torch.device, staging: Staging | None
) -> Views:
    found = layout(model, fetched)
    buffers = [fetched.buffer, *([] if fetched.base is None else [fetched.base])]
    with torch.inference_mode(False):
        memory = [side.empty(nbytes) for nbytes in found.nbytes]
        through = staging or _staging(side)
        for source, target, spans in zip(buffers, memory, found.spans, strict=True):
            through.move(side, source, target, spans)
        return Views(found.places, memory, device)


def _moved(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of all modules: what ``.to`` moves, unless a module has a way of its own."""
    for module in torch.nn.Module.modules(model):
        for name in ("_parameters", "_buffers"):
            for tensor in vars(module).get(name, {}).values():
                if isinstance(tensor, torch.Tensor):
                    yield tensor


_lock = threading.Lock()
_sides: dict[torch.device, Side] = {}
_pinned: list[Staging] = []


def _side(device: torch.device) -> Side:
    with _lock:
        if device not in _sides:
            _sides[device] = Cuda(device)
        return _sides[device]


def _staging(side: Side) -> Staging:
    with _lock:
        if not _pinned:
            _pinned.append(Staging(side))
        return _pinned[0]
