"""The cluster on this machine: what it listens on, what its workers get, and that nothing outlives the script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from dask.system import cpu_count
from distributed import Client
from distributed.system import MEMORY_LIMIT
from processes import living, wait_until

from zcinfer.cluster import LocalCluster
from zcinfer.errors import SettingsError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@pytest.fixture(autouse=True, scope="module")
def _same_environment() -> Iterator[None]:
    # Nannies set variables in the process they live in.
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with cluster.get_client() as client:
        yield client


def environment_at_birth(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def page_faults() -> Callable[[], int]:
    def count() -> int:
        """Page faults of 50 tensors of 1 MiB, made and dropped one after the other."""
        import resource

        import torch

        torch.ones(1 << 18)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(50):
            torch.ones(1 << 18)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    return count


def test_memory_of_a_tensor_is_there_for_the_next(client: Client) -> None:
    assert client.submit(page_faults()).result(timeout=60) < 4000  # it was 12,800, the pages of all


def test_one_worker_a_core(cluster: LocalCluster, client: Client) -> None:
    assert len(cluster.workers) == cpu_count()
    assert set(client.nthreads().values()) == {2}  # one computes, the other reads and writes
    assert sum(w["memory_limit"] for w in client.scheduler_info(n_workers=-1)["workers"].values()) == pytest.approx(
        MEMORY_LIMIT, rel=0.01
    )


@pytest.mark.slow
def test_cores_not_to_be_used_are_not_counted() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with LocalCluster() as cluster:
            assert len(cluster.workers) == 1
            assert environment_at_birth(cluster.workers[0].pid)["OMP_NUM_THREADS"] == "1"
    finally:
        os.sched_setaffinity(0, allowed)


def test_threads_of_all_workers_fit_the_cores(cluster: LocalCluster) -> None:
    for nanny in cluster.workers.values():
        assert {name: environment_at_birth(nanny.pid)[name] for name in THREADS} == dict.fromkeys(THREADS, "1")
    # Another cluster of the same script is not held to the figures of the first
    with LocalCluster(n_workers=1, env={"MKL_NUM_THREADS": 3, "COLOUR": "blue"}) as other, other.get_client() as client:
        birth = environment_at_birth(other.workers[0].pid)
        assert [birth[name] for name in THREADS] == [str(cpu_count()), "3", str(cpu_count())]
        assert client.submit(os.getenv, "COLOUR").result() == "blue"


def test_listens_on_the_loopback_address_only(cluster: LocalCluster) -> None:
    pids = [nanny.pid for nanny in cluster.workers.values()]
    listening = [
        connection.laddr
        for pid in [os.getpid(), *pids]
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    # Scheduler and its dashboard; each worker, its nanny and its metrics
    assert len(listening) >= 2 + 3 * len(pids)
    assert {address.ip for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"host": "0.0.0.0"},
        {"interface": "eth0"},
        {"processes": False},
        {"dashboard_address": ":8787"},
        {"dashboard_address": "0.0.0.0:0"},
        {"worker_dashboard_address": ":0"},
        {"n_workers": -1},
        {"threads_per_worker": 0},
        {"memory_limit": "much"},
        {"workers": 2},
    ],
    ids=str,
)
def test_refused_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(arguments))):
        LocalCluster(**arguments)


def test_no_workers_and_more_later() -> None:
    with LocalCluster(n_workers=0, dashboard_address=None, preload="this") as cluster:
        assert cluster.new_spec["options"]["preload"] == ["zcinfer.worker", "this"]
        cluster.scale(1)
        with cluster.get_client() as client:
            client.wait_for_workers(1, timeout=20)
        assert environment_at_birth(cluster.workers[0].pid)["OMP_NUM_THREADS"] == "1"


def test_scratch_directory_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"zcinfer-{os.geteuid()}").symlink_to("elsewhere")
    with dask.config.set({"temporary-directory": str(tmp_path)}), pytest.raises(SettingsError, match="local_directory"):
        LocalCluster(n_workers=0)


class Script:
    """A Python script of two workers that waits for its standard input; what it starts, and the files it shares."""

    def __init__(self, directory: Path, body: str) -> None:
        path = directory / "script.py"
        path.write_text(body)
        self.scratch = directory / f"zcinfer-{os.geteuid()}" / "dask-scratch-space"
        environment = os.environ | {"TMPDIR": str(directory)}
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.family = [psutil.Process(self.process.pid)]
        self.shared: set[str] = set()

    def up(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"
        self.family += self.family[0].children(recursive=True)
        assert len(self.family) >= 3
        self.shared = set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{self.process.pid}/maps").read_text()))
        assert self.shared

    def work_directories(self) -> list[str]:
        return [path.name for path in self.scratch.iterdir() if path.is_dir()]

    def end(self) -> str:
        """Standard error, once the script, all its processes and its shared memory are gone, in 20 s at most."""
        deadline = time.monotonic() + 20
        _, stderr = self.process.communicate(timeout=20)
        wait_until(
            lambda: not living(self.family) and not any(map(os.path.exists, self.shared)), deadline - time.monotonic()
        )
        return stderr


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str], Script]]:
    started = []

    def start(body: str) -> Script:
        started.append(Script(tmp_path, body))
        return started[-1]

    yield start
    for script in started:
        for process in living(script.family):
            process.kill()
        script.process.wait()
        for stream in (script.process.stdin, script.process.stdout, script.process.stderr):
            assert stream is not None
            stream.close()


END = """
import sys
import zcinfer

