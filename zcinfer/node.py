"""One machine of a cluster: a node of Ray, whose shared memory holds the models, and the Dask workers that read them.

The head has Dask's scheduler and Ray's head besides. All of it is one program, and ends with it. Not for one machine
alone (`cluster`), nor for what a machine must show before it may join (`joining`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import dask.config
import psutil
from dask.system import cpu_count
from distributed import Scheduler
from distributed.system import MEMORY_LIMIT

from . import config, own_ray
from .cluster import INTERRUPTED, LOOPBACK, check_unpinned, scratch_directory, worker_options
from .dask_upkeep import bound_spans, upkeep_settings
from .errors import NodeError, SettingsError
from .joining import HEAD, STORE, Offer, ask, local_host, protocol, versions
from .keeper import ALONE, OwnRay, Place, token_path
from .mps import mps
from .nanny import Nanny
from .observer import Observer
from .pinning import Pinning
from .registry import Registry
from .sizes import format_size, parse_size

# Tasks of a worker at a time: one computes, the other reads and writes meanwhile, as in `LocalCluster`
THREADS = 2


@dataclass(frozen=True)
class Head:
    """The machine that the others join.

    Attributes
    ----------
    host : str
        Its address on their network, or a name of it. Empty: it listens on 127.0.0.1, and nobody can join.
    port, ray_port : int
        Of Dask's scheduler and of Ray; 0: any that is free.
    """

    host: str = ""
    port: int = 8786
    ray_port: int = 6379


@dataclass(frozen=True)
class Member:
    """A machine that joins.

    Attributes
    ----------
    address : str
        Of the head's scheduler, "tcp://HOST:PORT" or "HOST:PORT".
    host : str
        This machine's address on that network. Empty: that from which it reaches the head.
    wait : float
        Seconds that the head may take until it answers.
    """

    address: str
    host: str = ""
    wait: float = 0.0


@dataclass(frozen=True)
class Workers:
    """Worker processes of a machine.

    Attributes
    ----------
    number : int, optional
        How many; None: one for each core, or ``jobs_per_gpu`` for each GPU.
    memory_limit : str
        Private memory of each.
    gpus : "all", int, str, or a sequence of int and str, optional
        Which GPUs they are on, as for `LocalCluster`.
    jobs_per_gpu : int

    Raises
    ------
    SettingsError
        A GPU is not there, is hidden, or was given twice.
    """

    number: int | None = None
    memory_limit: str = "auto"
    gpus: str | int | Sequence[int | str] | None = None
    jobs_per_gpu: int = 1

    def __post_init__(self) -> None:
        if self.memory_limit != "auto":
            parse_size(self.memory_limit, "--memory-limit")
        if self.pinning is not None:
            check_unpinned(self.number, None)

    @cached_property
    def pinning(self) -> Pinning | None:
        """Which worker is on which GPU."""
        return Pinning.of(self.gpus, self.jobs_per_gpu)

    @property
    def count(self) -> int:
        if self.pinning is not None:
            return len(self.pinning)
        return cpu_count() if self.number is None else self.number

    def options(self, host: str) -> list[dict[str, Any]]:
        """Arguments for the `Nanny` of each, on the machine of that address."""
        jobs = self.pinning.jobs if self.pinning is not None else None
        common = worker_options(self.count, config=_of_host(host), jobs_per_gpu=jobs)
        if self.pinning is None:
            return [common] * self.count
        # Names are unique in the whole cluster.
        pinned = self.pinning.workers(f"{host}-" if host else "").values()
        return [{**common, **own, "env": {**common["env"], **own["env"]}} for own in pinned]

    @property
    def nbytes(self) -> int:
        """Bytes that each may have for itself."""
        if self.memory_limit != "auto":
            return parse_size(self.memory_limit, "--memory-limit")
        return int(MEMORY_LIMIT) // max(1, self.count)


def serve(role: Head | Member, workers: Workers, announce: Callable[[str], object]) -> None:
    """Be a node until SIGINT or SIGTERM, or until the cluster ends.

    Parameters
    ----------
    role : Head or Member
    workers : Workers
    announce : callable
        Gets what a person must know, once all of it runs.

    Raises
    ------
    NodeError
        It cannot join, or has lost its head.
    SettingsError
        An address is not this machine's, or a port is in use.
    StoreUnavailable
        Ray does not start.
    """
    # What is lost while a cluster ends is no news
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with dask.config.set(upkeep_settings({})):
        asyncio.run(_serve(role, workers, announce))


async def _serve(role: Head | Member, workers: Workers, announce: Callable[[str], object]) -> None:
    ended = _end_on_signals()
    try:
        if isinstance(role, Head):
            await _be_head(role, workers, announce)
        else:
            await _be_member(role, workers, announce)
    except asyncio.CancelledError:
        if not ended.is_set():
            raise


async def _be_head(role: Head, workers: Workers, announce: Callable[[str], object]) -> None:
    role = replace(role, host=_numeric(role.host))
    host = role.host or LOOPBACK
    _check_port(host, role.port, "port")
    _check_port(host, role.ray_port, "ray-port")
    async with AsyncExitStack() as stack:
        # A Ray of this machine alone has a port of its own, as no other machine need know it
        ray = await _ray(stack, Place(role.host, role.ray_port) if role.host else ALONE)
        options = workers.options(role.host)
        scheduler = Scheduler(
            host=host,
            port=role.port,
            protocol=protocol(),
            dashboard=False,
            dashboard_address=f"{LOOPBACK}:0",  # health and metrics
            local_directory=str(scratch_directory()),
        )
        stack.push_async_callback(scheduler.close, reason="zcinfer-node-ends")
        await scheduler
        bound_spans(scheduler)
        await scheduler.register_scheduler_plugin(Observer(), name=Observer.name, idempotent=True)
        offer = Offer(ray.address, str(config.registry_directory()), versions())
        scheduler.set_metadata(keys=[STORE], value=offer.url)
        scheduler.set_metadata(keys=[HEAD], value=offer.to_json())
        await stack.enter_async_context(_running(workers, scheduler.address, host, options))
        announce(_head_text(role, workers, scheduler.address, ray.address))
        await scheduler.finished()
    announce("A client has shut the cluster down.")


async def _be_member(role: Member, workers: Workers, announce: Callable[[str], object]) -> None:
    if workers.count < 1:
        raise SettingsError("a machine that joins has one worker at least: nobody else there would read the models")
    if "://" not in role.address:
        role = replace(role, address=f"{protocol()}://{role.address}")
    offer = await ask(role.address, role.wait)
    host = _numeric(role.host) or local_host(role.address)
    _check_port(host, 0, "host")
    offer.check(host)
    async with AsyncExitStack() as stack:
        await _ray(stack, Place(host, join=offer.ray))
        options = workers.options(host)
        nannies = await stack.enter_async_context(_running(workers, role.address, host, options))
        text = [f"{host} is a node of {role.address}: {_workers_text(workers)}.", *_gpu_lines(workers)]
        announce("\n".join([*text, "Ctrl-C ends it here."]))
        await asyncio.gather(*(nanny.finished() for nanny in nannies))
    raise NodeError(f"the head at {role.address} has ended or is out of reach, and so this node ends. Join it again.")


def _of_host(host: str) -> dict[str, Any]:
    """Configuration by which workers find the node of Ray at ``host``, also where they see those of other hosts."""
    return {"zcinfer": {"ray": {"host": host or None}}}


async def _ray(stack: AsyncExitStack, place: Place) -> OwnRay:
    ray = await asyncio.to_thread(own_ray.start, place)
    stack.callback(ray.stop)
    return ray


@asynccontextmanager
async def _running(
    workers: Workers, scheduler: str, host: str, options: list[dict[str, Any]]
) -> AsyncIterator[list[Nanny]]:
    """Workers of the cluster at ``scheduler``, each with its nanny."""
    nannies = [
        Nanny(
            scheduler,
            nthreads=THREADS,
            memory_limit=workers.nbytes,
            host=host,
            protocol=protocol(),
            dashboard=False,
            dashboard_address=f"{LOOPBACK}:0",
            silence_logs=logging.CRITICAL,
            **own,
        )
        for own in options
    ]
    try:
        try:
            await asyncio.gather(*nannies)
        except Exception as error:
            raise NodeError(
                f"the workers did not start: {type(error).__name__}: {error}. Can this machine be reached from the "
                f"scheduler at {scheduler} by the address {host}, on all ports? Else give another --host."
            ) from error
        yield nannies
    finally:
        for nanny in nannies:
            nanny.patience = INTERRUPTED
        await asyncio.gather(*(nanny.close(reason="zcinfer-node-ends") for nanny in nannies), return_exceptions=True)


def _end_on_signals() -> asyncio.Event:
    """Have the first SIGINT or SIGTERM cancel the current task, and tell by the event that it did."""
    loop, task, ended = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
    assert task is not None

    def end() -> None:
        if not ended.is_set():  # a second one would interrupt the cleaning up
            ended.set()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end)
    return ended


def _numeric(host: str) -> str:
    """The address of a name: Ray's nodes know each other by numbers alone."""
    try:
        return socket.gethostbyname(host) if host else ""
    except OSError as error:
        raise SettingsError(f"no address is known for --host {host!r}: {error}. Give it in numbers.") from None


