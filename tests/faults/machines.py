"""What a job runs on in the fault harness: real programs, started apart, so that each can be killed by itself.

Not for what is done to them (`strikes`).
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Seconds in which a program is up
START = 90.0

RAY = "import sys, zcinfer; print(zcinfer.connect('ray').address, flush=True); sys.stdin.read()"
SHARED_MEMORY = "150MB"


def until(condition: Any, seconds: float, what: str) -> Any:
    """What ``condition`` gives, when it is true; a TimeoutError that says what was waited for where it never is."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.004)
    return found


def below(pid: int) -> list[psutil.Process]:
    """The living processes that a process has started, and theirs."""
    with suppress(psutil.NoSuchProcess):
        every = psutil.Process(pid).children(recursive=True)
        return [process for process in every if _status(process) not in (None, psutil.STATUS_ZOMBIE)]
    return []


def _status(process: psutil.Process) -> str | None:
    with suppress(psutil.NoSuchProcess):
        return str(process.status())
    return None


def workers_among(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The Dask workers, which a nanny has spawned."""
    return [process for process in processes if "spawn_main" in _line(process)]


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def named(processes: Sequence[psutil.Process], name: str) -> list[psutil.Process]:
    """Those whose title begins with ``name``; Ray's have titles of their own."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if process.name().startswith(name) or _line(process).startswith(name):
                found.append(process)
    return found


class Clients:
    """Where `zcinfer` commands are started from, one after the other (`clients.py`)."""

    def __init__(self, environment: dict[str, str], within: Sequence[str] = ()):
        command = [*within, sys.executable, str(HERE / "clients.py")]
        self._process = subprocess.Popen(
            command, env=environment, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._line(START) == "ready", "clients.py has failed"

    def start(self, arguments: Sequence[str], log: Path) -> Client:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([list(arguments), str(log)]).encode() + b"\n")
        pid = self._line(START)
        assert pid is not None, "clients.py has failed"
        return Client(self, int(pid), log)

    def _line(self, seconds: float) -> str | None:
        """The next line that it prints; None where there is none so soon."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], None if seconds == inf else max(0.0, seconds))[0]:
            return None
        return self._process.stdout.readline().decode().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Client:
    """A running `zcinfer` command."""

    def __init__(self, clients: Clients, pid: int, log: Path):
        self.pid = pid
        self._clients = clients
        self._log = log
        self.status: int | None = None

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        if self.status is None:
            line = self._clients._line(seconds)
            self.status = int(line) if line else None
        return self.status is not None

    @property
    def printed(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


class Alone:
    """Nothing but the command: it starts workers and Ray itself."""

    options: tuple[str, ...] = ("--workers", "2")

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = _environment(folder)
        self.clients = Clients(self.environment)

    def mend(self) -> None:
        """Start again what has ended."""

    def processes(self, client: Client) -> list[psutil.Process]:
        """All but the client itself."""
        return below(client.pid)

    def close(self) -> None:
        self.clients.close()


class Apart(Alone):
    """A scheduler, two workers below a nanny each, and a Ray, as programs of their own."""

    def __init__(self, folder: Path):
        self._programs: dict[str, subprocess.Popen[str]] = {}
        self._address = f"tcp://127.0.0.1:{_free_port()}"
        self._store = ""
        super().__init__(folder)
        self.mend()

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("--scheduler", self._address, "--store", self._store)

    def mend(self) -> None:
        if self._needed("ray"):
            with suppress(KeyError):
                _end(self._programs.pop("ray"))
            ray = self._start("ray", sys.executable, "-c", RAY)
            assert ray.stdout is not None
            self._ray_answer = ray.stdout
        own = ("--no-dashboard", "--dashboard-address", "127.0.0.1:0")
        if self._needed("scheduler"):
            # Workers end with it, sooner or later
            for name in [name for name in self._programs if name != "ray"]:
                _end(self._programs.pop(name))
            host, port = self._address.removeprefix("tcp://").split(":")
            self._start("scheduler", sys.executable, "-m", "dask", "scheduler", "--host", host, "--port", port, *own)
        for name in ("worker-0", "worker-1"):
            if self._needed(name):
                options = ("--nworkers", "1", "--nthreads", "2", "--preload", "zcinfer.worker", "--host", "127.0.0.1")
                scratch = ("--local-directory", str(self.folder / "scratch"))
                self._start(name, sys.executable, "-m", "dask", "worker", self._address, *options, *scratch, *own)
        if self._ray_answer is not None:
            self._store = "ray:" + self._ray_answer.readline().strip()
            self._ray_answer = None
        until(lambda: _workers_of(self._address) == 2, START, "two workers")

    _ray_answer: Any = None

    def _needed(self, name: str) -> bool:
        program = self._programs.get(name)
        if program is None or program.poll() is not None:
            return True
        # Its keeper stays when what it keeps has died
        return name == "ray" and len(named(below(program.pid), "raylet") + named(below(program.pid), "gcs_server")) < 2

    def _start(self, name: str, *command: str) -> subprocess.Popen[str]:
        with open(self.folder / f"{name}.log", "a") as log:
            self._programs[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE if name == "ray" else log,
                stderr=log, text=True, cwd=HERE,
            )  # fmt: skip
        return self._programs[name]

    def processes(self, client: Client) -> list[psutil.Process]:
        every = [psutil.Process(program.pid) for program in self._programs.values() if program.poll() is None]
        return [*every, *(process for program in every for process in below(program.pid))]

    def program(self, name: str) -> psutil.Process:
        return psutil.Process(self._programs[name].pid)

    def close(self) -> None:
        super().close()
        for name in ("worker-0", "worker-1", "scheduler", "ray"):
            with suppress(KeyError):
                _end(self._programs.pop(name))


class Linked(Alone):
    """Two hosts with a network between them (`zcinfer.benchmarks.hosts`), a node of a cluster on each."""

    def __init__(self, folder: Path):
        from contextlib import ExitStack

        from zcinfer.benchmarks.hosts import Command, commands, network

        self.folder = folder
        self.environment = _environment(folder)
        self._stack = ExitStack()
        self.network = self._stack.enter_context(network(2))
        self._started = self._stack.enter_context(commands())
        self._command = Command
        self._nodes: dict[str, Any] = {}
        head = self.network.hosts[0]
        self._address = f"tcp://{head.address}:8786"
        self.options = ("--scheduler", self._address, "--store", f"ray:{head.address}:6379")
        self.clients = Clients(self.environment | head.environment | _settings(folder), head.within)
        self.mend()

    def mend(self) -> None:
        head, member = self.network.hosts
        for host in (head, member):
            node = self._nodes.get(host.address)
            if node is not None and node.process.poll() is None:
                continue
            role = ("--head", "--host", head.address)
            if host is member:
                shutil.copy(head.path("zcinfer/ray-token"), member.path("token"))
                role = ("--join", self._address, "--token-file", "/mnt/token")
            node = self._command(*role, "--workers", "1", host=host, **_settings(self.folder))
            self._started.append(node)
            self._nodes[host.address] = node.ready()

    def close(self) -> None:
        self.clients.close()
        self._stack.close()


def _settings(folder: Path) -> dict[str, str]:
    return {
        "DASK_ZCINFER__REGISTRY": str(folder / "registry"),
        "DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY": SHARED_MEMORY,
        "ZCINFER_FAULTS_LOG": str(folder / "log"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "OMP_NUM_THREADS": "1",
    }


def _environment(folder: Path) -> dict[str, str]:
    own = {"TMPDIR": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | _settings(folder) | own


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def _workers_of(address: str) -> int:
    """How many workers a scheduler has; 0 where none answers."""
    import asyncio

    from distributed import rpc

    async def ask() -> int:
        async with rpc(address, timeout=2) as scheduler:
            return len((await scheduler.identity(n_workers=-1))["workers"])

    try:
        return asyncio.run(asyncio.wait_for(ask(), 3))
    except (OSError, TimeoutError):
        return 0


def _end(program: subprocess.Popen[str]) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in [*below(program.pid), psutil.Process(program.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    program.communicate()
