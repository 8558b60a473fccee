"""Our own Ray: started for this process, reachable from this machine only unless told, and gone when the process is.

This is the side of the process that wants a Ray; `zcinfer.ray_node` is the small process between it and Ray. What
is kept in that Ray, and how one talks to it, is not for here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import psutil

from .errors import SettingsError, StoreUnavailable
from .files import sync_directory
from .ray_node import MARK, PREFIX, claim, clear, sweep

LOG = "ray-start.log"
LOOPBACK = "127.0.0.1"
KEEPER = "import sys; sys.path.append(sys.argv[1]); from zcinfer.ray_node import keep; keep(*sys.argv[2:])"
# Seconds that the keeper has to end Ray; it gives up after 15 itself
STOP_TIMEOUT = 20.0
# Ray starts with no less. Its sockets need 64 of the 107 bytes that a socket's path may have
SMALLEST_STORE, LONGEST_DIRECTORY = 75 * 2**20, 43
# Characters of a token: ours have 64, and what signs copies must not be guessed by who has one
SHORTEST_TOKEN = 32
# With these our Ray would become part of something of the user's
FOREIGN = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_NAMESPACE", "RAY_START_HOOK")
INSTEAD = 'or use memory-mapped files instead of Ray, with the setting zcinfer.store: "file".'


@dataclass(frozen=True)
class Place:
    """Where a node of Ray listens, and of which Ray it is.

    Attributes
    ----------
    host : str
        Address of this machine by which the other nodes reach it. Empty: a Ray of this machine alone.
    port : int
        Of the head; 0: any that is free.
    join : str
        "HOST:PORT" of the head whose Ray this node becomes part of. Empty: this is the head.
    """

    host: str = ""
    port: int = 0
    join: str = ""


ALONE = Place()


def token_path(given: str | None = None) -> Path:
    """Path of the file with the token for our own Rays: this user's, made at the first call, or the one ``given``.

    Raises
    ------
    SettingsError
        The file cannot be made, others can read it, or it is empty or short; or the given one is not there.
    """
    if given:
        return _given_token(Path(given).expanduser().absolute())
    try:
        path = _users_file()
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as new:
                new.write(secrets.token_hex(32))
                new.flush()
                # Else a loss of power may leave the name with an empty file
                os.fsync(new.fileno())
                # A link appears whole and only once: of processes that race all but one find the name taken
                with contextlib.suppress(FileExistsError):
                    os.link(new.name, path)
            sync_directory(path.parent)
        status = path.stat()
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"the token of our own Ray cannot be stored: {error}. Set XDG_STATE_HOME to a directory of your own."
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SettingsError(f"{path} is not yours alone (mode 0600), so others could use your Ray. Remove it.")
    try:
        found = len(path.read_bytes().strip())
    except OSError as error:
        raise SettingsError(f"the token of our own Ray, {path}, cannot be read: {error}. Remove it.") from error
    if found < SHORTEST_TOKEN:
        raise SettingsError(
            f"{path} {_too_short(found)}: whoever guesses it can use your Ray, and sign models for you. "
            "Remove it, and a new one is made; or copy that of another machine of yours to it."
        )
    return path


def _users_file() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser().absolute()
    return state / "zcinfer" / "ray-token"


def _given_token(path: Path) -> Path:
    try:
        status, token = path.stat(), path.read_text().strip()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the token file {path} (zcinfer.ray.token-file) cannot be read: {error}. Copy the head's to it, mode 0600."
        ) from error
    if len(token) < SHORTEST_TOKEN:
        raise SettingsError(
            f"the token file {path} (zcinfer.ray.token-file) {_too_short(len(token))}. Copy the head's to it."
        )
    # A group may read it, since secrets that are mounted into containers belong to root and a group
    if status.st_mode & 0o027:
        raise SettingsError(
            f"others can read or change the token file {path} (mode {status.st_mode & 0o7777:o}), and so use your Ray. "
            f"chmod 600 {path}; if somebody may have read it, remove the head's, start the head anew and copy again."
        )
    return path


def _too_short(characters: int) -> str:
    return f"has {characters} characters, and must have {SHORTEST_TOKEN}" if characters else "is empty"


def runs_here(address: str) -> bool:
    """Whether a node of this user's own Ray at ``address`` runs on this machine."""
    for record in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/ray_current_cluster"):
        with contextlib.suppress(OSError, ValueError):
            listens = record.read_text().strip()
            # Of a Ray of this machine alone, drivers are given another address than it writes down itself
            if record.stat().st_uid == os.geteuid() and address in (listens, _to_drivers(listens)):
                return True
    return False


def has_token(given: str | None = None) -> bool:
    """Whether there is a token already, which `token_path` would not make."""
    return bool(given) or _users_file().exists()


