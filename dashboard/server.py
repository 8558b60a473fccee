"""The program that serves the page, its samples and its report, to whom `access` lets in.

Wiring only: what is asked of the scheduler is in `poller`, what the figures are in `history`, what they say in `words`
and `views`. Reads, and changes nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import panel
from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server.views.auth_request_handler import AuthRequestHandler
from distributed import Security
from panel.io.server import get_server
from tornado.ioloop import IOLoop
from tornado.web import HTTPError, authenticated

from zcinfer.errors import SettingsError

from .access import LOOPBACK, Access
from .oauth import Listed, configure
from .page import Page, report
from .poller import Poller
from .samples import lines

__all__ = ["serve"]

# Milliseconds between two signs of life to a page, where the scheduler is long in answering
_LIFE = 2000


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
            raise HTTPError(403, "unknown host")
        page = Page(document, poller.history, poller.shown)

        def update() -> None:
            page.update(poller.history, poller.shown, poller.age)

        def tell() -> None:
            document.add_next_tick_callback(update)

        document.add_periodic_callback(update, _LIFE)
        poller.listeners.add(tell)
        document.on_session_destroyed(lambda _: poller.listeners.discard(tell))

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
        **_authentication(access),
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


def _authentication(access: Access) -> dict[str, Any]:
    """Options of Panel's server. Its own pages for login, logout and errors ask other hosts for fonts and pictures."""
    templates = Path(__file__).parent / "templates"
    notice = str(templates / "notice.html")
    if access.oauth is not None:
        configure(access.oauth.options)
        provider = Listed(access.oauth.users, logout_template=notice, error_template=notice)
        return {"auth_provider": provider, "cookie_secret": secrets.token_hex(32)}
    if access.passwords:
        return {
            "basic_auth": access.passwords,
            "cookie_secret": secrets.token_hex(32),
            "login_template": str(templates / "login.html"),
            "logout_template": notice,
            "oauth_error_template": notice,
        }
    return {}


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
