"""How a process gets into a Ray, and out of it again: one at a time, by the token of ours or of the user's.

Not for what is done there (`ray_store`), nor for starting one (`own_ray`).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from . import config, keeper, own_ray
from .deadline import join_within
from .errors import StoreUnavailable
from .sharing import copy_mapped

# Of the actors in it
NAMESPACE = "zcinfer"


class Session:
    """This process's connection to a Ray: it is in one at a time, and in the user's own if that was there first."""

    current: Session | None = None

    def __init__(self, address: str, environment: dict[str, str], users: bool):
        self.address = address
        self.users = users
        self.entered = False
        self._environment = environment
        self.before: dict[str, str | None] = {}  # variables that it has set
        self._leaving = threading.Lock()

    @classmethod
    def enter(cls, address: str, environment: dict[str, str], within: Callable[[Callable[[], None]], None]) -> Session:
        """Connect; another store's session is left first, and one that is not ours is never left."""
        if cls.current is not None:
            cls.current.copy_loaded()
            cls.current.leave(float(config.get("ray.timeout")))
        users = refuse_another(address)
        session = cls(address, environment, users)
        if not users:
            within(session._connect)
        session.entered = True
        cls.current = session
        return session

    def _connect(self) -> None:
        self.before = _set(self._environment)
        # Ray's own start-up notes would land in the middle of a progress bar.
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(
            address=self.address,
            _node_ip_address=config.get("ray.host"),
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )

    def copy_loaded(self) -> None:
        """Before it is left: have what is loaded stay what it is, also when its memory is another object's."""
        if not self.entered or self.users:
            return
        try:
            copy_mapped()
        except OSError as error:
            raise StoreUnavailable(
                f"Ray at {self.address} cannot be left: what is loaded from it must be copied, and {error}. Drop "
                "models that are not needed."
            ) from error

    def leave(self, seconds: float) -> None:
        """Disconnect, unless the session is the user's. What is loaded stays loaded (see `copy_loaded`)."""
        with self._leaving:
            if not self.entered:
                return
            self.entered = False
            if Session.current is self:
                Session.current = None
            if not self.users:
                # With the raylet gone, shutdown may hang as every other call.
                join_within(seconds, ray.shutdown)
                _set(self.before)


def _set(environment: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables that Ray's clients need, and return what they were."""
    before = {name: os.environ.get(name) for name in environment}
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if environment:
        # Ray reads these variables when it is imported, which a script may have done long ago.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
    return before


def refuse_another(address: str | None) -> bool:
    """Whether the user's program is in the Ray at ``address`` itself; refuse if it is in another."""
    if not ray.is_initialized() or Session.current is not None:
        return False
    found = ray.get_runtime_context().gcs_address
    if found != address:
        raise StoreUnavailable(
            f"this process is in Ray at {found} already, and can be in one only. Use that one, "
            f"zc.connect('ray:{found}'), or the store 'file'."
        )
    return True


def probe(address: str, timeout: float) -> None:
    """See that something listens before ray.init, which would try for minutes."""
    try:
        parts = urlsplit(f"//{address}")
        if not parts.hostname or not parts.port:
            raise ValueError("it must be HOST:PORT")
        socket.create_connection((parts.hostname, parts.port), timeout=timeout).close()
    except (OSError, ValueError) as error:
        raise StoreUnavailable(
            f"no Ray answers at {address!r}: {error}. Check the address (store='ray:HOST:PORT', RAY_ADDRESS or "
            "zcinfer.ray.address), or leave it out to have one started here."
        ) from None


def why_silent(address: str) -> str:
    """What can be seen from here of a Ray that does not answer."""
    parts = urlsplit(f"//{address}")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=1).close()
    except ConnectionRefusedError:
        return "nothing listens there any more, so its head has ended"
    except OSError as error:
        here = socket.gethostname()
        return f"its head cannot be reached from {here} ({error}): that machine is down, or the network between them"
    return (
        "its head listens, so it is overloaded or stopped, or asks for a token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH) "
        "that this process does not have"
    )


def node_infos(address: str, seconds: float) -> dict[Any, Any]:
    """What the head of a Ray knows of each node, by the node's id; asked without entering it."""
    found: dict[Any, Any] = GcsClient(address).get_all_node_info(timeout=seconds)
    return found


def nodes(address: str, environment: Mapping[str, str | None], seconds: float) -> list[str] | None:
    """Addresses of the nodes of the Ray at ``address``, without entering it; None: it refuses the token.

    Raises
    ------
    StoreUnavailable
        What answers there is no Ray.
    """

    def ask() -> list[str]:
        found = node_infos(address, seconds).values()
        return [node.node_manager_address for node in found if node.state == GcsNodeInfo.ALIVE]

    before = _set(environment)
    try:
        outcome = join_within(seconds, ask)
    finally:
        _set(before)
    result, error = outcome or (None, TimeoutError(f"no answer within {seconds:.0f} s"))
    if isinstance(error, ray.exceptions.AuthenticationError):
        return None
    if error is not None:
        raise StoreUnavailable(f"what listens at {address!r} is no Ray: {first_line(error)}") from None
    return result


def admitted(address: str, environment: dict[str, str] | None, seconds: float) -> dict[str, str]:
    """The environment by which Ray lets us in: the one given, else the user's or that of our own Ray."""
    if ray.is_initialized() and Session.current is None:
        return environment or {}  # the user's program is in it
    token_file = config.get("ray.token-file")
    ours = keeper.has_token(token_file)
    candidates = [environment] if environment else [_users_token(), *([own_ray.environment()] if ours else [])]
    if token_file or keeper.runs_here(address):
        candidates.reverse()  # Ray prints a warning where it is refused
    # Tried as it will be entered: what the session that is left then has set does not count
    unset = Session.current.before if Session.current is not None else {}
    for candidate in candidates:
        if nodes(address, unset | candidate, seconds) is not None:
            return candidate
    tried = keeper.token_path(token_file) if environment or ours else "none of ours is here"
    raise StoreUnavailable(
        f"Ray at {address} asks for another token than this process has ({tried}). Copy the token file of its head to "
        "this machine (mode 0600) and give its path: zcinfer.ray.token-file, or DASK_ZCINFER__RAY__TOKEN_FILE."
    )


def _users_token() -> dict[str, str]:
    """What a driver needs for a Ray the user operates, where Ray has left this user's token in its usual place."""
    unset = "RAY_AUTH_MODE" not in os.environ
    return {"RAY_AUTH_MODE": "token"} if unset and (Path.home() / ".ray" / "auth_token").exists() else {}


def first_line(error: BaseException) -> str:
    """What an error of Ray's says, without the traces of other processes that follow."""
    return next((line for line in str(error).splitlines() if line.strip()), "")
