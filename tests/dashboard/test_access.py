"""Who may look at the page, asked as a program would: by HTTP and by websocket, with and without having logged in."""

from __future__ import annotations

import http.cookiejar
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from zcinfer.dashboard.access import Access, OAuth
from zcinfer.errors import SettingsError

NOWHERE = "tcp://127.0.0.1:1"
OPTIONS = {"oauth_provider": "github", "oauth_key": "key", "oauth_secret": "secret"}


def test_oauth_needs_all_it_needs_and_a_list() -> None:
    with pytest.raises(SettingsError, match="oauth_key, oauth_secret missing"):
        OAuth({"oauth_provider": "github"}, ("ann",))
    with pytest.raises(SettingsError, match="oauth_optional unknown"):  # which would let everybody in
        OAuth({**OPTIONS, "oauth_optional": True}, ("ann",))
    with pytest.raises(SettingsError, match="anybody with an account"):
        OAuth(OPTIONS, ())
    oauth = OAuth(OPTIONS, ("ann",))
    assert "secret" not in repr(oauth)
    assert Access("0.0.0.0", oauth=oauth, origins=("node7:1",)).allowed(1)[-1] == "node7:1"
    with pytest.raises(SettingsError, match="not for both"):
        Access(passwords="x", oauth=oauth)


def test_a_file_of_oauth_is_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "oauth"
    path.write_text(json.dumps({**OPTIONS, "users": ["ann"]}))
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="can be read by others"):
        OAuth.from_file(str(path))
    path.chmod(0o600)
    assert OAuth.from_file(str(path)) == OAuth(OPTIONS, ("ann",))
    path.write_text(json.dumps({**OPTIONS, "users": "ann"}))
    with pytest.raises(SettingsError, match='write "users"'):
        OAuth.from_file(str(path))


class Visitor:
    """Somebody with a browser of their own: cookies, and where they ended up."""

    def __init__(self) -> None:
        self.jar = http.cookiejar.CookieJar()
        self._open = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.jar)).open

    def get(self, url: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str, str]:
        """Status, final URL and text."""
        data = urllib.parse.urlencode(form).encode() if form is not None else None
        try:
            with self._open(urllib.request.Request(url, data, headers), timeout=20) as answer:
                return answer.status, answer.url, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.url or "", error.read().decode()

    def socket(self, link: str, origin: str) -> int:
        """Status of the answer to a websocket from a page of that origin."""
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in self.jar)
        protocols = "bokeh, token"
        headers = {"Origin": origin, "Cookie": cookies, "Sec-WebSocket-Protocol": protocols}
        request = HTTPRequest(link.replace("http:", "ws:") + "ws", headers=headers, request_timeout=20)

        async def connect() -> int:
            try:
                await websocket_connect(request)
            except HTTPClientError as error:
                return error.code
            return 101

        return IOLoop(make_current=False).run_sync(connect)


def asks_nobody(html: str) -> bool:
    return not re.search(r"(?:https?:)?//", html.replace("http://www.w3.org", ""))


@pytest.mark.slow
def test_nothing_is_answered_without_the_password(serve: Callable[..., Any], password_file: Path) -> None:
    served = serve(NOWHERE, "--password-file", str(password_file))
    link = served.link
    origin = link.rstrip("/")
    stranger, guest = Visitor(), Visitor()
    for path in ("", "samples.jsonl", "report.html"):
        status, url, html = stranger.get(link + path)
        assert (status, url.partition("?")[0]) == (200, f"{link}login"), path
        assert asks_nobody(html)
    assert stranger.socket(link, origin) == 403
    assert stranger.get(link + "login", {"username": "a", "password": "wrong"})[1].startswith(f"{link}login")
    assert stranger.socket(link, origin) == 403

    status, url, html = guest.get(link + "login", {"username": "a", "password": "open sesame"})
    assert (status, url) == (200, link)
    assert "part-state" in html
    assert guest.get(link + "report.html")[0] == 200
    # A cookie is sent along by pages of others, too: these are known by their origin, and by the name they ask for.
    assert guest.socket(link, "http://elsewhere.example") == 403
    assert guest.socket(link, origin) != 403
    for path in ("", "report.html", "samples.jsonl"):
        assert guest.get(link + path, Host="elsewhere.example")[0] == 403, path
    status, _, html = guest.get(link + "logout")
    assert "You are logged out" in html
    assert asks_nobody(html)
    assert guest.get(link)[1].startswith(f"{link}login")
    served.end()  # Bokeh has complained of a websocket that was let in without the page's token


class Provider(BaseHTTPRequestHandler):
    """An OAuth provider that knows everybody: the code that it gives is the name it was asked with."""

    name = "ann@example.org"

    def do_GET(self) -> None:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if self.path.startswith("/authorize"):
            back = urllib.parse.urlencode({"code": "code", "state": asked["state"][0]})
            self.send_response(302)
            self.send_header("Location", f"{asked['redirect_uri'][0]}?{back}")
            self.end_headers()
        else:
            self._answer({"email": type(self).name})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"access_token": "token", "token_type": "bearer"})

    def _answer(self, value: dict[str, str]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def provider() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_oauth_lets_in_who_is_on_the_list(
    serve: Callable[..., Any], provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "oauth"
    places = {
        "AUTHORIZE_URL": f"{provider}/authorize",
        "TOKEN_URL": f"{provider}/token",
        "USER_URL": f"{provider}/user",
    }
    options = {"oauth_provider": "generic", "oauth_key": "key", "oauth_secret": "secret", "oauth_extra_params": places}
    path.write_text(json.dumps({**options, "users": ["ann@example.org"]}))
    path.chmod(0o600)
    served = serve(NOWHERE, "--oauth-file", str(path))
    link = served.link
    origin = link.rstrip("/")
    assert Visitor().socket(link, origin) == 403
    ann, bob = Visitor(), Visitor()
    status, url, html = ann.get(link)
    assert (status, url.partition("?")[0]) == (200, link)
    assert "part-state" in html
    assert ann.get(link + "report.html")[0] == 200
    monkeypatch.setattr(Provider, "name", "bob@example.org")
    for place in ("", "report.html", "samples.jsonl"):
        status, _, html = bob.get(link + place)
        assert (status, "part-state" in html) == (403, False), place
        assert asks_nobody(html)
    assert bob.socket(link, origin) == 403
    assert "Traceback" not in served.end()
