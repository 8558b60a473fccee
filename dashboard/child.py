"""The page as a program of a cluster: on a socket that it is given, and no longer than whoever has started it.

Standard input is a pipe: first what is needed to reach the scheduler, then nothing, until the other end closes it.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading

__all__ = ["main"]


def main(address: str, number: str) -> None:
    """Serve the page of the scheduler at ``address`` on the listening socket of that number."""
    # No buffer, so that nothing but the end is left to be read
    source = os.fdopen(0, "rb", buffering=0)
    security = pickle.load(source)
    threading.Thread(target=_watch, args=[source.fileno()], daemon=True).start()
    from .access import Access
    from .server import serve

    listening = socket.socket(fileno=int(number))
    listening.setblocking(False)
    serve(address, Access(), security=security, listening=listening)


def _watch(source: int) -> None:
    # From the first moment on, also while the imports take their seconds
    while os.read(source, 4096):
        pass
    os._exit(0)
