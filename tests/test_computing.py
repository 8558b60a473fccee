"""How many threads compute at a time, in workers of ours and in others."""

from __future__ import annotations

import threading
import time
from typing import Any

import dask.array as da
import pytest
import torch
from dask.system import cpu_count
from distributed import Client, LocalCluster
from torch import nn

import zcinfer as zc
from zcinfer.computing import computing

pytestmark = pytest.mark.usefixtures("registry")


class Crowd(nn.Module):
    """Gives the number of threads of the process that are in it at once, after a while."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor:
            return x
        here = vars(torch).setdefault("_zcinfer_crowd", [])  # of the process
        here.append(threading.get_ident())
        time.sleep(0.05)
        count = len(here)
        here.remove(threading.get_ident())
        return torch.full_like(x, count)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "expected"), [(None, 1), (2, 2)])
def test_one_thread_of_a_worker_computes(asked: int | None, expected: int) -> None:
    zc.put(Crowd().eval(), "crowd")
    config = {} if asked is None else {"config": {"zcinfer": {"computing": asked}}}
    with zc.LocalCluster(n_workers=1, **config) as cluster, cluster.get_client() as client:
        assert set(client.nthreads().values()) == {2}
        x = da.zeros((12, 1), chunks=(1, 1), dtype="f4")
        assert zc.predict("crowd", x).max().compute() == expected
        threads = client.run(lambda: (torch.get_num_threads(), torch.get_num_interop_threads()))
        assert list(threads.values()) == [(cpu_count(), 1)]


def places(_: int) -> int:
    door: Any = computing()
    return int(door._value) if isinstance(door, threading.Semaphore) else 1


@pytest.mark.slow
@pytest.mark.parametrize(("torchs", "expected"), [(1, 3), (3, 1)])
def test_workers_of_others_compute_on_all_their_threads(torchs: int, expected: int) -> None:
    def look(threads: int) -> int:
        torch.set_num_threads(threads)
        return places(0)

    address = "127.0.0.1:0"
    with (
        LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=address) as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(look, torchs).result() == expected


def test_here_as_many_as_there_are_cores_for() -> None:
    assert places(0) == max(1, cpu_count() // torch.get_num_threads())
