"""The page of a cluster on this machine, whose program is started when somebody first opens it.

Until then it is a listening socket of this process, and costs nothing. The program gets the socket, and ends with this
process however that ends. Not for the page itself: see `zcinfer.dashboard`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import pickle
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import SettingsError

log = logging.getLogger(__name__)

_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from zcinfer.dashboard.child import main; main(*sys.argv[2:])"
# Seconds that the program has for its end
_PATIENCE = 3.0


def is_installed() -> bool:
    """Whether there is what the page is made with."""
    return importlib.util.find_spec("panel") is not None


def check_installed() -> None:
    """Refuse to go on without the packages of the extra ``dashboard``.

    Raises
    ------
    SettingsError
    """
    if not is_installed():
        raise SettingsError("the dashboard needs the packages of an extra: pip install 'zcinfer[dashboard]'")


class Activation:
    """The port of a page, and its program once somebody has come.

    Parameters
    ----------
    address : str
        Of the scheduler.
    security : distributed.Security
        For it.

    Attributes
    ----------
    link : str
        The page's URL.

    Notes
    -----
    To be used on the event loop that is running when it is made. A program that fails is started again for the next
    visitor.
    """

    def __init__(self, address: str, security: Any):
        self._loop = asyncio.get_running_loop()
        self._address, self._security = address, security
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = -1
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self._socket.setblocking(False)
        self.link = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._loop.add_reader(self._socket, self._start)

    def _start(self) -> None:
        self._loop.remove_reader(self._socket)
        number = self._socket.fileno()
        package = str(Path(__file__).resolve().parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, package, self._address, str(number)],
            pass_fds=[number],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C is for this process, which ends the other
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(pickle.dumps(self._security))
        self._ended = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._ended, self._failed)

    def _failed(self) -> None:
        status = self._reap()
        log.warning("the dashboard's program ended with status %s; it is started again when somebody comes", status)
        with suppress(BlockingIOError):
            while True:  # whoever waits now would have it started, and fail, for ever
                self._socket.accept()[0].close()
        self._loop.add_reader(self._socket, self._start)

    def _reap(self) -> int | None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._loop.remove_reader(self._ended)
        os.close(self._ended)
        self._process.stdin.close()
        process, self._process = self._process, None
        return process.wait()

    async def close(self) -> None:
        """End the program, and give back the port; again does nothing."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._socket.close()
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._loop.remove_reader(self._ended)
        ended = asyncio.Event()
        self._loop.add_reader(self._ended, ended.set)
        self._process.stdin.close()
        try:
            await asyncio.wait_for(ended.wait(), _PATIENCE)
        except TimeoutError:
            self._process.kill()
        await self._loop.run_in_executor(None, self._process.wait)
        self._reap()
