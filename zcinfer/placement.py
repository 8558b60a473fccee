"""Which bytes of a joined model go to a device, and to which place there: storages side by side, and no others.

Not for how they get there (`transfer`), nor for what is made of them (`device_views`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch

from .description import ALIGNMENT, Bytes, StorageSpec
from .pickling import is_plain
from .store import Fetched
from .transfer import Span


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


def layout(model: torch.nn.Module, fetched: Fetched, share_from: float = inf) -> Layout:
    """Find the storages that ``model.to`` moves, and lay them out one after the other, on 256 bytes.

    Those that can be shared lie in pieces of their own, where they have ``share_from`` bytes together.
    """
    buffers = buffers_of(fetched)
    asked: dict[int, bool] = {}
    for tensor, may_share in asked_for(model):
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


def buffers_of(fetched: Fetched) -> list[Bytes]:
    """The model's own, and its base's."""
    return [fetched.buffer, *([] if fetched.base is None else [fetched.base])]


def asked_for(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, bool]]:
    """What ``.to`` moves, unless a module has a way of its own; and whether a module has no reason to write to it."""
    for module in torch.nn.Module.modules(model):
        # Weights of an RNN are copied anew when they are packed
        may_share = not isinstance(module, torch.nn.RNNBase)
        for name in ("_parameters", "_buffers"):
            for tensor in vars(module).get(name, {}).values():
                if isinstance(tensor, torch.Tensor):
                    yield tensor, may_share and name == "_parameters"
