"""Asks a scheduler again and again for what is new, however many pages are open. Reads, and changes nothing.

Not for what the figures mean (`history`), nor for who is shown them (`server`).
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from distributed import Security
from distributed.core import rpc
from markupsafe import Markup

from zcinfer.observer import HANDLER, NAME, Observer

from .history import History
from .views import parts

__all__ = ["Poller"]

log = logging.getLogger(__name__)

# Seconds between two questions to the scheduler, and that it may take for an answer. Where workers send a heartbeat
# each second, what a page shows is then less than two seconds old
_EVERY, _PATIENCE = 0.75, 5.0


class Poller:
    """Asks a scheduler again and again, and feeds one history.

    Parameters
    ----------
    address : str
        Of the scheduler.
    security : distributed.Security, optional

    Attributes
    ----------
    history : History
    listeners : set of callable
        Called after each answer, or when there was none.
    """

    def __init__(self, address: str, security: Security | None = None):
        self.address = address
        self.history = History(address)
        self.listeners: set[Callable[[], object]] = set()
        self._arguments = (security or Security()).get_connection_args("client")
        self._scheduler: Any = None
        self._received = time.monotonic()
        self._shown: dict[str, Markup] | None = None
        self._shown_sequence = -1
        self._beat = 0

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            began = time.monotonic()
            await self.poll()
            for tell in [*self.listeners]:
                tell()
            await asyncio.sleep(max(0.05, _EVERY - (time.monotonic() - began)))

    async def poll(self) -> None:
        """Ask once; whatever goes wrong is what the page says."""
        try:
            if self._scheduler is None:
                await asyncio.wait_for(self._connect(), _PATIENCE)
            question = getattr(self._scheduler, HANDLER)(since=self.history.last_second)
            answer = await asyncio.wait_for(question, _PATIENCE)
            if "jobs" not in answer:
                raise OSError("the scheduler does not know zcinfer")
            self.history.take(answer)
            self._received = time.monotonic()
        except Exception as error:
            await self.close()
            self.history.lose(_why(error))

    async def _connect(self) -> None:
        self._scheduler = rpc(self.address, connection_args=self._arguments, timeout=_PATIENCE)
        # One that is there already stays as it is
        await self._scheduler.register_scheduler_plugin(plugin=pickle.dumps(Observer()), name=NAME, idempotent=True)
        identity = await self._scheduler.identity(n_workers=0)
        port = identity.get("services", {}).get("dashboard")
        host = urlsplit(self.address).hostname
        self.history.links = {"Dask’s own pages": f"http://{host}:{port}/status"} if port else {}

    async def close(self) -> None:
        """Let go of the scheduler."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            await scheduler.close_rpc()

    async def everything(self) -> dict[str, Any]:
        """A snapshot with the whole last hour."""
        if self._scheduler is None:
            raise OSError(self.history.problem or "not connected")
        return dict(await asyncio.wait_for(getattr(self._scheduler, HANDLER)(since=0), _PATIENCE))

    @property
    def shown(self) -> dict[str, Markup]:
        """HTML of each part, made once for all pages."""
        if self._shown is None or self._shown_sequence != self.history.sequence:
            self._shown, self._shown_sequence = parts(self.history), self.history.sequence
        return self._shown

    @property
    def age(self) -> str:
        """Seconds since the scheduler answered, and a number that makes each of these differ."""
        self._beat += 1
        if self.history.now is None:
            return ""
        return f"{time.monotonic() - self._received:.1f} {self._beat}"


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "the scheduler does not answer"
    if isinstance(error, OSError):
        return "no scheduler answers there"
    log.debug("a poll failed", exc_info=error)
    return f"{type(error).__name__}: {error}"
