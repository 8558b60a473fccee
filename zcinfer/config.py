"""Settings: defaults, Dask's configuration on top, and the directories that follow from them.

The settings live in Dask's configuration under ``zcinfer`` (a ``zcinfer.yaml`` beside Dask's own files, or
``DASK_ZCINFER__STORE=file`` in the environment). Where Dask is not installed (a machine that only loads models)
the same environment variables are read directly.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError
from .files import make_directory

DEFAULTS: dict[str, Any] = {
    # "ray", "ray:HOST:PORT", "file" or "file:DIR"
    "store": "ray",
    # Directory of archives and names; None: $XDG_DATA_HOME/zcinfer
    "registry": None,
    # URL, any that fsspec knows, at which a copy of each published archive is kept for other machines
    "remote": None,
    # Open models from a registry that other users can write to
    "trust-registry": False,
    # Models that nobody uses leave a full store for others, those used longest ago first
    "store-eviction": False,
    # Modules a process keeps built, over all models; the least recently used go first
    "residents": 32,
    # Processes that share this one's device and memory; a cluster of ours says how many it has
    "jobs": 1,
    # Threads of a process that compute at a time; None: as many as there are cores for
    "computing": None,
    # Count what is done and where the time goes
    "telemetry": True,
    "gpu": {
        # Of the memory that is free on a GPU, what models may take that a process keeps built
        "residents": 0.5,
        # Jobs on one GPU share one copy of the weights. Not tried on a GPU yet
        "share": False,
        # Of the memory of a GPU, what such copies may take
        "share-memory": 0.5,
    },
    "ray": {
        # Address of a running Ray; None: $RAY_ADDRESS, else a private one is started
        "address": None,
        # Bytes of shared memory for our own Ray ("4 GiB"); None: Ray's default, 30 % of the memory
        "object-store-memory": None,
        # File with the token of our own Ray, a copy of its head's; None: $XDG_STATE_HOME/zcinfer/ray-token
        "token-file": None,
        # Address of this machine's node of Ray, where several can be seen; None: Ray finds it
        "host": None,
        # Seconds that a store may take to answer, and our own Ray to start
        "timeout": 8,
        "start-timeout": 60,
    },
}

try:
    import dask.config as _dask_config
except ImportError:
    _dask_config = None
else:
    _dask_config.update_defaults({"zcinfer": DEFAULTS})


def _is_text(value: Any) -> bool:
    return isinstance(value, str | Path) and "\0" not in str(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


# What each setting may be, in words, and whether a value is that.
_KINDS: dict[str, tuple[str, Callable[[Any], bool] | None]] = {
    "store": ("text, as 'ray' or 'file'", _is_text),
    "registry": ("the path of a directory", lambda v: v is None or _is_text(v)),
    "remote": ("a URL, as s3://bucket/models, or null", lambda v: v is None or _is_text(v)),
    # A text would be true, whatever it says.
    "trust-registry": ("true or false", lambda v: type(v) is bool or v in (0, 1)),
    "store-eviction": ("true or false", lambda v: type(v) is bool or v in (0, 1)),
    "residents": ("a whole number", _is_whole),
    "jobs": ("a whole number from 1", lambda v: _is_whole(v) and v > 0),
    "computing": ("a whole number from 1, or null", lambda v: v is None or (_is_whole(v) and v > 0)),
    "telemetry": ("true or false", lambda v: type(v) is bool or v in (0, 1)),
    "gpu.residents": ("a share above 0, to 1", _is_share),
    "gpu.share": ("true or false", lambda v: type(v) is bool or v in (0, 1)),
    "gpu.share-memory": ("a share above 0, to 1", _is_share),
    "ray.address": ("HOST:PORT, or null", lambda v: v is None or _is_text(v)),
    "ray.object-store-memory": ("bytes, as '4 GiB', or null", lambda v: v is None or _is_whole(v) or _is_text(v)),
    "ray.token-file": ("the path of a file, or null", lambda v: v is None or _is_text(v)),
    "ray.host": ("an address of this machine, or null", lambda v: v is None or _is_text(v)),
    "ray.timeout": ("a number of seconds above 0", _is_seconds),
    "ray.start-timeout": ("a number of seconds above 0", _is_seconds),
}


def get(key: str) -> Any:
    """Value of the setting ``key``, dots between levels.

    Raises
    ------
    SettingsError
        It is not what that setting can be.

    Examples
    --------
    >>> get("residents")
    32
    """
    try:
        value = _dask_config.get(f"zcinfer.{key}") if _dask_config is not None else _from_environment(key)
    except (TypeError, LookupError) as error:
        raise SettingsError(
            f"the setting zcinfer.{key} cannot be found: zcinfer must be a table of settings"
        ) from error
    what, fits = _KINDS.get(key, ("", None))
    if fits is not None and not fits(value):
        raise SettingsError(f"the setting zcinfer.{key} is {str(value)[:80]!r}: it must be {what}")
    return value


def _from_environment(key: str) -> Any:
    """As Dask has it."""
    name = "DASK_ZCINFER__" + key.upper().replace(".", "__").replace("-", "_")
    if name in os.environ:
        text = os.environ[name]
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return {"none": None, "null": None, "false": False, "true": True}.get(text.lower(), text)
    value: Any = DEFAULTS
    for part in key.split("."):
        value = value[part]
    return value


def settings() -> dict[str, Any]:
    """All settings, as they are in Dask's configuration."""
    return dict(_dask_config.get("zcinfer"))


