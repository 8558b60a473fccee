"""Memory of a card that the jobs on it share: who owns it is found or started here, and pieces of it are leased.

The owner is a process of its own (`card_owner`), elected by a lock on a file, and it holds memory alone: the first job
writes what all then read. Nothing here knows models (`upload`), and every failure is a `StoreUnavailable`, after which
a job uploads for itself.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import config
from .card_owner import try_lock, user_of
from .cuda_driver import Driver, driver
from .errors import StoreUnavailable

_OWNER = "import sys; sys.path.append(sys.argv[1]); from zcinfer.card_owner import main; main(*sys.argv[2:])"
# Of what goes over the socket; owners of another one are another's
_PROTOCOL = 1
# Seconds for an owner to be found or started, and for another job to write a piece
PATIENCE = 20.0
# And until one that did not answer is asked again
REST = 60.0
_WRITTEN = "somebody wrote to it"


class _Refused(StoreUnavailable):
    """The owner says no, of this piece."""


class Lease:
    """A piece of a card's memory that this process shares with others, as long as any tensor lies in it.

    Attributes
    ----------
    memory : torch.Tensor
        uint8, on the device. To be written only where `must_be_filled`.
    must_be_filled : bool
        This process asked first: call `fill` when it is written.
    owner : int
        Process id of who owns the memory.
    """

    def __init__(
        self, line: _Line, card: Driver, device: torch.device, nbytes: int, answer: dict[str, Any], spoiled: set[str]
    ):
        self._line = line
        self._key, self._spoiled = str(answer["key"]), spoiled
        self.owner = line.owner
        self.must_be_filled = answer["checksum"] is None
        self._checksum = answer["checksum"]
        pointer = card.open(bytes.fromhex(answer["handle"]))
        mapped = _Mapped(pointer, nbytes)
        closing = weakref.finalize(mapped, _close, card, pointer, line)
        closing.atexit = False  # the end of the process closes it
        self.memory = mapped.tensor(device)

    def fill(self) -> None:
        """Say that it is written, and to the last byte there."""
        self._checksum = checksum(self.memory)
        self.must_be_filled = False
        self._line.send(filled=self._checksum)

    def told(self) -> str:
        """What is known against it without a look at the memory, as `trouble`; microseconds."""
        found = self._line.told()
        if found == _WRITTEN:
            self._spoiled.add(self._key)
        return found

    def trouble(self) -> str:
        """Why what was computed with it since the last call cannot be trusted; empty where it can.

        The owner is gone, and CUDA does not say what its memory is then; or somebody wrote to it. All of it is read.
        """
        found = self.told()
        if not found and checksum(self.memory) != self._checksum:
            self._line.send(spoiled=True)
            self._spoiled.add(self._key)
            found = _WRITTEN
        return found


def checksum(memory: torch.Tensor) -> int:
    """A number that changes when any byte does (uint8, a multiple of 8): the sum of its words."""
    with torch.inference_mode(False):
        return int(memory.view(torch.int64).sum())


class Card:
    """The memory of a device that jobs share.

    Parameters
    ----------
    device : torch.device
    share : float
        Of the card's memory, that may be shared, if this process starts the owner.
    directory : path, optional
        Of sockets and locks, one for each user of this machine.
    """

    def __init__(self, device: torch.device, share: float, directory: Path | None = None):
        if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
            raise StoreUnavailable("instances of a card in MIG mode share no memory")
        self._device = device
        self._share = share
        self._driver = driver(device.index or 0)
        self._directory = private_runtime_directory() if directory is None else directory
        # Short, since the path of a socket may have 107 bytes
        self._name = f"{self._driver.uuid.removeprefix('GPU-')[:13]}-{_PROTOCOL}"
        self._lock = threading.Lock()
        self._stay: _Line | None = None
        # What somebody wrote to is this process's own from then on
        self._spoiled: set[str] = set()
        self._silent = "", 0.0

    def lease(self, key: str, nbytes: int) -> Lease:
        """Lease the piece of that name.

        Parameters
        ----------
        key : str
            What it holds: equal for equal content.
        nbytes : int
            A multiple of 8.

        Raises
        ------
        StoreUnavailable
        """
        if key in self._spoiled:
            raise StoreUnavailable("a model in some job writes to its weights")
        why, until = self._silent
        if time.monotonic() < until:
            raise StoreUnavailable(why)
        try:
            return self._leased(key, nbytes)
        except _Refused:
            raise
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, StoreUnavailable) as error:
            why = str(error) or type(error).__name__
            self._silent = why, time.monotonic() + REST
            raise StoreUnavailable(why) from error

    def _leased(self, key: str, nbytes: int) -> Lease:
        with self._lock:
            # One connection is for the process: what it leases again later is still there
            if self._stay is not None and self._stay.told():
                self._stay.close()
                self._stay = None
            if self._stay is None:
                self._stay = self._connected()
        line = self._connected()
        try:
            line.send(want=key, nbytes=nbytes)
            answer = line.receive(time.monotonic() + PATIENCE)
            if answer is None:
                raise StoreUnavailable("the process that owns the card's shared memory ended")
            if "refused" in answer:
                raise (StoreUnavailable if answer.get("never") else _Refused)(str(answer["refused"]))
            return Lease(line, self._driver, self._device, nbytes, answer | {"key": key}, self._spoiled)
        except BaseException:
            line.close()
            raise

    def _connected(self) -> _Line:
        """A connection to the owner, which is started where there is none."""
        deadline = time.monotonic() + PATIENCE
        path = self._directory / f"{self._name}.sock"
        while True:
            line = _Line.to(path, deadline)
            if line is not None:
                return line
            if time.monotonic() > deadline:  # also where each that is started ends at once
                raise StoreUnavailable(f"who owns the shared memory of {self._driver.uuid} does not answer")
            descriptor = os.open(self._directory / f"{self._name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if try_lock(descriptor):
                    self._start(path, descriptor)
                    continue
            finally:
                os.close(descriptor)  # the owner has it, too
            time.sleep(0.01)  # it is about to listen, or to end

    def _start(self, path: Path, lock: int) -> None:
        path.unlink(missing_ok=True)  # of one that was killed
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(128)
            package = str(Path(__file__).resolve().parents[1])
            done = subprocess.run(
                [
                    *(sys.executable, "-P", "-c", _OWNER, package),
                    *(str(path), str(lock), str(listener.fileno()), self._driver.uuid, str(self._share)),
                ],
                env=self._environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock, listener.fileno()),
                start_new_session=True,
                timeout=PATIENCE,
            )
        if done.returncode:
            path.unlink(missing_ok=True)
            raise StoreUnavailable(f"the owner of the card's shared memory ended with status {done.returncode}")

    def _environment(self) -> dict[str, str]:
        # Of a test's driver there is one card, whatever its name
        return os.environ | ({"CUDA_VISIBLE_DEVICES": self._driver.uuid} if self._device.type == "cuda" else {})

    def close(self) -> None:
        """Let the owner know that this process wants no more of it; what is leased stays."""
        with self._lock:
            if self._stay is not None:
                self._stay.close()
                self._stay = None


class _Line:
    """A connection to the owner."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._received = b""
        self._told = ""
        self.owner = 0
        _lines.add(self)

    @classmethod
    def to(cls, path: Path, deadline: float) -> _Line | None:
        """To the owner that listens there; None where there is none, or one that ends."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionError, BlockingIOError):
            sock.close()
            return None
        line = cls(sock)
        try:
            if user_of(sock) != os.geteuid():
                raise StoreUnavailable(f"{path} is another user's")
            greeting = line.receive(deadline)
        except BaseException:
            line.close()
            raise
        if greeting is None:
            line.close()
            return None
        line.owner = int(greeting["owner"])
        return line

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # found when an answer is read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None where the other end is gone."""
        while b"\n" not in self._received:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise StoreUnavailable("the process that owns the card's shared memory does not answer in time")
            try:
                received = self._socket.recv(1 << 16)
            except OSError:
                received = b""
            if not received:
                return None
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise StoreUnavailable("what the owner of the card's shared memory says is malformed") from error
        return found

    def told(self) -> str:
        """Why the lease is no good any more, as far as is known without asking; empty where it is."""
        if not self._told and self._received + self._peek():
            self._told = _WRITTEN
        return self._told

    def _peek(self) -> bytes:
        try:
            if not select.select([self._socket], [], [], 0)[0]:
                return b""
            received = self._socket.recv(1 << 16)
        except (OSError, ValueError):
            received = b""
        if not received:
            self._told = "the process that owned it is gone"
        return received

    def close(self) -> None:
        self._socket.close()


