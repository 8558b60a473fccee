"""The process that owns what the jobs on one card share: memory, and nothing else. It never knows what is in it.

It is started by the first job (`device_sharing`) and ends when the last one is gone, however they ended. Each
connection is the lease of one piece of memory: what is leased is never freed, and what is not goes when there is need
of room, the least recently used first. Who asks first for a piece writes it; who comes meanwhile waits. Without torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import socket
import struct
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from .cuda_driver import OUT_OF_MEMORY, Driver, DriverError

# Seconds without any connection until it ends
LINGER = 1.0
# Of a message; ours have some hundred
_LONGEST = 1 << 16


class Card(Protocol):
    """What `cuda_driver.Driver` does for its owner."""

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """New memory, and its handle."""

    def free(self, pointer: int) -> None:
        """Give it back."""


class Piece:
    """Memory that is shared; ``checksum`` is None until it was written."""

    def __init__(self, key: str, nbytes: int, pointer: int, handle: bytes):
        self.key, self.nbytes, self.pointer, self.handle = key, nbytes, pointer, handle
        self.checksum: int | None = None
        self.leases: set[Connection] = set()
        self.waiting: list[Connection] = []


class Connection:
    """One socket of a job, and what it leases."""

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.piece: Piece | None = None
        self.received = b""

    def send(self, **message: Any) -> None:
        # One that takes no more is found dead when it is read from
        with suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")


class Pieces:
    """What is shared, and who has it.

    Parameters
    ----------
    card : Card
    budget : int
        Bytes of the card that all pieces may take.
    """

    def __init__(self, card: Card, budget: int):
        self._card = card
        self._budget = budget
        self._pieces: OrderedDict[str, Piece] = OrderedDict()
        # Of those that nobody may have any more, but some have
        self._withdrawn: set[Piece] = set()

    def want(self, connection: Connection, key: str, nbytes: int) -> None:
        """Lease a piece; the answer says whether it must be written first, and may come later."""
        piece = self._pieces.get(key)
        if piece is None:
            try:
                piece = self._pieces[key] = self._made(key, nbytes)
            except DriverError as error:
                connection.send(refused=str(error))
                return
        elif piece.nbytes != nbytes:
            connection.send(refused=f"it has {piece.nbytes:,} bytes there and {nbytes:,} here")
            return
        self._pieces.move_to_end(key)
        if piece.checksum is None and piece.leases:
            connection.piece = piece
            piece.waiting.append(connection)
            return
        self._lease(connection, piece)

    def filled(self, connection: Connection, checksum: int) -> None:
        """Note that a piece is written, and hand it to who waits."""
        piece = connection.piece
        if piece is None or piece.checksum is not None or connection not in piece.leases:
            return
        piece.checksum = checksum
        waiting, piece.waiting = piece.waiting, []
        for each in waiting:
            self._lease(each, piece)

    def spoiled(self, connection: Connection) -> None:
        """Withdraw a piece that is not what was written, and tell all who have it."""
        piece = connection.piece
        if piece is None or piece in self._withdrawn:
            return
        self._withdraw(piece)
        for each in piece.leases:
            each.send(spoiled=True)

    def leave(self, connection: Connection) -> None:
        """End a lease."""
        piece = connection.piece
        connection.piece = None
        if piece is None:
            return
        if connection in piece.waiting:
            piece.waiting.remove(connection)
            return
        piece.leases.discard(connection)
        if piece in self._withdrawn:
            if not piece.leases:
                self._withdrawn.discard(piece)
                self._card.free(piece.pointer)
        elif piece.checksum is None:
            # Who wrote it is gone, and its copies may still be on their way: the next one gets other memory
            self._withdraw(piece)
            for each in piece.waiting:
                each.piece = None
                self.want(each, piece.key, piece.nbytes)

    def _lease(self, connection: Connection, piece: Piece) -> None:
        connection.piece = piece
        piece.leases.add(connection)
        connection.send(handle=piece.handle.hex(), checksum=piece.checksum)

    def _withdraw(self, piece: Piece) -> None:
        if self._pieces.get(piece.key) is piece:
            del self._pieces[piece.key]
        if piece.leases:
            self._withdrawn.add(piece)
        else:
            self._card.free(piece.pointer)

    def _made(self, key: str, nbytes: int) -> Piece:
        held = sum(piece.nbytes for piece in (*self._pieces.values(), *self._withdrawn))
        idle = [piece for piece in self._pieces.values() if not piece.leases]
        if held - sum(piece.nbytes for piece in idle) + nbytes > self._budget:
            raise DriverError(
                f"{nbytes:,} bytes do not fit: of {self._budget:,} that may be shared "
                f"{held - sum(piece.nbytes for piece in idle):,} are in use (zcinfer.gpu.share-memory)"
            )
        while True:
            if held + nbytes <= self._budget:
                try:
                    return Piece(key, nbytes, *self._card.allocate(nbytes))
                except DriverError as error:
                    if error.code != OUT_OF_MEMORY or not idle:
                        raise
            gone = idle.pop(0)
            held -= gone.nbytes
            self._withdraw(gone)


class Server:
    """Answers connections until there has been none for `LINGER` seconds.

    Parameters
    ----------
    listener : socket.socket
        Bound and listening.
    pieces : Pieces or str
        Or why there are none.
    """

    def __init__(self, listener: socket.socket, pieces: Pieces | str):
        self._listener = listener
        self._pieces = pieces
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def run(self) -> None:
        """Serve to the end."""
        alone_since = time.monotonic()
        while True:
            left = None if self._connections else max(0.0, alone_since + LINGER - time.monotonic())
            ready = self._selector.select(left)
            for found, _ in ready:
                found.data()
            if ready:
                alone_since = time.monotonic()
            elif not self._connections and time.monotonic() >= alone_since + LINGER:
                return

    def _accept(self) -> None:
        with suppress(OSError):
            sock, _ = self._listener.accept()
            if user_of(sock) != os.geteuid():
                sock.close()
                return
            sock.setblocking(False)
            connection = Connection(sock)
            self._connections.add(connection)
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(connection))
            connection.send(owner=os.getpid())

    def _read(self, connection: Connection) -> None:
        try:
            received = connection.socket.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        connection.received += received
        *lines, connection.received = connection.received.split(b"\n")
        try:
            for line in lines:
                self._answer(connection, json.loads(line))
        except (ValueError, TypeError, KeyError):
            received = b""  # not one of ours
        if not received or len(connection.received) > _LONGEST:
            self._leave(connection)

    def _answer(self, connection: Connection, message: Any) -> None:
        if not isinstance(message, dict):
            raise TypeError(type(message))
        if isinstance(self._pieces, str):
            connection.send(refused=self._pieces, never=True)
        elif "want" in message and connection.piece is None:
            self._pieces.want(connection, str(message["want"]), int(message["nbytes"]))
        elif "filled" in message:
            self._pieces.filled(connection, int(message["filled"]))
        elif "spoiled" in message:
            self._pieces.spoiled(connection)
        else:
            raise ValueError(message)

    def _leave(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._connections.discard(connection)
        if isinstance(self._pieces, Pieces):
            self._pieces.leave(connection)


def user_of(sock: socket.socket) -> int:
    """User at the other end of a Unix socket."""
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


def main(path: str, lock: str, listening: str, uuid: str, share: str) -> None:
    """Own a card's shared memory, in a process of its own below nobody.

    Parameters
    ----------
    path : str
        Of the socket.
    lock, listening : str
        Descriptors: of a file that only one owner of this card can have locked, and of the socket. Both were made by
        who started this, so that there is no moment at which two could be the owner.
    uuid : str
        Of the card.
    share : str
        Of the card's memory, that may be shared.
    """
    if os.fork():
        os._exit(0)
    for descriptor in (lock, listening):
        os.set_inheritable(int(descriptor), False)
    listener = socket.socket(fileno=int(listening))
    pieces: Pieces | str
    try:
        card = Driver()
        if card.uuid != uuid:
            raise DriverError(f"the owner's card is {card.uuid}, and not {uuid}")
        pieces = Pieces(card, int(float(share) * card.total()))
    except DriverError as error:
        pieces = str(error)
    try:
        Server(listener, pieces).run()
    finally:
        # Before the lock goes, with this process: who connects from here on waits for it, and starts the next owner
        Path(path).unlink(missing_ok=True)
        listener.close()


def try_lock(descriptor: int) -> bool:
    """Lock a file for the owner, unless there is one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