def shown(url: str) -> str:
    """A URL for people: its password is left out, also one with ``@`` or ``/`` in it.

    Examples
    --------
    >>> shown("sftp://me:secret@server/models")
    'sftp://me:***@server/models'
    """
    # Digits before a slash are a port
    return re.sub(r"(://[^/@:]*):(?!\d*/).*@", r"\1:***@", url)


def local_directory(text: str, what: str, otherwise: str = "give a path") -> Path:
    """Absolute path of a directory given as a path or a ``file://`` URL; others are refused, with what to do then."""
    try:
        url = urlsplit(text)
        path = Path(url.path if url.scheme == "file" else text).expanduser().absolute()
    except (ValueError, RuntimeError) as error:
        raise SettingsError(f"{what} is {shown(text)!r}: {error}") from error
    if url.scheme and url.scheme != "file" and "://" in text:
        raise SettingsError(
            f"{what} is {shown(text)!r}, but only directories (of this machine, or mounted on all machines) can be "
            f"used: {otherwise}."
        )
    return path


def registry_at(text: str, what: str) -> Path:
    """A registry's directory, given as `local_directory`; at URLs of other kinds are copies of its archives alone.

    Examples
    --------
    >>> registry_at("file:///shared/models", "zcinfer.registry")
    PosixPath('/shared/models')
    """
    return local_directory(
        text,
        what,
        "names and versions need locks and renames, which object stores have not. Give the path of a directory, and "
        "set zcinfer.remote (DASK_ZCINFER__REMOTE) to the URL, where put then keeps a copy of each archive for all "
        "machines",
    )


def registry_directory() -> Path:
    """Directory that holds archives and names: setting ``zcinfer.registry``, else the XDG data directory."""
    configured = get("registry")
    if configured is not None:
        return registry_at(str(configured), "zcinfer.registry")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "zcinfer"


def private_directory(path: Path) -> Path:
    """Create ``path`` with mode 0700 if it is missing; refuse one that others can write to."""
    try:
        make_directory(path, 0o700)
    except OSError as error:
        raise SettingsError(f"{path} cannot be used as a directory: {error}. Name another one.") from error
    check_owner(path)
    return path


def check_owner(path: Path) -> None:
    """Refuse a directory that others can write to: whoever can, can have code run by whoever loads a model from it."""
    try:
        status = path.stat()
    except OSError:
        return  # what is not there holds nothing
    if not get("trust-registry") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise SettingsError(
            f"{path} can be written to by others (owner {status.st_uid}, mode {status.st_mode & 0o7777:o}), and models "
            "from there run code. Use a directory of your own (zcinfer.registry), make it yours alone (chmod 700), or "
            "say that you trust it (zcinfer.trust-registry: true)."
        )
