"""How things look in a notebook: small tables, and a line that changes in its place. Whatever it is given is escaped.

No widgets: they need an extension that a notebook may not have, and are not there when it is opened again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from html import escape
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Line", "facts", "is_notebook", "link"]


class Html(str):
    """Text that is HTML already."""


def link(url: str) -> Html:
    """A link that opens beside the notebook.

    Examples
    --------
    >>> str(link("http://127.0.0.1:8788/"))
    '<a href="http://127.0.0.1:8788/" target="_blank" rel="noopener">http://127.0.0.1:8788/</a>'
    """
    shown = escape(url)
    if urlsplit(url).scheme not in ("http", "https"):
        return Html(shown)
    return Html(f'<a href="{shown}" target="_blank" rel="noopener">{shown}</a>')


def facts(title: str, found: Mapping[str, object]) -> str:
    """A table of names and what they are.

    Examples
    --------
    >>> facts("<bert>", {"weights": "438 MB"})
    '<table><thead><tr><th colspan="2" style="text-align:left">&lt;bert&gt;</th></tr></thead><tbody><tr><th \
style="text-align:left">weights</th><td style="text-align:left">438 MB</td></tr></tbody></table>'
    """
    left = 'style="text-align:left"'
    cells = {name: value if isinstance(value, Html) else escape(str(value)) for name, value in found.items()}
    rows = "".join(f"<tr><th {left}>{escape(name)}</th><td {left}>{cell}</td></tr>" for name, cell in cells.items())
    head = f'<tr><th colspan="2" {left}>{escape(title)}</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def is_notebook() -> bool:
    """Whether what is displayed is seen in a notebook."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


class Line:
    """A line below a notebook's cell, with a bar: how far something is."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str, share: float) -> None:
        """Show it, in the place of what it showed before."""
        display: Any = import_module("IPython.display")
        bar = f'<progress value="{share:.4f}" max="1" style="width:16em;vertical-align:middle"></progress>'
        html = display.HTML(f"<div>{bar} {escape(text)}</div>")
        if self._handle is None:
            self._handle = display.display(html, display_id=True)
        else:
            self._handle.update(html)
