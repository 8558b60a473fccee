"""Whom `zcinfer.report` asks what runs: the scheduler of a client, or this process.

Not for how often, nor for what is made of the answers (`recording`, `reporting`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from distributed import Status, Worker

from . import telemetry
from .errors import SettingsError
from .local_observer import LocalObserver
from .observer import HANDLER, Observer
from .recording import Recording
from .worker import Counting, send_heartbeat

# Seconds that an answer may take
_PATIENCE = 5.0


class Source(Protocol):
    """Whoever knows what runs."""

    address: str

    def begin(self) -> Recording:
        """Begin to watch."""

    def ask(self, since: int) -> Mapping[str, Any]:
        """As `Observer.snapshot`."""

    def last(self, since: int) -> Mapping[str, Any]:
        """The same, with all that was counted so far."""

    def notes(self, recording: Recording) -> Iterator[str]:
        """What a reader must know of it."""

    def close(self) -> None:
        """Watch no more."""


class Here:
    """This process."""

    address = "this process"

    def __init__(self) -> None:
        if not telemetry.is_on():
            raise SettingsError(
                "a report tells what was counted, and nothing is: zcinfer.telemetry is false. Set it to true."
            )
        self._observer = LocalObserver()

    def begin(self) -> Recording:
        self._observer.__enter__()
        return Recording(self._observer.told(whole=True))

    def ask(self, since: int) -> Mapping[str, Any]:
        self._observer.sample()
        return self._observer.told(since)

    def last(self, since: int) -> Mapping[str, Any]:
        return self._observer.told(since, whole=True)

    def notes(self, recording: Recording) -> Iterator[str]:
        yield "Computed by one process, without a cluster: its threads together are one device here."

    def close(self) -> None:
        self._observer.__exit__()


class Cluster:
    """The scheduler of a client."""

    def __init__(self, client: Any):
        if client.asynchronous:
            raise SettingsError("a report needs a client that is not asynchronous: Client(...), and not await Client()")
        self._client = client
        self.address: str = client.scheduler.address if client.scheduler is not None else "a scheduler"
        self._here: dict[tuple[str, str], int] = {}

    def begin(self) -> Recording:
        try:
            self._client.register_plugin(Observer())
            self._client.register_plugin(Counting())
            self._client.sync(self._beat, callback_timeout=_PATIENCE)
            first = self._ask(0, whole=True)
        except Exception as error:
            raise SettingsError(
                f"the cluster at {self.address} cannot be watched ({type(error).__name__}: {error}). Is zcinfer "
                "installed for its scheduler and its workers?"
            ) from error
        self._here = _calls_here()
        return Recording(first, lambda job: job["client"] == self._client.id)

    def ask(self, since: int) -> Mapping[str, Any]:
        return self._ask(since)

    def last(self, since: int) -> Mapping[str, Any]:
        self._client.sync(self._beat, callback_timeout=_PATIENCE)
        return self._ask(since, whole=True)

    def notes(self, recording: Recording) -> Iterator[str]:
        if any(job["done"] for job in recording.jobs) and not recording.is_counted:
            yield "The workers have counted nothing: rows and times are not known. Is zcinfer.telemetry false there?"
        for key, blocks in _calls_here().items():
            more = blocks - self._here.get(key, 0)
            if more:
                yield f"{more:,} blocks of {key[1]} were computed by the program itself, and are not in these figures."

    def close(self) -> None:
        pass

    def _ask(self, since: int, whole: bool = False) -> Mapping[str, Any]:
        if self._client.status != "running":
            raise OSError(f"the client is {self._client.status}")
        found: Mapping[str, Any] = self._client.sync(
            getattr(self._client.scheduler, HANDLER), since=since, whole=whole, callback_timeout=_PATIENCE
        )
        if "jobs" not in found:
            raise OSError("it does not know zcinfer")
        return found

    async def _beat(self) -> None:
        await self._client.run(send_heartbeat, on_error="ignore")


def _calls_here() -> dict[tuple[str, str], int]:
    """Blocks by job and model that this process has counted, unless it has workers, whose they may be."""
    if any(worker.status is Status.running for worker in Worker._instances):
        return {}
    return {(work["job"], work["model"]): work["blocks"] for work in telemetry.snapshot()["work"]}
