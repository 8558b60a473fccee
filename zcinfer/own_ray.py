"""Our own Ray as the settings say. Not for how it is started and ended (`keeper`), nor for what is kept in it."""

from __future__ import annotations

import time

from . import config, keeper
from .sizes import parse_size


def begin(place: keeper.Place = keeper.ALONE) -> keeper.OwnRay:
    """Begin to start a node: seconds in which other things can be done (`keeper.OwnRay.wait`)."""
    memory = config.get("ray.object-store-memory")
    nbytes = None if memory is None else parse_size(memory, "zcinfer.ray.object-store-memory")
    return keeper.begin(nbytes, place, config.get("ray.token-file"))


def wait(ray: keeper.OwnRay) -> None:
    """Return when a node that has begun to start is up."""
    ray.wait(time.monotonic() + float(config.get("ray.start-timeout")))


def start(place: keeper.Place = keeper.ALONE) -> keeper.OwnRay:
    """Start a node, and return when it is up."""
    ray = begin(place)
    wait(ray)
    return ray


def environment() -> dict[str, str]:
    """Variables that let a process in."""
    return keeper.ray_environment(config.get("ray.token-file"))
