"""What tests of the page share: a browser, the page's program, and jobs that wait to be let go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

# Debian's chromium in a container, which shall ask nobody for anything
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Tab:
    """A tab of the browser, with what it asked for and complained of."""

    def __init__(self, page: Any):
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, link: str) -> None:
        self.page.goto(link)
        self.page.wait_for_selector("#page[data-ready]", timeout=30_000)

    def state(self, state: str, seconds: float = 20) -> str:
        """The sentence, once the page is in that state."""
        try:
            self.page.wait_for_selector(f'.state[data-state="{state}"]', timeout=1000 * seconds)
        except Exception as error:  # of playwright's, which may not be there; nowhere does it say what is there
            raise AssertionError(
                f"not {state} within {seconds} s, but: {self.text('h1')}; {self.complaints}"
            ) from error
        return self.text("h1")

    def text(self, selector: str) -> str:
        return " ".join(str(self.page.inner_text(selector)).split())

    def clean(self) -> None:
        """Nobody but the page's own program was asked, and nothing went wrong."""
        assert {urlsplit(url).hostname for url in self.asked if not url.startswith(("data:", "blob:", "file:"))} <= {
            "127.0.0.1"
        }
        assert self.complaints == [], self.asked


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser; its contexts are made by `tab`."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no program chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install 'zcinfer[browser]')")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, each of a size and a colour scheme of its own."""
    contexts = []

    def make(width: int = 1280, height: int = 800, scheme: str = "light") -> Tab:
        contexts.append(
            chromium.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
            )
        )
        return Tab(contexts[-1].new_page())

    yield make
    for context in contexts:
        context.close()


class Served:
    """A program that serves the page, and its link."""

    def __init__(self, address: str, *options: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zcinfer", "dashboard", address, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.link = self.process.stdout.readline().removeprefix("dashboard ").strip()

    def end(self) -> str:
        """Its standard error, when it has ended as Ctrl-C ends it."""
        self.process.terminate()
        _, told = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return told


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Starts programs that serve the page of a scheduler; they must have complained of nothing."""
    started: list[Served] = []

    def start(address: str, *options: str) -> Served:
        started.append(Served(address, *options))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            assert served.end() == ""


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("open sesame\n")
    path.chmod(0o600)
    return path