# A forked child would hold what its parent leased
_lines: weakref.WeakSet[_Line] = weakref.WeakSet()


def _close_in_child() -> None:
    for line in list(_lines):
        line.close()


os.register_at_fork(after_in_child=_close_in_child)


class _Mapped:
    """Bytes at an address of a device, kept by the tensors that lie on them."""

    def __init__(self, pointer: int, nbytes: int):
        self._interface = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (pointer, False)}

    def tensor(self, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            self.__cuda_array_interface__ = self._interface | {"strides": None}
            return torch.as_tensor(self, device=device)
        self.__array_interface__ = self._interface
        return torch.from_numpy(np.asarray(self))


def _close(card: Driver, pointer: int, line: _Line) -> None:
    with suppress(StoreUnavailable):
        card.close(pointer)
    line.close()


def private_runtime_directory() -> Path:
    """Directory of this user's sockets, which nobody else can enter.

    Raises
    ------
    StoreUnavailable
        Somebody else made it, or can enter it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime and os.path.isdir(runtime) else Path(tempfile.gettempdir())
    path = parent / f"zcinfer-gpu-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise StoreUnavailable(f"no directory for the sockets of GPUs can be made: {error}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not path.is_dir() or path.is_symlink():
        raise StoreUnavailable(f"{path} is not a directory of yours alone (mode 0700): remove it")
    return path


_cards: dict[torch.device, Card] = {}
_finding = threading.Lock()


def card_of(device: torch.device) -> Card | None:
    """The shared memory of that device; None where the setting ``zcinfer.gpu.share`` does not ask for it.

    Raises
    ------
    StoreUnavailable
    """
    if not config.get("gpu.share"):
        return None
    with _finding:
        if device not in _cards:
            _cards[device] = Card(device, float(config.get("gpu.share-memory")))
        return _cards[device]
