"""Hosts on one machine, made of namespaces, and `zcinfer node` as a program on them or here.

A host has a network of its own with one address, a /dev/shm, processes that see each other alone, and a private
directory at a path that all hosts have: nothing is shared but the other files. All hosts hang on one bridge, which is
in a namespace too. All of it ends with the process that made it, however that ends. Needs root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).absolute().parents[2]  # not resolved: benchmarks is a link in a checkout
# Ray's sockets need most of a path's 107 bytes
PRIVATE = Path("/mnt")
NETWORK = "10.77.0"


def why_not() -> str | None:
    """Why hosts cannot be made here, or None."""
    try:
        trial = [*_unshare(), "ip", "link", "add", "type", "bridge"]
        done = subprocess.run(trial, capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"{error.filename} is missing (Debian: util-linux, iproute2)"
    return f"namespaces cannot be made: {done.stderr.strip()}" if done.returncode else None


class Host:
    """One of the hosts that `hosts` makes.

    Attributes
    ----------
    address : str
    environment : dict of str to str
        Variables by which programs there keep their files in the private directory.
    """

    def __init__(self, number: int, init: int):
        self.address = f"{NETWORK}.{number}"
        self.environment = {
            "TMPDIR": str(PRIVATE),
            "XDG_STATE_HOME": str(PRIVATE),
            "DASK_ZCINFER__REGISTRY": str(PRIVATE / "registry"),
        }
        self.within = ("nsenter", f"--target={init}", "--net", "--mount", "--pid", f"--wd={ROOT}", "--")
        self._init = init

    def path(self, name: str) -> Path:
        """A file of the private directory, as this process reaches it."""
        return Path(f"/proc/{self._init}/root{PRIVATE}") / name

    def processes(self) -> list[psutil.Process]:
        """What runs there; but for the process that holds the host."""
        namespace, found = os.readlink(f"/proc/{self._init}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                there = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
                if there and process.pid != self._init and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        """A Python program on this host, whose standard input and output are pipes."""
        return subprocess.Popen(
            [*self.within, sys.executable, *arguments],
            env=_environment(self.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


class Network:
    """The hosts and what goes over their links."""

    def __init__(self, hosts: Sequence[Host], switch: tuple[str, ...]):
        self.hosts = hosts
        self._switch = switch

    @contextmanager
    def slowed(self, host: Host, rate: str) -> Iterator[None]:
        """Let no more than ``rate`` ("50mbit") through to a host meanwhile."""
        port = ("dev", f"port{self.hosts.index(host) + 1}", "root")
        subprocess.run([*self._switch, *_limit("add", *port, rate=rate)], check=True)
        try:
            yield
        finally:
            subprocess.run([*self._switch, "tc", "qdisc", "del", *port], check=True)

    @contextmanager
    def cut(self, host: Host) -> Iterator[None]:
        """Let nothing through to or from a host meanwhile, as where its cable is pulled."""
        port = ("ip", "link", "set", f"port{self.hosts.index(host) + 1}")
        subprocess.run([*self._switch, *port, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run([*self._switch, *port, "up"], check=True)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes that each host has sent and received so far, headers included, by its address."""
        told = json.loads(subprocess.check_output([*self._switch, "ip", "-s", "-j", "link"]))
        counted = {link["ifname"]: link["stats64"] for link in told}
        ports = {host.address: counted[f"port{number}"] for number, host in enumerate(self.hosts, 1)}
        return {address: (port["rx"]["bytes"], port["tx"]["bytes"]) for address, port in ports.items()}


@contextmanager
def network(number: int, rate: str | None = None) -> Iterator[Network]:
    """A network of so many hosts, each with a link of ``rate`` ("1gbit") in each direction, or as fast as can be."""
    with ExitStack() as stack:
        bridge = "ip link add bridge0 type bridge && ip link set bridge0 up"
        switch = stack.enter_context(_namespace(bridge))
        made = []
        for host in range(1, number + 1):
            made.append(Host(host, stack.enter_context(_namespace(f"mount -t tmpfs -o size=4g tmpfs {PRIVATE}"))))
            port = f"port{host}"
            lines = [
                f"ip link add {port} type veth peer name eth0 netns {made[-1]._init}",
                f"ip link set {port} master bridge0 up",
                *([" ".join(_limit("add", "dev", port, "root", rate=rate))] if rate else []),
            ]
            subprocess.run([*_enter(switch), "sh", "-ec", "\n".join(lines)], check=True)
            lines = [
                f"ip addr add {NETWORK}.{host}/24 dev eth0",
                "ip link set eth0 up",
                *([" ".join(_limit("add", "dev", "eth0", "root", rate=rate))] if rate else []),
            ]
            subprocess.run([*made[-1].within, "sh", "-ec", "\n".join(lines)], check=True)
        yield Network(made, _enter(switch))


def _limit(verb: str, *where: str, rate: str) -> list[str]:
    return ["tc", "qdisc", verb, *where, "tbf", "rate", rate, "burst", "1mb", "latency", "100ms"]


@contextmanager
def _namespace(first: str) -> Iterator[int]:
    """Pid of a process in namespaces of its own, where the command ``first`` was run."""
    script = f"ip link set lo up && mount -t tmpfs tmpfs /dev/shm && {first} && echo ready && exec sleep infinity"
    holder = subprocess.Popen([*_unshare(), "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise SystemExit("a namespace could not be made")
        (init,) = psutil.Process(holder.pid).children()
        yield init.pid
    finally:
        holder.kill()
        holder.communicate()


def _unshare() -> list[str]:
    # Each ends with the one before it: the caller, setpriv's unshare, its child, all in there
    own = ("--net", "--mount", "--pid", "--mount-proc")
    return ["setpriv", "--pdeathsig=KILL", "unshare", *own, "--fork", "--kill-child"]


def _enter(init: int) -> tuple[str, ...]:
    # Its network alone: `ip` names other namespaces by pids of this one
    return ("nsenter", f"--target={init}", "--net", "--")


def _environment(further: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | further


class Command:
    """A running `zcinfer node`, here or on a host, and what it has printed."""

    def __init__(self, *arguments: str, host: Host | None = None, **environment: str):
        # Not a pipe: nobody reads it, and it would fill
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._within = host is not None
        self.process = subprocess.Popen(
            [*(host.within if host else ()), sys.executable, "-m", "zcinfer", "node", *arguments],
            env=_environment((host.environment if host else {}) | environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def printed(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def ready(self, seconds: float = 90) -> Command:
        """Return when it runs; fails where it ends instead."""
        deadline = time.monotonic() + seconds
        while "Ctrl-C ends" not in self.printed:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, f"not within {seconds} s; printed: {self.printed}"
            time.sleep(0.05)
        return self

    def refused(self, seconds: float = 60) -> str:
        """What it printed before it gave up."""
        assert self.process.wait(seconds) == 1, self.printed
        return self.printed

    def send(self, number: int) -> None:
        """Send it a signal, and not what has entered the host for it."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for target in process.children() if self._within else [process]:
                target.send_signal(number)

    def close(self) -> None:
        """End it as Ctrl-C does, or as nothing can resist."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                raise
            finally:
                self.process.kill()
                self.process.wait()
        self._log.close()


@contextmanager
def commands() -> Iterator[list[Command]]:
    """A list whose commands end with the block, the last one first."""
    started: list[Command] = []
    try:
        yield started
    finally:
        with ExitStack() as stack:
            for command in started:
                stack.callback(command.close)
