"""HTML in one file, which asks no network for anything. Not for what is in it."""

from __future__ import annotations

import re

__all__ = ["alone"]

# Panel, where a process has imported it, has Bokeh give every page a script of Panel's server, which a file has not.
_FOREIGN = re.compile(r'<script[^>]* src="static/[^"]*"[^>]*>\s*</script>')


def alone(html: str) -> str:
    """The page of Bokeh without scripts that only a server has.

    Examples
    --------
    >>> alone('<p>1</p><script type="text/javascript" src="static/extensions/panel/shims.js"></script><p>2</p>')
    '<p>1</p><p>2</p>'
    """
    return _FOREIGN.sub("", html)
