"""What can befall a job: each a generator that strikes, yields the seconds until its second half, and undoes it.

``inf`` is: until the job has ended. A job that has ended, and is not done, is started again at the next yield.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from random import Random

import psutil
from machines import Alone, Apart, Client, Linked, named, workers_among


@dataclass(frozen=True)
class Scene:
    """What a fault may touch.

    Attributes
    ----------
    disk : Path
        Directory of the output, a small file system of its own.
    quick : bool
    """

    machine: Alone
    client: Client
    random: Random
    disk: Path
    quick: bool

    @property
    def patience(self) -> float:
        """Seconds that a stopped worker stays so, or a link cut."""
        return 2.0 if self.quick else 20.0

    @property
    def workers(self) -> list[psutil.Process]:
        return workers_among(self.machine.processes(self.client))

    def kill(self, name: str) -> None:
        for process in named(self.machine.processes(self.client), name):
            process.kill()


Strike = Callable[[Scene], Iterator[float]]


@dataclass(frozen=True)
class Fault:
    """A fault by its name, as the table has it, the machine that it befalls, and whether CI has time for it."""

    name: str
    strike: Strike
    machine: type[Alone] = Apart
    quick: bool = True


def worker(scene: Scene) -> Iterator[float]:
    scene.random.choice(scene.workers).kill()
    yield from ()


def workers(scene: Scene) -> Iterator[float]:
    for process in scene.workers:
        process.kill()
    yield from ()


def nanny(scene: Scene) -> Iterator[float]:
    assert isinstance(scene.machine, Apart)
    scene.machine.program(scene.random.choice(["worker-0", "worker-1"])).kill()
    yield from ()


def scheduler(scene: Scene) -> Iterator[float]:
    assert isinstance(scene.machine, Apart)
    scene.machine.program("scheduler").kill()
    yield from ()


def holder(scene: Scene) -> Iterator[float]:
    scene.kill("ray::Holder")
    yield from ()


def raylet(scene: Scene) -> Iterator[float]:
    scene.kill("raylet")
    yield from ()


def gcs(scene: Scene) -> Iterator[float]:
    scene.kill("gcs_server")
    yield from ()


def client(scene: Scene) -> Iterator[float]:
    psutil.Process(scene.client.pid).kill()
    yield from ()


def stopped(scene: Scene) -> Iterator[float]:
    process = scene.random.choice(scene.workers)
    process.suspend()
    yield scene.patience
    process.resume()


def disk(scene: Scene) -> Iterator[float]:
    filler = scene.disk / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    yield inf
    filler.unlink()


def write(scene: Scene) -> Iterator[float]:
    # Above what a block of equal rows takes, and half of what one of noise does: every tenth is cut off
    limit, hard = 25_000, resource.RLIM_INFINITY
    for _ in range(1 if scene.quick else 3):
        for process in scene.workers:
            process.rlimit(resource.RLIMIT_FSIZE, (limit, hard))
        yield inf
    for process in scene.workers:
        process.rlimit(resource.RLIMIT_FSIZE, (hard, hard))


def link(scene: Scene) -> Iterator[float]:
    assert isinstance(scene.machine, Linked)
    with scene.machine.network.cut(scene.machine.network.hosts[1]):
        yield scene.patience


FAULTS = (
    Fault("a worker killed", worker),
    Fault("all workers killed", workers),
    Fault("a nanny killed", nanny),
    Fault("the scheduler killed", scheduler),
    Fault("the holder killed", holder),
    Fault("the raylet killed", raylet),
    Fault("Ray's head process killed", gcs, quick=False),
    Fault("the client killed", client),
    Fault("the client killed, with its workers and its Ray", client, Alone, quick=False),
    Fault("a worker stopped", stopped),
    Fault("the disk of the output full", disk),
    Fault("every tenth chunk cut off as it is written", write),
    Fault("a host's link cut", link, Linked, quick=False),
)