if __name__ == "__main__":
    cluster = zcinfer.LocalCluster(n_workers=2)
    client = cluster.get_client()
    assert client.submit(sum, [1, 2]).result() == 3
    print("up", flush=True)
    sys.stdin.read()
"""

CLOSE = """
import sys
import zcinfer

if __name__ == "__main__":
    with zcinfer.LocalCluster(n_workers=2) as cluster, cluster.get_client() as client:
        assert client.submit(sum, [1, 2]).result() == 3
        print("up", flush=True)
        sys.stdin.read()
"""


BUSY = """
import time
import zcinfer

def work():
    print("up", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    with zcinfer.LocalCluster(n_workers=1) as cluster, cluster.get_client() as client:
        client.run(work)
"""


@pytest.mark.slow
def test_close_is_clean_and_quiet(script: Callable[[str], Script]) -> None:
    running = script(CLOSE)
    running.up()
    # Scheduler and workers
    assert len(running.work_directories()) == 3
    assert running.end() == ""
    assert running.work_directories() == []


@pytest.mark.slow
def test_end_without_close_is_clean(script: Callable[[str], Script]) -> None:
    running = script(END)
    running.up()
    stderr = running.end()
    # Dask may say that results are lost, since nobody let go of them
    assert "Traceback" not in stderr
    assert "leaked" not in stderr
    assert running.work_directories() == []


def test_interrupt_ends_all_and_is_told_once(script: Callable[[str], Script]) -> None:
    running = script(END)
    running.up()
    # As a terminal does it: to every process of the group
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.end().count("KeyboardInterrupt") == 1
    assert running.work_directories() == []


def test_an_interrupt_does_not_wait_for_what_workers_are_at(script: Callable[[str], Script]) -> None:
    running = script(BUSY)
    running.up()
    begin = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    stderr = running.end()
    assert time.monotonic() - begin < 4  # the four seconds that Dask would wait, and then their end
    assert "KeyboardInterrupt" in stderr
    assert "distributed" not in re.sub(r'File ".*"', "", stderr)  # of its log
    assert running.work_directories() == []


@pytest.mark.parametrize("fatal", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_killed_script_leaves_no_process(script: Callable[[str], Script], fatal: signal.Signals) -> None:
    running = script(END)
    running.up()
    running.process.send_signal(fatal)
    running.end()
    # Nobody was left to remove these; the next start does
    stale = set(running.work_directories())
    assert stale
    following = script(CLOSE)
    following.up()
    assert not stale & set(following.work_directories())
    assert following.end() == ""
    assert following.work_directories() == []
    assert following.scratch.parent.stat().st_mode & 0o777 == 0o700


def test_script_without_guard_is_told_so(script: Callable[[str], Script]) -> None:
    running = script("import zcinfer\nzcinfer.LocalCluster(n_workers=1)\n")
    stderr = running.end()
    assert running.process.returncode == 1
    assert stderr.count('under if __name__ == "__main__"') >= 2
    assert "freeze_support" not in stderr
