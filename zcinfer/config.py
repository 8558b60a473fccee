"""Settings: defaults, Dask's configuration on top, and the directories that follow from them.

The settings live in Dask's configuration under ``zcinfer`` (a ``zcinfer.yaml`` beside Dask's own files, or
``DASK_ZCINFER__STORE=file`` in the environment). Where Dask is not installed (a machine that only loads models)
the same environment variables are read directly.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError

DEFAULTS: dict[str, Any] = {
    # "ray", "ray:HOST:PORT", "file" or "file:DIR"
    "store": "ray",
    # Directory of archives and names; None: $XDG_DATA_HOME/zcinfer
    "registry": None,
    # Open models from a registry that other users can write to
    "trust-registry": False,
    # Modules a process keeps built, over all models; the least recently used go first
    "residents": 32,
    # Processes that share this one's device and memory; a cluster of ours says how many it has
    "jobs": 1,
    # Threads of a process that compute at a time; None: as many as there are cores for
    "computing": None,
    # Count what is done and where the time goes
    "telemetry": True,
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


def get(key: str) -> Any:
    """Value of the setting ``key``, dots between levels.

    Examples
    --------
    >>> get("residents")
    32
    """
    if _dask_config is not None:
        return _dask_config.get(f"zcinfer.{key}")
    env = "DASK_ZCINFER__" + key.upper().replace(".", "__").replace("-", "_")
    if env in os.environ:
        text = os.environ[env]
        return int(text) if text.isdigit() else text
    value: Any = DEFAULTS
    for part in key.split("."):
        value = value[part]
    return value


def settings() -> dict[str, Any]:
    """All settings, as they are in Dask's configuration."""
    return dict(_dask_config.get("zcinfer"))


def local_directory(text: str, what: str) -> Path:
    """Absolute path of a directory given as a path or a ``file://`` URL; other URLs are refused."""
    url = urlsplit(text)
    if url.scheme and url.scheme != "file" and "://" in text:
        raise SettingsError(
            f"{what} is {text!r}, but only directories (of this machine, or mounted on all machines) can be used so "
            "far: give a path."
        )
    return Path(url.path if url.scheme == "file" else text).expanduser().absolute()


def registry_directory() -> Path:
    """Directory that holds archives and names: setting ``zcinfer.registry``, else the XDG data directory."""
    configured = get("registry")
    if configured is not None:
        return local_directory(str(configured), "zcinfer.registry")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "zcinfer"


def private_directory(path: Path) -> Path:
    """Create ``path`` with mode 0700 if it is missing; refuse one that others can write to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
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
