"""Looks at the stores of a machine, in one worker of each cluster for all. Not for when it looks (`sampling`)."""

from __future__ import annotations

import hashlib
import os
import socket
from typing import Any

from . import stores
from .condition import UNAVAILABLE, Condition


class Watch:
    """Looks at the stores that this process has open, unless another worker of its cluster does so on this machine.

    Parameters
    ----------
    cluster : str
        Address of its scheduler.

    Notes
    -----
    Who looks is who has a name of Linux's abstract sockets: there is one of each on a machine (or in a container), and
    it is free again the moment its process ends, however it ends.
    """

    def __init__(self, cluster: str):
        self._cluster = cluster
        self._names: dict[str, socket.socket] = {}

    def look(self) -> list[dict[str, Any]]:
        """How the stores are that this process looks at."""
        opened = stores.opened()
        for url in self._names.keys() - opened.keys() - stores.refused().keys():
            self._names.pop(url).close()  # another worker may have it open
        found = [_condition(url, store) for url, store in opened.items() if self._is_ours(url)]
        found += [
            Condition(url.partition("?")[0], {}, f"{UNAVAILABLE}{reason}", healthy=False)
            for url, reason in stores.refused().items()
            if url not in opened and self._is_ours(url)
        ]
        return [condition.plain() for condition in found]

    def close(self) -> None:
        """Let another worker look."""
        while self._names:
            self._names.popitem()[1].close()

    def _is_ours(self, url: str) -> bool:
        if url in self._names:
            return True
        own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        digest = hashlib.sha256(f"{os.geteuid()} {self._cluster} {url}".encode()).hexdigest()
        try:
            own.bind(f"\0zcinfer-watch-{digest[:32]}")
        except OSError:
            own.close()
            return False
        self._names[url] = own
        return True


def _condition(url: str, store: Any) -> Condition:
    try:
        found: Condition = store.condition()
    except Exception as error:
        return Condition(url.partition("?")[0], {}, f"{UNAVAILABLE}{type(error).__name__}: {error}", healthy=False)
    return found
