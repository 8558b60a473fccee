"""A model that was joined in host memory, moved to a device: ``.to`` with the copying of each tensor left out.

Its storages go over in one stream (`transfer`) to places side by side (`placement`); then ``model.to`` runs over views
of them (`device_views`). So all that a model does of its own when it is moved stays as it is. Not for CPUs.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import NamedTuple

import torch

from .device_sharing import Card, Lease, card_of
from .device_views import Views
from .errors import StoreUnavailable
from .placement import Piece, buffers_of, layout
from .sharing import written_pages
from .store import Fetched
from .transfer import Cuda, PinnedSlots, Side

log = logging.getLogger("zcinfer")

# Bytes of a model below which a copy for each job costs less than one for all
SHARE_FROM = 1 << 20


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
    slots: PinnedSlots | None = None,
    card: Card | None = None,
) -> Moved:
    """The same, with a given device side, pinned memory (default: this process's), and memory shared by jobs."""
    uploaded: _Uploaded | None = None
    why = ""
    try:
        uploaded = _upload(model, fetched, side, device, slots, card)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
    # Only here: an exception that is being handled holds what was made of the memory
    if uploaded is None:
        log.warning("weights go to %s tensor by tensor, since their upload failed (%s)", device, why)
        return _moved_plainly(model, fetched, device)
    return Moved(uploaded.views.move(), uploaded.leases, uploaded.nbytes)


def _moved_plainly(model: torch.nn.Module, fetched: Fetched, device: torch.device) -> Moved:
    described = fetched.description
    return Moved(model.to(device), (), described.nbytes + described.nbytes_in_base)


class _Uploaded(NamedTuple):
    views: Views
    leases: tuple[Lease, ...]
    nbytes: int


def _upload(
    model: torch.nn.Module,
    fetched: Fetched,
    side: Side,
    device: torch.device,
    slots: PinnedSlots | None,
    card: Card | None,
) -> _Uploaded:
    buffers = buffers_of(fetched)
    if card is not None and any(map(written_pages, buffers)):
        card = None  # the model's own code wrote to its weights when it was joined
    found = layout(model, fetched, inf if card is None else SHARE_FROM)
    with torch.inference_mode(False):
        through = slots or _slots(side)
        # In one order everywhere: a process that writes one may wait for another that writes the next
        leased = {
            piece.key: _leased(card, piece, device)
            for piece in sorted(found.pieces, key=lambda piece: piece.key)
            if piece.shareable
        }
        leases = [leased.get(piece.key) if piece.shareable else None for piece in found.pieces]
        memory = [
            side.empty(piece.nbytes) if lease is None else lease.memory
            for piece, lease in zip(found.pieces, leases, strict=True)
        ]

    def fill() -> None:
        for piece, lease, target in zip(found.pieces, leases, memory, strict=True):
            if lease is None or lease.must_be_filled:
                through.move(side, buffers[piece.buffer], target, piece.spans)
            if lease is not None and lease.must_be_filled:
                lease.fill()

    with ThreadPoolExecutor(1, "zcinfer-upload") as thread, torch.inference_mode(False):
        arriving = thread.submit(fill)
        views = Views(model, found.places, memory, device)
        arriving.result()
    own = sum(piece.nbytes for piece, lease in zip(found.pieces, leases, strict=True) if lease is None)
    return _Uploaded(views, tuple(lease for lease in leases if lease is not None), own)


def _leased(card: Card | None, piece: Piece, device: torch.device) -> Lease | None:
    if card is None:
        return None
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


# Told once
_told: set[tuple[torch.device, str]] = set()
_lock = threading.Lock()
_sides: dict[torch.device, Side] = {}
_pinned: list[PinnedSlots] = []


def _side(device: torch.device) -> Side:
    with _lock:
        if device not in _sides:
            _sides[device] = Cuda(device)
        return _sides[device]


def _slots(side: Side) -> PinnedSlots:
    with _lock:
        if not _pinned:
            _pinned.append(PinnedSlots(side))
        return _pinned[0]
