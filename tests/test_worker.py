"""Memory limits of workers: what they share does not count, what they have to themselves does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed
import psutil
import pytest
from distributed import Client, Scheduler, Worker
from processes import living, wait_until

from zcinfer.cluster import LocalCluster
from zcinfer.memory import process_memory

LIMIT = 400_000_000
# With what a worker needs for itself, above the terminate threshold of 95 % even of resident memory alone
SIZE = 450_000_000

if sys.platform != "linux":
    pytest.skip("shared memory is told apart on Linux only", allow_module_level=True)


# Tasks are made by functions, so that they travel by value to workers that cannot import this module.


def mapper() -> Callable[..., tuple[int, int]]:
    def map_and_hold(path: str, mapped: str, released: str) -> tuple[int, int]:
        """Touch every page of the file, say so, keep the mapping until told; private and shared bytes then."""
        import mmap

        from distributed import Event

        from zcinfer.memory import process_memory

        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            sum(pages[:: mmap.PAGESIZE])
            Event(mapped).set()
            assert Event(released).wait(timeout="60s")
            memory = process_memory()
        return memory.private, memory.shared

    return map_and_hold


def allocator() -> Callable[[int, str], None]:
    def allocate_and_hold(nbytes: int, released: str) -> None:
        from distributed import Event

        held = bytearray(b"x") * nbytes
        Event(released).wait(timeout="60s")
        del held

    return allocate_and_hold


def reported_and_private() -> Callable[[Any], tuple[int, int]]:
    def figures(dask_worker: Any) -> tuple[int, int]:
        from zcinfer.memory import process_memory

        return dask_worker.monitor.get_process_memory(), process_memory().private

    return figures


def is_importing() -> Callable[[], bool]:
    return lambda: any(thread.name == "zcinfer-import" for thread in threading.enumerate())


def samples() -> Callable[[Any], int]:
    return lambda dask_worker: dask_worker.monitor.count


def nanny_monitor() -> Callable[[Any], str]:
    return lambda dask_worker: type(dask_worker.memory_manager).__name__


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("shared") / "weights"
    with path.open("wb") as file:
        file.truncate(SIZE)
    yield str(path)
    path.unlink()


@pytest.fixture(scope="module", autouse=True)
def _same_environment() -> Iterator[None]:
    # Nannies set variables in the process they live in.
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, memory_limit=LIMIT, scheduler_kwargs={"allowed_failures": 0}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with cluster.get_client() as client:
        yield client


def pids(cluster: distributed.LocalCluster) -> dict[Any, int | None]:
    return {name: nanny.pid for name, nanny in cluster.workers.items()}


def spender() -> Callable[[int], tuple[int, int]]:
    def spend(nbytes: int) -> tuple[int, int]:
        """Take memory in pieces, keep the last alone; private bytes before and after."""
        import sys

        import torch  # noqa: F401  # by another thread at the start of the worker, perhaps still

        from zcinfer.memory import process_memory

        before = process_memory().private
        pieces = [b"x" * (50_000 + number % 2) for number in range(nbytes // 50_000)]
        vars(sys)["kept_by_test"] = pieces.pop()
        pieces.clear()
        return before, process_memory().private

    return spend


def asking() -> Callable[[], int]:
    def private() -> int:
        from zcinfer.memory import process_memory

        return process_memory().private

    return private


def hold(client: Client, workers: list[str], path: str, name: str) -> list[Any]:
    """Futures of one mapping on each of ``workers``, running until Event "<name>-released"."""
    return [
        client.submit(mapper(), path, f"{name}-mapped-{worker}", f"{name}-released", workers=[worker], pure=False)
        for worker in workers
    ]


def unharmed(cluster: LocalCluster, client: Client, workers: list[str], path: str, name: str) -> None:
    """Hold the shared file on ``workers`` for more than ten looks of all monitors; nothing may happen."""
    before = pids(cluster)
    futures = hold(client, workers, path, name)
    for worker in workers:
        assert distributed.Event(f"{name}-mapped-{worker}", client=client).wait(timeout="30s")

    # A sample every 500 ms; worker and nanny compare with the limit every 100 ms
    start = client.run(samples(), workers=workers)
    wait_until(lambda: all(n >= start[w] + 3 for w, n in client.run(samples(), workers=workers).items()))
    states = {worker: cluster.scheduler.workers[worker] for worker in workers}
    assert {state.status for state in states.values()} == {distributed.Status.running}
    assert all(state.metrics["memory"] < LIMIT / 2 for state in states.values())
    distributed.Event(f"{name}-released", client=client).set()

    for private, shared in client.gather(futures):
        assert private < LIMIT / 2
        assert shared > SIZE
    assert pids(cluster) == before


def test_shared_memory_above_the_limit_harms_no_worker(cluster: LocalCluster, client: Client, big_file: str) -> None:
    unharmed(cluster, client, list(client.scheduler_info(n_workers=-1)["workers"]), big_file, "two")


def test_without_the_preload_it_does(big_file: str) -> None:
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit=LIMIT,
            dashboard_address=":0",
            scheduler_kwargs={"allowed_failures": 0},
        ) as cluster,
        cluster.get_client() as client,
    ):
        (worker,) = cluster.scheduler.workers
        (future,) = hold(client, [worker], big_file, "stock")
        with pytest.raises(distributed.scheduler.KilledWorker):
            future.result(timeout=30)


def test_private_memory_above_the_limit_still_restarts_the_worker(
    cluster: LocalCluster, client: Client, big_file: str
) -> None:
    before = pids(cluster)
    victim = cluster.workers[0].worker_address
    future = client.submit(allocator(), SIZE, "never", workers=[victim], pure=False)
    with pytest.raises(distributed.scheduler.KilledWorker):
        future.result(timeout=30)
    wait_until(lambda: cluster.workers[0].worker_address in set(cluster.scheduler.workers) - {victim})
    assert cluster.workers[0].pid != before[0]
    assert cluster.workers[1].pid == before[1]

    # The new process has the same limits as the old one
    assert list(cluster.workers[0].plugins) == ["zcinfer-private-memory-limit"]
    unharmed(cluster, client, [cluster.workers[0].worker_address], big_file, "restarted")


def test_freed_memory_is_kept_for_the_next_task_and_given_back_at_rest(cluster: LocalCluster, client: Client) -> None:
    worker = cluster.workers[0].worker_address
    spent = 60_000_000
    before, kept = client.submit(spender(), spent, workers=[worker], pure=False).result(timeout=30)
    assert kept > before + 0.8 * spent
    wait_until(lambda: client.run(asking(), workers=[worker])[worker] < before + 0.2 * spent)


def test_nanny_monitor_is_replaced_once(cluster: LocalCluster, client: Client) -> None:
    expected = dict.fromkeys(cluster.scheduler.workers, "PrivateMemoryMonitor")
    assert client.run(nanny_monitor(), nanny=True) == expected
    nanny = cluster.workers[1]
    monitor, callback = nanny.memory_manager, nanny.periodic_callbacks["memory_monitor"]

    (plugin,) = nanny.plugins
    del nanny.plugins[plugin]
    client.restart_workers([nanny.worker_address])
    wait_until(lambda: plugin in nanny.plugins)
    assert nanny.memory_manager is monitor
    assert nanny.periodic_callbacks["memory_monitor"] is callback
    assert callback.is_running()


def test_plugin_replaces_a_monitor_that_runs_already(client: Client) -> None:
    # As for a nanny that is told of the plugin late, once it watches its worker
    def swap(dask_worker: Any) -> tuple[bool, bool, bool]:
        from distributed.worker_memory import NannyMemoryManager

        from zcinfer.worker import PrivateMemoryLimit

        dask_worker.periodic_callbacks["memory_monitor"].stop()
        dask_worker.memory_manager = NannyMemoryManager(dask_worker, memory_limit=LIMIT)
        old = dask_worker.periodic_callbacks["memory_monitor"]
        old.start()
        PrivateMemoryLimit().setup(dask_worker)
        new = dask_worker.periodic_callbacks["memory_monitor"]
        return old.is_running(), new.is_running(), new is old

    (worker, *_) = client.scheduler_info(n_workers=-1)["workers"]
    assert client.run(swap, nanny=True, workers=[worker]) == {worker: (False, True, False)}


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_worker_started_in_a_shell(cluster: LocalCluster, client: Client, tmp_path: Path, end: signal.Signals) -> None:
    others = set(cluster.scheduler.workers)
    command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address]
    options = ["--preload", "zcinfer.worker", "--nthreads", "1", "--memory-limit", str(LIMIT), "--host", "127.0.0.1"]
    directory = ["--local-directory", str(tmp_path)]
    shell = subprocess.Popen(
        [*command, *options, *directory], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    processes = [psutil.Process(shell.pid)]
    try:
        wait_until(lambda: shell.poll() is not None or set(cluster.scheduler.workers) - others)
        (worker,) = set(cluster.scheduler.workers) - others
        processes += processes[0].children(recursive=True)
        wait_until(lambda: client.run(nanny_monitor(), nanny=True, workers=[worker])[worker] == "PrivateMemoryMonitor")
        wait_until(lambda: not client.run(is_importing(), workers=[worker])[worker])  # which takes memory
        reported, private = client.run(reported_and_private(), workers=[worker])[worker]
        assert reported == pytest.approx(private, abs=2e6)

        # As a terminal does it: to the nanny and to its worker
        os.killpg(shell.pid, end) if end is signal.SIGINT else shell.send_signal(end)
        _, output = shell.communicate(timeout=20)
        assert "Traceback" not in output
        wait_until(lambda: not living(processes))
    finally:
        for process in living(processes):
            process.kill()
        shell.wait()


def test_worker_without_a_nanny() -> None:
    async def figures() -> tuple[int, int]:
        async with (
            Scheduler(dashboard_address=":0", port=0, host="127.0.0.1") as scheduler,
            Worker(scheduler.address, preload="zcinfer.worker", memory_limit=LIMIT) as worker,
        ):
            return worker.monitor.get_process_memory(), process_memory().private

    interrupt = signal.getsignal(signal.SIGINT)
    reported, private = asyncio.run(figures())
    assert reported == pytest.approx(private, abs=2e6)
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_start_of_a_worker_imports_neither_torch_nor_ray() -> None:
    check = "import sys, zcinfer.worker; print({'torch', 'ray', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "set()\n"
