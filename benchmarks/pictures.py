"""Plots of a run as a picture for the docs, as a browser draws them. Not for pages, which need no picture (`pages`)."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bokeh.embed import file_html
from bokeh.layouts import column
from bokeh.resources import INLINE

from zcinfer.dashboard.offline import alone

# Milliseconds that the browser has
PATIENCE = 30_000
# Pixels: a plot and the margins of a page
WIDTH = 940


def why_not() -> str:
    """Why no picture can be made here; "" if one can."""
    if importlib.util.find_spec("playwright") is None:
        return "its plots are drawn by playwright, which is not installed: pip install 'zcinfer[browser]'"
    if shutil.which("chromium") is None:
        return "its plots are drawn by Chromium, which is not installed (Debian: apt-get install chromium)"
    return ""


def write_picture(path: Path, plots: Sequence[Any]) -> None:
    """Write plots of Bokeh, one below the other, as one PNG."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": WIDTH, "height": 10})
        page.set_content(alone(file_html(column(*plots), INLINE, "plots")))
        page.wait_for_function("Bokeh.documents.length > 0 && Bokeh.documents.every(d => d.is_idle)", timeout=PATIENCE)
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page=True, timeout=PATIENCE)
        browser.close()
