"""A model that was joined in host memory, moved to a device: ``.to`` with the copying of each tensor left out.

Its storages go over in one stream (`transfer`); then ``model.to`` runs, and gets a view on the device wherever it asks
for a tensor of the flat buffer. So all that a model does of its own when it is moved stays as it is. Not for CPUs.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from .description import ALIGNMENT, Bytes, StorageSpec
from .device_sharing import Card, Lease, card_of
from .errors import StoreUnavailable
from .pickling import is_plain
from .sharing import written_pages
from .transfer import Cuda, Side, Span, Staging
from .store import Fetched

log = logging.getLogger("zcinfer")

# Bytes of a model below which a copy for each job costs less than one for all
SHARE_FROM = 1 << 20


class Place(NamedTuple):
    """Where a storage lies in the memory of a device: number of the piece, first byte, bytes."""

    piece: int
    start: int
    nbytes: int


class Piece(NamedTuple):
    """What of one of a model's buffers lies in one tensor of the device.

    Attributes
    ----------
    buffer : int
        0: the model's own; 1: its base's.
    shareable : bool
        Nothing but weights that a model has no reason to write to.
    spans : list of Span
    nbytes : int
        That it takes there.
    key : str
        Equal for equal content at equal places.
    """

    buffer: int
    shareable: bool
    spans: list[Span]
    nbytes: int
    key: str


class Layout(NamedTuple):
    """What of a model's buffers goes to the device, and whereto: ``places`` of storages, by their host addresses."""

    pieces: list[Piece]
    places: dict[int, Place]


class Moved(NamedTuple):
    """A model on a device, what it shares there with other jobs, and the bytes that are this process's own."""

    model: torch.nn.Module
    leases: tuple[Lease, ...]
    nbytes: int


