"""The program that serves the page: one poller that asks the scheduler each second, however many pages are open.

Wiring only: what the figures are is in `history`, what they say in `words` and `views`. Reads, and changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import secrets
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import panel
from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server.views.auth_request_handler import AuthRequestHandler
from distributed import Security
from distributed.core import rpc
from markupsafe import Markup
from panel.io.server import get_server
from tornado.ioloop import IOLoop
from tornado.web import HTTPError, authenticated

from zcinfer.errors import SettingsError
from zcinfer.observer import HANDLER, NAME, Observer

from .history import History
from .page import Page, report
from .samples import lines
from .views import parts

__all__ = ["Access", "Poller", "serve"]

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Seconds between two questions to the scheduler, and that it may take for an answer
_EVERY, _PATIENCE = 1.0, 5.0
_LOCAL = ("127.0.0.1", "localhost")


class Poller:
    """Asks a scheduler each second, and feeds one history.

    Parameters
    ----------
    address : str
        Of the scheduler.
    security : distributed.Security, optional

    Attributes
    ----------
    history : History
    """

    def __init__(self, address: str, security: Security | None = None):
        self.address = address
        self.history = History(address)
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


@dataclass(frozen=True)
class Access:
    """Who may look at the page.

    Parameters
    ----------
    host : str
        Address to listen on. Any but this machine's own needs ``passwords``.
    port : int
        0: any that is free.
    origins : tuple of str
        HOST:PORT by which browsers may call it, where it listens beyond this machine.
    passwords : str or dict of str to str, optional
        One for all, or by name.

    Raises
    ------
    SettingsError
        It would be open to other machines without authentication, or nobody could call it.
    """

    host: str = LOOPBACK
    port: int = 0
    origins: tuple[str, ...] = ()
    passwords: str | dict[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.host in _LOCAL:
            return
        if not self.passwords:
            raise SettingsError(
                f"the dashboard would be open to whoever reaches {self.host}: give --password-file, or leave out "
                "--host and look through `ssh -L`."
            )
        if not self.origins:
            raise SettingsError(
                f"the dashboard listens on {self.host}: say by which HOST:PORT browsers call it, with --origin (as in "
                "--origin node7:8788). Pages of other sites are refused."
            )

    def allowed(self, port: int) -> list[str]:
        """Values of a request's Host that are answered, and Origins of a websocket."""
        return [*(f"{name}:{port}" for name in _LOCAL), *self.origins]

    @staticmethod
    def passwords_from(path: str) -> str | dict[str, str]:
        """Passwords of a file: one alone, or a JSON object of names and passwords.

        Raises
        ------
        SettingsError
            It cannot be read, others can read it, or it holds none.
        """
        file = Path(path)
        try:
            if file.stat().st_mode & 0o077:
                raise SettingsError(f"{file} can be read by others: chmod 600 it, and choose another password.")
            text = file.read_text().strip()
        except OSError as error:
            raise SettingsError(f"the password's file cannot be read: {error}") from error
        if not text.startswith("{"):
            if not text:
                raise SettingsError(f"{file} is empty: write a password into it.")
            return text
        try:
            found = json.loads(text)
        except ValueError as error:
            raise SettingsError(f"{file} is not JSON: {error}") from error
        if not found or not all(isinstance(value, str) and value for value in found.values()):
            raise SettingsError(f'{file}: write {{"name": "password", ...}}')
        return dict(found)


class _Download(AuthRequestHandler):  # type: ignore[misc]
    def initialize(self, poller: Poller, hosts: list[str]) -> None:
        self._poller, self._hosts = poller, hosts

    def prepare(self) -> Any:
        if self.request.host not in self._hosts:
            raise HTTPError(403)
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        return super().prepare()


class _Samples(_Download):
    @authenticated
    async def get(self) -> None:
        try:
            snapshot = await self._poller.everything()
        except (OSError, TimeoutError) as error:
            raise HTTPError(503, reason="The scheduler does not answer") from error
        self.set_header("Content-Type", "application/jsonl")
        self.set_header("Content-Disposition", 'attachment; filename="zcinfer-samples.jsonl"')
        for line in lines(snapshot):
            self.write(line)


class _Report(_Download):
    @authenticated
    async def get(self) -> None:
        html = await IOLoop.current().run_in_executor(None, report, self._poller.history)
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Disposition", 'attachment; filename="zcinfer-report.html"')
        self.write(html)


def serve(
    address: str,
    access: Access,
    *,
    security: Security | None = None,
    listening: socket.socket | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the page until interrupted or terminated.

    Parameters
    ----------
    address : str
        Of the scheduler; it need not be there yet.
    access : Access
    security : distributed.Security, optional
        For the scheduler.
    listening : socket.socket, optional
        A socket that listens already, in the place of ``access.port``.
    ready : callable
        Called with the page's URL.

    Raises
    ------
    SettingsError
        The port is in use.
    """
    asyncio.run(_serve(address, access, security, listening, ready))


async def _serve(
    address: str,
    access: Access,
    security: Security | None,
    listening: socket.socket | None,
    ready: Callable[[str], None],
) -> None:
    poller = Poller(address, security)
    own = listening or _listen(access)
    port = own.getsockname()[1]
    hosts = access.allowed(port)

    def fill(document: Document) -> None:
        # A name that leads here by another's DNS is not one of ours
        if document.session_context.request.headers.get("Host") not in hosts:
            raise PermissionError("unknown host")
        page = Page(document, poller.history, poller.shown)
        document.add_periodic_callback(lambda: page.update(poller.history, poller.shown, poller.age), 1000)

    authentication: dict[str, Any] = {}
    if access.passwords:
        authentication = {
            "basic_auth": access.passwords,
            "cookie_secret": secrets.token_hex(32),
            "login_template": str(Path(__file__).parent / "templates" / "login.html"),
        }
    what = {"poller": poller, "hosts": hosts}
    # Panel binds a port of its own; it is closed for ours, which may be one that was made before this program
    server = get_server(
        {"/": Application(FunctionHandler(fill))},
        address=LOOPBACK,
        websocket_origin=hosts,
        extra_patterns=[(r"/samples\.jsonl", _Samples, what), (r"/report\.html", _Report, what)],
        check_unused_sessions_milliseconds=10_000,
        unused_session_lifetime_milliseconds=10_000,
        keep_alive_milliseconds=20_000,
        **authentication,
    )
    server._http.stop()
    server._http.add_socket(own)
    polling = asyncio.ensure_future(poller.run())
    server.start()
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # Panel has set some of its own
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    shown = access.host if access.host != "0.0.0.0" else (access.origins or (LOOPBACK,))[0].partition(":")[0]
    ready(f"http://{shown}:{port}/")
    try:
        await end.wait()
    finally:
        polling.cancel()
        server.stop()
        panel.state.kill_all_servers()
        await poller.close()
        # What was being sent to open pages ends, or Python complains that nobody waited for it
        await asyncio.sleep(0.1)


def _listen(access: Access) -> socket.socket:
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((access.host, access.port))
    except OSError as error:
        own.close()
        raise SettingsError(
            f"the dashboard cannot listen on {access.host}:{access.port}: {error.strerror}. Choose another --port."
        ) from error
    own.listen(128)
    own.setblocking(False)
    return own
