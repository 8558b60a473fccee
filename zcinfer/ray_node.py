"""The keeper process: a node of Ray as a tree below one process, which ends all of it and itself.

Nothing here is called by users, and nothing imports Ray: `zcinfer.keeper` starts this process and holds the pipe
whose end tells it to stop. What a killed keeper left behind is found by marks, and removed by `clear` and `sweep`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PREFIX = "zcinfer-ray-"
# Variable of the environment that names the directory, and file in the directory that names the keeper's pid
MARK, RECORD = "ZCINFER_KEEPER", "keeper"
# Seconds: for processes to end by themselves; to end them all; and until a directory that no keeper recorded
# itself in counts as left behind rather than as just being made
GRACE, LONGEST_END, UNRECORDED = 2.0, 15.0, 60.0


def keep(directory: str, object_store_memory: str, host: str, port: str, join: str) -> None:
    """Start Ray, report to standard output as a line of JSON, end Ray at the end of standard input or on a signal.

    ``host`` and ``join`` are empty for a head that this machine alone can reach, and ``join`` for any head.
    """
    pr_set_child_subreaper = 36
    # Ray's processes detach themselves from what started them, and so become children of this one
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    claim(Path(directory))
    Path(directory, RECORD).write_text(str(os.getpid()))

    poller = select.poll()
    poller.register(sys.stdin, select.POLLIN)
    poller.register(woken, select.POLLIN)
    with contextlib.suppress(OSError):
        # A child of the parent that C code forked may hold the pipe open when the parent is gone
        poller.register(os.pidfd_open(os.getppid()), select.POLLIN)
    busy = [socket.socket(), socket.socket()]
    for taken in busy:
        taken.bind(("127.0.0.1", 0))
    ports = [taken.getsockname()[1] for taken in busy]
    command = _ray_start(directory, object_store_memory, host or "127.0.0.1", port, join, *ports)
    ray_start: subprocess.Popen[bytes] | None = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
    while {descriptor for descriptor, _ in poller.poll()} == {woken}:
        if set(os.read(woken, 4096)) != {signal.SIGCHLD}:
            break
        if ray_start is None:
            _reap()
        elif ray_start.poll() is not None:
            _report(directory, ray_start.returncode)
            ray_start = None
    ended = _end_children()
    _remove(Path(directory))
    sys.exit(not ended)


def _ray_start(
    directory: str, object_store_memory: str, host: str, port: str, join: str, busy: int, also_busy: int
) -> list[str]:
    options: dict[str, str | int] = {
        "node-ip-address": host,
        "temp-dir": directory,
        "object-store-memory": object_store_memory,
        "num-gpus": 0,
        # Fixed by default: two Rays on one machine would meet
        "min-worker-port": 0,
        "max-worker-port": 0,
        "dashboard-agent-listen-port": 0,
        "include-log-monitor": "false",
    }
    if join:
        options |= {"address": join, "num-cpus": 0}  # nothing runs there: it holds memory
        flags = []
    else:
        options |= {
            "port": port,
            "num-cpus": 1,  # one worker is then started ahead of need, and the holder gets it
            # Even without a dashboard its process starts (60 MB, 0.6 s), unless the port is in use
            "include-dashboard": "false",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": busy,
        }
        if importlib.util.find_spec("grpc") is not None:
            # Ray then serves Ray Client as well (55 MB), unless the port is in use
            options["ray-client-server-port"] = also_busy
        flags = ["--head", "--no-monitor"]  # the monitor is the autoscaler (50 MB)
    flags += ["--disable-usage-stats", *(f"--{key}={value}" for key, value in options.items())]
    return [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *flags]


def _report(directory: str, status: int) -> None:
    answer = {"status": status}
    if status == 0:
        answer["port"] = int(Path(directory, "ray_current_cluster").read_text().rpartition(":")[2])
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(answer).encode() + b"\n")


def _reap() -> bool:
    """Take note of children that ended; false if no child is left, which means no descendant either."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _end_children() -> bool:
    started = time.monotonic()
    while _reap() and time.monotonic() - started < LONGEST_END:
        children = psutil.Process().children(recursive=True)
        hurry = time.monotonic() - started > GRACE or len(children) == 1
        for child in children:
            with contextlib.suppress(psutil.Error):
                if hurry:
                    child.kill()
                # The raylet takes its leave of it in 20 ms, but waits 10 s for one that is gone
                elif child.name() != "gcs_server":
                    child.terminate()
        time.sleep(0.05)
    return not _reap()


def claim(directory: Path, how: int = fcntl.LOCK_SH) -> int:
    """Open ``directory`` so that nobody sweeps it while the returned descriptor is open.

    The parent holds one, the keeper another, and a sweeper asks for ``LOCK_EX``: that works between containers
    that share a directory for temporary files, where a recorded pid says nothing.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def sweep(place: Path) -> None:
    """Clear the directories in ``place`` whose keeper and parent are both gone."""
    for directory in place.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            status = directory.lstat()
            recorded = (directory / RECORD).exists()
            if status.st_uid == os.geteuid() and (recorded or time.time() - status.st_ctime > UNRECORDED):
                claimed = claim(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    clear(directory)
                finally:
                    os.close(claimed)


def clear(directory: Path) -> None:
    """Kill what a dead keeper left running, and remove its directory."""
    session = -1
    with contextlib.suppress(OSError, ValueError):
        session = int((directory / RECORD).read_text())
    started = time.monotonic()
    while (left := list(_left(directory, session))) and time.monotonic() - started < LONGEST_END:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)
    _remove(directory)


def _left(directory: Path, session: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            # Some of Ray's processes write their title over their environment; they stay where they were started
            if process.environ().get(MARK) == str(directory) or (
                os.getsid(process.pid) == session and Path(process.cwd()).is_relative_to(directory)
            ):
                yield process


def _remove(directory: Path) -> None:
    # A driver that is still connected may write to its log meanwhile
    for _ in range(3):
        shutil.rmtree(directory, ignore_errors=True)
