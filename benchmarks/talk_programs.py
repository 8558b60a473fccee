"""The programs of the talk, each as a user would write it: one model over many rows, in small batches.

Written from the talk's description. A program gets rows and a model, and tells the clock when its workers can compute
(`ready`), what is done (`done`), and when all of it is (`finished`). Lines that are the clock's alone end in
``# clock`` and are not counted as the user's (`talk`).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import zarr
from torch import nn

import zcinfer as zc

Array = np.ndarray[Any, Any]
Done = Callable[[int], object]


class Clock(Protocol):
    """What a program tells."""

    def ready(self) -> None: ...
    def done(self, rows: int) -> None: ...
    def finished(self) -> None: ...


def loop(path: Path, model: nn.Module, batch: int, clock: Clock) -> Array:
    x = np.load(path, mmap_mode="r")
    clock.ready()  # clock
    y = batches(x, model, batch, clock.done)
    clock.finished()  # clock
    return y


def batches(x: Array, model: nn.Module, batch: int, done: Done) -> Array:
    results = []
    with torch.inference_mode():
        for start in range(0, len(x), batch):
            rows = torch.from_numpy(np.array(x[start : start + batch]))
            results.append(model(rows).numpy())
            done(len(rows))
    return np.concatenate(results)


def threads(path: Path, model: nn.Module, batch: int, clock: Clock, number: int = 4) -> Array:
    x = np.load(path, mmap_mode="r")
    with ThreadPoolExecutor(number) as pool:
        clock.ready()  # clock
        parts = pool.map(lambda part: batches(part, model, batch, clock.done), np.array_split(x, number))
        y = np.concatenate(list(parts))
        clock.finished()  # clock
    return y


def processes(path: Path, model: nn.Module, batch: int, clock: Clock, jobs: int) -> Array:
    torch.save(model, path.with_name("model.pt"))
    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    places = [device for device in devices for _ in range(jobs)]
    context = multiprocessing.get_context("spawn")
    counted, results = context.Queue(), context.Queue()
    start = context.Barrier(len(places) + 1)  # clock
    workers = [
        context.Process(target=work, args=(path, batch, number, len(places), device, counted, results, start))
        for number, device in enumerate(places)
    ]
    for worker in workers:
        worker.start()
    start.wait(120)  # clock
    clock.ready()  # clock
    rows, total = 0, len(np.load(path, mmap_mode="r"))
    while rows < total:
        found = counted.get(timeout=120)
        clock.done(found)
        rows += found
    parts = dict(results.get(timeout=120) for _ in workers)
    y = np.concatenate([parts[number] for number in range(len(places))])
    clock.finished()  # clock
    for worker in workers:
        worker.join()
    return y


def work(path: Path, batch: int, number: int, of: int, device: str, counted: Any, results: Any, start: Any) -> None:
    torch.set_num_threads(1)
    model = torch.load(path.with_name("model.pt"), weights_only=False, map_location=device)
    x = np.array_split(np.load(path, mmap_mode="r"), of)[number]
    start.wait(120)  # clock
    found, told = [], 0
    with torch.inference_mode():
        for first in range(0, len(x), batch):
            rows = torch.from_numpy(np.array(x[first : first + batch])).to(device)
            found.append(model(rows).cpu().numpy())
            told += len(rows)
            if told >= 1000:
                counted.put(told)
                told = 0
    counted.put(told)
    results.put((number, np.concatenate(found)))


def in_process(path: Path, model: nn.Module, batch: int | str, clock: Clock) -> Array:
    zc.connect("file")
    zc.put(model, "mlp")
    x = np.load(path, mmap_mode="r")
    warm(zc.Predictor("mlp", batch_size=batch), x[:10_000])  # clock
    clock.ready()  # clock
    y: Array = zc.predict("mlp", x, batch_size=batch)
    clock.finished()  # clock
    return y


def cluster_job(path: Path, model: nn.Module, batch: int | str, clock: Clock) -> Array:
    target = path.with_name("y.zarr")
    zc.put(model, "mlp")
    with zc.LocalCluster() as cluster, cluster.get_client() as client:
        predictor = zc.Predictor("mlp", batch_size=batch)  # clock
        warm(predictor, np.load(path, mmap_mode="r")[:10_000])  # clock
        client.run(warm, predictor, np.load(path, mmap_mode="r")[:10_000])  # clock
        clock.ready()  # clock
        zc.run("mlp", str(path), target, batch_size=batch, block_rows=12_800)
        clock.finished()  # clock
    return np.asarray(zarr.open_array(target)[:])


def warm(predictor: zc.Predictor, rows: Array) -> None:
    predictor(np.array(rows))