def ray_environment(token_file: str | None = None) -> dict[str, str]:
    """Environment that a process needs, from before it imports ray, to be let into our own Ray.

    Examples
    --------
    >>> ray_environment()["RAY_AUTH_MODE"]
    'token'
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(token_file)),
        "RAY_AUTH_TOKEN": "",  # the user's own would win over the path; empty counts as unset
        "RAY_USAGE_STATS_ENABLED": "0",
    }


class OwnRay:
    """A running node of a Ray of our own, made by `start`.

    Attributes
    ----------
    address : str
        "HOST:PORT" of its head, for ``ray.init``.

    Notes
    -----
    It ends when this process ends, in whatever way. A forked child neither stops it nor keeps it alive. Any thread
    may call `stop`; drivers that are still connected lose their Ray then, so disconnect first.
    """

    address: str

    def __init__(self, directory: Path, object_store_memory: int, place: Place, token_file: str | None) -> None:
        self._pid = os.getpid()
        self._place = place
        self._directory = directory
        self._stopping = threading.RLock()
        self._claim = claim(directory)
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment |= ray_environment(token_file) | {MARK: str(directory)}
        # The way to have Ray bind the loopback interface alone, as it does on macOS and Windows
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1" if place.host else "0"
        # With ray[default] installed, a second of the start
        environment["RAY_enable_metrics_collection"] = "0"
        # Ray leaves GPUs visible to actors that ask for none
        environment["CUDA_VISIBLE_DEVICES"] = ""
        package = str(Path(__file__).resolve().parents[1])
        with open(directory / LOG, "wb") as log:
            self._keeper = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", KEEPER, package, str(directory), str(object_store_memory)),
                    *(place.host, str(place.port), place.join),
                ],
                env=environment,
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        _running.add(self)
        atexit.register(self.stop)

    def wait(self, deadline: float) -> None:
        """Return when it is up, and its ``address`` known; where it does not come up, it is stopped.

        Parameters
        ----------
        deadline : float
            Of ``time.monotonic()``.

        Raises
        ------
        StoreUnavailable
        """
        try:
            self._connect(deadline)
        except BaseException:
            self.stop()
            raise

    def _connect(self, deadline: float) -> None:
        assert self._keeper.stdout is not None
        report = b""
        while not report.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._keeper.stdout], [], [], left)[0]:
                raise self._failure("was not ready in time. Raise the setting zcinfer.ray.start-timeout")
            received = os.read(self._keeper.stdout.fileno(), 4096)
            if not received:
                raise self._failure("lost its keeper process while it started: something killed it. Start it again")
            report += received
        answer = json.loads(report)
        if "port" not in answer:
            raise self._failure(
                f"did not start: `ray start` ended with status {answer['status']}. Mend what it complains of below"
            )
        self.address = self._place.join or (
            f"{self._place.host}:{answer['port']}" if self._place.host else _to_drivers(f"{LOOPBACK}:{answer['port']}")
        )

    def _failure(self, what: str) -> StoreUnavailable:
        printed: list[str] = []
        with contextlib.suppress(OSError):
            printed = (self._directory / LOG).read_text(errors="replace").splitlines()
        # That a port is in use is our doing, see ray_node
        tail = [line for line in printed if "already occupied" not in line][-20:]
        return StoreUnavailable(f"our own Ray {what}, {INSTEAD} The last that `ray start` printed:\n" + "\n".join(tail))

    def stop(self) -> None:
        """End the Ray, and return when its processes and files are gone; again does nothing."""
        if os.getpid() != self._pid:
            return
        with self._stopping:
            atexit.unregister(self.stop)
            _running.discard(self)
            self._release()
            # A child that C code forked may still hold the pipe open
            self._keeper.terminate()
            try:
                self._keeper.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            if self._keeper.returncode != 0:
                clear(self._directory)

    def _release(self) -> None:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1


_running: weakref.WeakSet[OwnRay] = weakref.WeakSet()


def _release_in_child() -> None:
    for ray in list(_running):
        ray._release()


os.register_at_fork(after_in_child=_release_in_child)


def start(
    object_store_memory: int | None, timeout: float, place: Place = ALONE, token_file: str | None = None
) -> OwnRay:
    """Start a Ray of our own, or a further node of one, in about two seconds.

    Parameters
    ----------
    object_store_memory : int, optional
        Bytes of shared memory for objects; by default 30 % of the memory, if /dev/shm has that.
    timeout : float
        Seconds until the start is given up.
    place : Place
        Where it listens. Default: for this machine alone.
    token_file : str, optional
        Path of the token; by default this user's.

    Raises
    ------
    StoreUnavailable
        It did not start, or /dev/shm is too small; nothing is left running.
    """
    deadline = time.monotonic() + timeout
    ray = begin(object_store_memory, place, token_file)
    ray.wait(deadline)
    return ray


def begin(object_store_memory: int | None, place: Place = ALONE, token_file: str | None = None) -> OwnRay:
    """The same without waiting for it: see `OwnRay.wait`."""
    size = _object_store_bytes(object_store_memory)
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) + len(f"/{PREFIX}12345678") > LONGEST_DIRECTORY:
        parent = "/tmp"
    sweep(Path(parent))
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        return OwnRay(directory, size, place, token_file)
    except BaseException:
        clear(directory)
        raise


def _to_drivers(address: str) -> str:
    """The address of a Ray of this machine alone as drivers must be given it; any other as it is."""
    host, _, port = address.rpartition(":")
    if host != LOOPBACK:
        return address
    # Drivers replace 127.0.0.1 by the machine's address on the network, where ours does not listen; neither of these
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return f"LOCALHOST:{port}"
    return f"[::ffff:{LOOPBACK}]:{port}"


def _object_store_bytes(wanted: int | None) -> int:
    if wanted is not None and wanted < SMALLEST_STORE:
        raise SettingsError(f"zcinfer.ray.object-store-memory is {wanted} bytes; Ray needs at least {SMALLEST_STORE}.")
    free = 0
    with contextlib.suppress(OSError):
        shared = os.statvfs("/dev/shm")
        free = int(shared.f_bavail * shared.f_frsize * 0.95)
    if free < (wanted or SMALLEST_STORE):
        raise StoreUnavailable(
            f"our own Ray needs {wanted or SMALLEST_STORE} bytes of /dev/shm, which has {free} to give. Make it larger "
            "(docker run --shm-size=8g; Docker's default is 64 MB), set zcinfer.ray.object-store-memory lower, "
            f"{INSTEAD}"
        )
    memory = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(limit).read_text()))
    return wanted or max(SMALLEST_STORE, min(int(0.3 * memory), free))
