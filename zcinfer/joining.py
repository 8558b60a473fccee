"""What a head offers to the machines that join it, and what they must have in common with it.

The offer lies in the metadata of Dask's scheduler, where also every client finds the store. Not for starting anything.
"""

from __future__ import annotations

import asyncio
import platform
import socket
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import dask.config
from distributed import Security, rpc

from . import __version__, config, own_ray
from .errors import NodeError, SettingsError
from .keeper import token_path
from .registry import Registry

# Keys of the scheduler's metadata; clients read the first (`catalog.connect`)
STORE, HEAD = "zcinfer-store", "zcinfer-head"
# Seconds for an answer
PATIENCE = 10.0
# Programs of one cluster send each other pickles, bytecode and Ray's own messages
PACKAGES = ("ray", "dask", "distributed", "cloudpickle", "torch")


@dataclass(frozen=True)
class Offer:
    """Address of the head's Ray, directory of its registry, and the versions of what it runs with, by name."""

    ray: str
    registry: str
    versions: dict[str, str]

    @property
    def url(self) -> str:
        """URL of the store, for every process of the cluster."""
        from .ray_store import store_url

        return store_url(self.ray, Registry(self.registry), ours=True)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, host: str) -> None:
        """Refuse to join with other versions, without the head's token, or as a node that is there already.

        Raises
        ------
        NodeError
            Says what differs.
        SettingsError
            The token's file cannot be used.
        StoreUnavailable
            The head's Ray does not answer.
        """
        here = versions()
        differing = [
            f"{name} is {here.get(name, 'missing')} here and {wanted} there"
            for name, wanted in self.versions.items()
            if here.get(name) != wanted
        ]
        if differing:
            raise NodeError(
                f"this machine's packages are not the head's: {'; '.join(differing)}. Install the same (pip install "
                "--constraint constraints.txt), since programs of a cluster send each other code and objects."
            )
        from .ray_session import nodes, probe

        probe(self.ray, PATIENCE)
        there = nodes(self.ray, own_ray.environment(), PATIENCE)
        if there is None:
            raise NodeError(
                f"the head's Ray at {self.ray} refuses the token in {token_path(config.get('ray.token-file'))}. Copy "
                "the file that the head names to this machine (mode 0600), and give its path: --token-file FILE"
            )
        if host in there:
            raise NodeError(
                f"{host} is a node of this cluster already. End that one, or give another of this machine's addresses: "
                "--host ADDRESS. (One that was killed, or whose power failed, is forgotten within half a minute.)"
            )


def versions() -> dict[str, str]:
    """Versions of what the machines of a cluster must have in common, by name."""
    major, minor, _ = platform.python_version_tuple()
    found = {"Python": f"{major}.{minor}", "zcinfer": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # builds for CPU and GPU may meet
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def protocol() -> str:
    """How Dask's processes talk to each other: "tls" where Dask's configuration asks for it, else "tcp"."""
    return "tls" if dask.config.get("distributed.comm.require-encryption") else "tcp"


async def ask(address: str, wait: float = 0.0) -> Offer:
    """What the head offers whose scheduler is at ``address``, or will be within ``wait`` seconds.

    Raises
    ------
    NodeError
        Nothing answers there, or not the head of a cluster of ours.
    """
    deadline = monotonic() + wait
    while True:
        try:
            return await _ask(address)
        except NodeError:
            if monotonic() >= deadline:
                raise
        await asyncio.sleep(0.5)


async def _ask(address: str) -> Offer:
    try:
        socket.create_connection(_split(address), timeout=PATIENCE).close()
    except OSError as error:
        raise NodeError(
            f"nothing answers at {address!r}: {error}. Does `zcinfer node --head --host ADDRESS` run there, and is no "
            "firewall between? Give the address that it prints; --wait SECONDS waits for a head that starts now."
        ) from None
    try:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as scheduler:
            found = await asyncio.wait_for(scheduler.get_metadata(keys=[HEAD], default=None), PATIENCE)
    except Exception as error:
        raise NodeError(
            f"what listens at {address!r} is no scheduler of Dask, or of another version, or one that asks for TLS: "
            f"{type(error).__name__}: {error}. Give the address that `zcinfer node --head` prints."
        ) from error
    if found is None:
        raise NodeError(
            f"the scheduler at {address!r} was not started by `zcinfer node --head`: there is no Ray to join. Give the "
            "address that it prints."
        )
    return Offer(**found)


def local_host(address: str) -> str:
    """The address of this machine from which it reaches another's."""
    with socket.create_connection(_split(address), timeout=PATIENCE) as connection:
        found: str = connection.getsockname()[0]
    return found


def _split(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        if parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise SettingsError(f"{address!r} is no address: give HOST:PORT, or tcp://HOST:PORT as the head prints it")