def _check_port(host: str, port: int, option: str) -> None:
    """Refuse an address that is not this machine's, and a port that another program listens on."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} of {host} is in use{_user_of(port)}. End that, or give another: --{option} PORT"
            ) from None
        raise SettingsError(
            f"this machine cannot listen on {host}: {error}. Give one of its own addresses, as `ip addr` shows them: "
            "--host ADDRESS"
        ) from None


def _user_of(port: int) -> str:
    for process in psutil.process_iter():
        try:
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")):
                return f" by process {process.pid} ({process.name()})"
        except psutil.Error:
            continue
    return ""


def _workers_text(workers: Workers) -> str:
    many = "1 worker" if workers.count == 1 else f"{workers.count} workers"
    return f"{many}, {format_size(workers.nbytes)} of private memory each"


def _gpu_lines(workers: Workers) -> list[str]:
    return [f"  {line}" for line in [*workers.pinning.told(), mps()]] if workers.pinning is not None else []


def _head_text(role: Head, workers: Workers, scheduler: str, ray: str) -> str:
    path = token_path(config.get("ray.token-file"))
    text = [f"The head runs: {_workers_text(workers)}; registry {Registry(config.registry_directory()).directory}"]
    text += _gpu_lines(workers)
    if role.host:
        text += [
            "On each other machine, with a copy of the file",
            f"  {path} (mode 0600; whoever has it can use this Ray):",
            f"  zcinfer node --join {scheduler} --token-file FILE",
        ]
    else:
        text += ["It listens on 127.0.0.1 alone; for other machines to join, give --host ADDRESS."]
    text += [
        "In programs, on any of the nodes:",
        f'  client = dask.distributed.Client("{scheduler}")',
        f'  zc.connect("ray:{ray}")',
        "In the shell:",
        f"  zcinfer run MODEL IN OUT --scheduler {scheduler}",
        f"Ctrl-C ends all of it here (process {os.getpid()}).",
    ]
    return "\n".join(text)
