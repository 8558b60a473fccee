"""The systems that the throughput benchmark compares, each as its own documentation has it, at the same task.

Every one reads rows of memory maps, has the model from a file that is there (ours: from a registry), and writes
rows of a memory map; and every one gets the block length, the batch size and the threads that measured best. Not for
how runs are watched (`runs`).
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch

from .workloads import Array, Npy, Target, Task

# The job itself, without start-up: run by each system between two looks at the clock.
Times = dict[str, float]


@contextmanager
def clock(times: Times) -> Iterator[None]:
    times["begin"] = time.monotonic()
    yield
    times["end"] = time.monotonic()


# Plain torch.


def single(task: Task, times: Times) -> None:
    """Plain torch, one process."""
    torch.set_num_threads(task.threads)
    model = task.model()
    with clock(times):
        for start in task.starts:
            task.write(start, task.run(model, task.read(start, start + task.block)))


def processes(task: Task, times: Times) -> None:
    """Plain torch, as many processes as cores: each takes the next block when it is done with one."""
    context = multiprocessing.get_context("spawn")
    counter, door = context.Value("q", 0), context.Barrier(task.processes + 1)
    workers = [context.Process(target=_process, args=(task, counter, door)) for _ in range(task.processes)]
    for worker in workers:
        worker.start()
    while door.n_waiting < task.processes and not door.broken:
        time.sleep(0.001)
    with clock(times):  # from before the door opens: a block may be done before this process is woken
        door.wait()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("a process failed; its message is above")


def _process(task: Task, counter: Any, door: Any) -> None:
    torch.set_num_threads(task.threads)
    try:
        model = task.model()
    except BaseException:
        door.abort()
        raise
    door.wait()
    while True:
        with counter.get_lock():
            start = counter.value
            counter.value = start + task.block
        if start >= task.rows:
            return
        task.write(start, task.run(model, task.read(start, start + task.block)))


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Whole batches, so that no row is collated by itself."""

    def __init__(self, task: Task):
        self.task = task

    def __len__(self) -> int:
        return -(-self.task.rows // self.task.batch)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        start = number * self.task.batch
        return {name: torch.from_numpy(a) for name, a in self.task.read(start, start + self.task.batch).items()}


def data_loader(task: Task, times: Times) -> None:
    """torch DataLoader: one process reads, and this one computes."""
    torch.set_num_threads(task.threads)
    model = task.model()
    loader = torch.utils.data.DataLoader(
        Batches(task), batch_size=None, num_workers=1, multiprocessing_context="spawn", prefetch_factor=4
    )
    with clock(times), torch.inference_mode():
        for number, tensors in enumerate(loader):
            task.write(number * task.batch, task.work.output(model(**tensors), tensors).numpy())


# Dask, as people use it.


@contextmanager
def _dask(task: Task) -> Iterator[None]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=task.processes, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield


def _arrays(task: Task, rows: int) -> dict[str, Any]:
    """The inputs as dask arrays, in blocks of the task's length."""
    import dask.array as da

    files = {name: Npy(path) for name, path in task.paths.items()}
    arrays = {
        name: da.from_array(file, chunks=(task.block, *file.shape[1:]), inline_array=True, meta=np.empty(0, file.dtype))
        for name, file in files.items()
    }
    return {name: array[:rows] for name, array in arrays.items()}


def _store(array: Any, task: Task) -> None:
    import dask.array as da

    da.store(array, Target(task), lock=False)


def delayed(task: Task, times: Times) -> None:
    """dask.delayed(model), and a delayed call for each block."""
    import dask

    with _dask(task), clock(times):
        model = dask.delayed(task.model())
        call = dask.delayed(_delayed)
        dask.compute(*[call(model, task, start) for start in task.starts])


def _delayed(model: torch.nn.Module, task: Task, start: int) -> None:
    task.write(start, task.run(model, task.read(start, start + task.block)))


def map_blocks(task: Task, times: Times) -> None:
    """dask.array.map_blocks with the model as an argument."""
    with _dask(task):
        for rows in _jobs(task):
            with clock(times):
                arrays = list(_arrays(task, rows).values())
                _store(_mapped(_on_block, arrays, task.work.width, model=task.model(), task=task), task)


def _mapped(function: Callable[..., Array], arrays: list[Any], width: int, **arguments: Any) -> Any:
    import dask.array as da

    chunks = (arrays[0].chunks[0], (width,))
    dropped = {"drop_axis": list(range(2, arrays[0].ndim))} if arrays[0].ndim > 2 else {}
    meta = np.empty((0, 0), np.float32)
    return da.map_blocks(function, *arrays, chunks=chunks, dtype=np.float32, meta=meta, **dropped, **arguments)


def _on_block(*blocks: Array, model: torch.nn.Module, task: Task) -> Array:
    return task.run(model, dict(zip(task.work.inputs, blocks, strict=True)))


def _jobs(task: Task) -> Iterator[int]:
    """Rows of the jobs to do: a block for each process to begin with, where the task is to be warm."""
    if task.warm:
        yield min(task.rows, task.processes * task.block)
    yield task.rows


class Estimator:
    """What dask-ml wraps: an object with ``predict``, as scikit-learn has them."""

    def __init__(self, task: Task):
        self.task, self.model = task, task.model()

    def predict(self, *blocks: Array) -> Array:
        return _on_block(*blocks, model=self.model, task=self.task)


def dask_ml(task: Task, times: Times) -> None:
    """What ``dask_ml.wrappers.ParallelPostFit.predict`` does, written out: its ``predict`` mapped over the blocks."""
    with _dask(task), clock(times):
        arrays = list(_arrays(task, task.rows).values())
        _store(_mapped(_estimated, arrays, task.work.width, estimator=Estimator(task)), task)


def _estimated(*blocks: Array, estimator: Estimator) -> Array:
    return estimator.predict(*blocks)


# Ray Data.


class Actor:
    """A class for ``map_batches``: built once in each actor, called with numbers of rows."""

    def __init__(self, fields: dict[str, Any]):
        self.task = Task(**fields)
        torch.set_num_threads(self.task.threads)
        self.model = self.task.model()

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        numbers = batch["id"]
        edges = np.flatnonzero(np.diff(numbers) != 1) + 1
        for part in np.split(numbers, edges):  # one, but where Ray Data has put blocks together
            start, stop = int(part[0]), int(part[-1]) + 1
            self.task.write(start, self.task.run(self.model, self.task.read(start, stop)))
        return {"rows": np.array([len(numbers)])}


def ray_data(task: Task, times: Times) -> None:
    """Ray Data with actors: numbers of rows go through it, and the actors read the rows themselves."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # One CPU more than actors, without which nothing would make the numbers of rows.
    ray.init(num_cpus=task.processes + 1, include_dashboard=False, log_to_driver=False)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    with clock(times):
        blocks = -(-task.rows // max(task.block, task.framework_batch))
        numbers = ray.data.range(task.rows, override_num_blocks=blocks)
        numbers.map_batches(
            Actor,
            fn_constructor_args=(asdict(task),),
            batch_size=task.framework_batch,
            batch_format="numpy",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=task.processes),
        ).materialize()
    ray.shutdown()


# Ours.


def zcinfer(task: Task, times: Times) -> None:
    """zcinfer with its Ray store."""
    _ours(task, times, "ray")


def zcinfer_file(task: Task, times: Times) -> None:
    """zcinfer with its file store."""
    _ours(task, times, "file")


def _ours(task: Task, times: Times, store: str) -> None:
    import zcinfer as zc

    with zc.LocalCluster(n_workers=task.processes, dashboard_address=None) as cluster, cluster.get_client():
        zc.connect(store)
        for rows in _jobs(task):
            with clock(times):
                arrays = _arrays(task, rows)
                y = zc.predict(task.workload, **arrays, batch_size=task.batch, output=task.work.output)
                _store(y, task)


LIMIT, OURS, OURS_FILE, RAY_DATA = "plain torch, all cores", "zcinfer", "zcinfer, file store", "Ray Data, actors"
SYSTEMS: dict[str, Callable[[Task, Times], None]] = {
    LIMIT: processes,
    "plain torch, one process": single,
    "torch DataLoader": data_loader,
    "dask.delayed(model)": delayed,
    "model in map_blocks": map_blocks,
    "dask-ml style": dask_ml,
    RAY_DATA: ray_data,
    OURS: zcinfer,
    OURS_FILE: zcinfer_file,
}
# Frameworks, as opposed to what one writes oneself; and those of them that have workers on all cores.
FRAMEWORKS = ("torch DataLoader", "dask.delayed(model)", "model in map_blocks", "dask-ml style", RAY_DATA)
ON_ALL_CORES = FRAMEWORKS[1:]
ONE_PROCESS = ("plain torch, one process", "torch DataLoader")


def perform(system: str, task: dict[str, Any]) -> Times:
    """One run: when the job itself began and ended, by ``time.monotonic``."""
    times: Times = {}
    SYSTEMS[system](Task(**task), times)
    return times


# Which batch size and how many threads are best.

_LONG_ENOUGH = 0.4


def rates(task: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rows per second of plain torch, by batch size: one process with one thread and with many, and many processes."""
    asked, cores = Task(**task), len(os.sched_getaffinity(0))
    ways = {"1 x 1": (1, 1), f"1 x {cores}": (1, cores), f"{cores} x 1": (cores, 1)}
    context = multiprocessing.get_context("spawn")
    found = {}
    for way, (count, threads) in ways.items():
        door, results = context.Barrier(count), context.SimpleQueue()
        workers = [context.Process(target=_rate, args=(asked, threads, door, results)) for _ in range(count)]
        for worker in workers:
            worker.start()
        parts = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
        found[way] = {str(batch): sum(part[batch] for part in parts) for batch in parts[0]}
    return found


def _rate(task: Task, threads: int, door: Any, results: Any) -> None:
    torch.set_num_threads(threads)
    model, best = task.model(), {}
    for batch in task.work.batches:
        one = Task(**{**asdict(task), "batch": batch})
        blocks = one.read(0, min(task.rows, batch))
        one.run(model, blocks)
        tried = []
        for _ in range(3):
            door.wait()
            begin, rows = time.perf_counter(), 0
            while time.perf_counter() - begin < _LONG_ENOUGH / 3:
                one.run(model, blocks)
                rows += len(next(iter(blocks.values())))
            tried.append(rows / (time.perf_counter() - begin))
        best[batch] = float(np.median(tried))
    results.put(best)