def to_device(model: torch.nn.Module, fetched: Fetched, device: torch.device, share: bool = False) -> Moved:
    """Move a model, as ``model.to(device)`` does.

    Parameters
    ----------
    model : torch.nn.Module
        As `parts.join` made it of ``fetched``.
    fetched : Fetched
    device : torch.device
        What is not CUDA is left to ``model.to``, and so is all where the upload fails, with a warning.
    share : bool
        Have the weights in memory that other jobs read, too, if the settings ask for that: nobody may write to them,
        and what was computed counts only where the leases have no `trouble` afterwards.

    Returns
    -------
    Moved
        With the same model. Tensors that are views of one storage stay so.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return _moved_plainly(model, fetched, device)
    index = torch.cuda.current_device() if device.index is None else device.index
    device = torch.device("cuda", index)
    return move(model, fetched, _side(device), device, card=_card(device) if share else None)


def move(
    model: torch.nn.Module,
    fetched: Fetched,
    side: Side,
    device: torch.device,
    staging: Staging | None = None,
    card: Card | None = None,
) -> Moved:
    """The same, with a given device side, pinned memory (default: this process's), and memory shared by jobs."""
    uploaded: _Uploaded | None = None
    why = ""
    try:
        uploaded = _upload(model, fetched, side, device, staging, card)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
    # Only here: an exception that is being handled holds what was made of the memory
    if uploaded is None:
        log.warning("weights go to %s tensor by tensor, since their upload failed (%s)", device, why)
        return _moved_plainly(model, fetched, device)
    with uploaded.views:
        return Moved(model.to(device), uploaded.leases, uploaded.nbytes)


def _moved_plainly(model: torch.nn.Module, fetched: Fetched, device: torch.device) -> Moved:
    described = fetched.description
    return Moved(model.to(device), (), described.nbytes + described.nbytes_in_base)


def layout(model: torch.nn.Module, fetched: Fetched, share_from: float = inf) -> Layout:
    """Find the storages that ``model.to`` moves, and lay them out one after the other, on 256 bytes.

    Those that can be shared lie in pieces of their own, where they have ``share_from`` bytes together.
    """
    buffers = _buffers(fetched)
    asked: dict[int, bool] = {}
    for tensor, may_share in _asked(model):
        if is_plain(tensor):
            address = tensor.untyped_storage().data_ptr()
            asked[address] = asked.get(address, True) and may_share
    groups: dict[tuple[int, bool], list[tuple[int, StorageSpec]]] = {}
    for number, spec in enumerate(fetched.description.storages):
        buffer = int(number in fetched.description.in_base)
        address = buffers[buffer].ctypes.data + spec.offset
        if spec.nbytes and address in asked:
            groups.setdefault((buffer, asked[address]), []).append((address, spec))
    for buffer in (0, 1):
        some = groups.pop((buffer, True), [])
        if some:
            shareable = sum(spec.nbytes for _, spec in some) >= share_from
            groups.setdefault((buffer, shareable), []).extend(some)
    pieces: list[Piece] = []
    places: dict[int, Place] = {}
    for (buffer, shareable), found in groups.items():
        spans: list[Span] = []
        end, held = 0, hashlib.sha256()
        for address, spec in sorted(found, key=lambda each: each[1].offset):
            start = -(-end // ALIGNMENT) * ALIGNMENT
            places[address] = Place(len(pieces), start, spec.nbytes)
            held.update(f"{start} {spec.nbytes} {spec.sha256}\n".encode())
            gap = spec.offset - (spans[-1].source + spans[-1].nbytes) if spans else -1
            if gap == start - end:  # padding alone
                spans[-1] = spans[-1]._replace(nbytes=spans[-1].nbytes + gap + spec.nbytes)
            else:
                spans.append(Span(spec.offset, start, spec.nbytes))
            end = start + spec.nbytes
        nbytes = -(-end // ALIGNMENT) * ALIGNMENT
        pieces.append(Piece(buffer, shareable, spans, nbytes, held.hexdigest()))
    return Layout(pieces, places)


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
            address: from_dlpack(to_dlpack(memory[piece][start : start + nbytes])).untyped_storage()
            for address, (piece, start, nbytes) in places.items()
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


class _Uploaded(NamedTuple):
    views: Views
    leases: tuple[Lease, ...]
    nbytes: int


def _upload(
    model: torch.nn.Module,
    fetched: Fetched,
    side: Side,
    device: torch.device,
    staging: Staging | None,
    card: Card | None,
) -> _Uploaded:
    buffers = _buffers(fetched)
    if card is not None and any(map(written_pages, buffers)):
        card = None  # the model's own code wrote to its weights when it was joined
    found = layout(model, fetched, inf if card is None else SHARE_FROM)
    with torch.inference_mode(False):
        memory, leases, own = [], [], 0
        through = staging or _staging(side)
        for piece in found.pieces:
            lease = _leased(card, piece, device) if card is not None and piece.shareable else None
            target = side.empty(piece.nbytes) if lease is None else lease.memory
            if lease is None or lease.must_be_filled:
                through.move(side, buffers[piece.buffer], target, piece.spans)
            if lease is None:
                own += piece.nbytes
            else:
                leases.append(lease)
                if lease.must_be_filled:
                    lease.fill()
            memory.append(target)
        return _Uploaded(Views(found.places, memory, device), tuple(leases), own)


def _leased(card: Card, piece: Piece, device: torch.device) -> Lease | None:
    try:
        lease = card.lease(piece.key, piece.nbytes)
        why = "" if lease.must_be_filled else lease.trouble()
    except StoreUnavailable as error:
        why = str(error)
    if not why:
        return lease
    if (device, why) not in _told:
        _told.add((device, why))
        log.warning("weights on %s are this process's own, and not shared with other jobs: %s", device, why)
    return None


def _card(device: torch.device) -> Card | None:
    try:
        return card_of(device)
    except StoreUnavailable as error:
        if (device, str(error)) not in _told:
            _told.add((device, str(error)))
            log.warning("weights on %s are this process's own, and not shared with other jobs: %s", device, error)
        return None


def _buffers(fetched: Fetched) -> list[Bytes]:
    return [fetched.buffer, *([] if fetched.base is None else [fetched.base])]


def _asked(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, bool]]:
    """What ``.to`` moves, unless a module has a way of its own; and whether a module has no reason to write to it."""
    for module in torch.nn.Module.modules(model):
        # Weights of an RNN are copied anew when they are packed
        may_share = not isinstance(module, torch.nn.RNNBase)
        for name in ("_parameters", "_buffers"):
            for tensor in vars(module).get(name, {}).values():
                if isinstance(tensor, torch.Tensor):
                    yield tensor, may_share and name == "_parameters"


# Told once
_told: set[tuple[torch.device, str]] = set()
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
