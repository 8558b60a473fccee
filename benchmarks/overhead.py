"""What zcinfer costs where nothing is computed: a block, a graph of 20,000 blocks, a change of model.

Each function is a run of its own (`runs`) and returns its figures. Not for comparing systems (`systems`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import dask.array as da
import numpy as np
import psutil
import torch
from distributed import wait
from torch import nn

import zcinfer as zc
from zcinfer.memory import process_memory

from .measure import interleaved, summary
from .models import small_bert

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK_ROWS, FEATURES = 8, 4
LABELS, TOKENS, BATCH = 9, 32, 32


class Nothing(nn.Module):
    """Gives what it gets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Nowhere:
    """Where results go that nobody wants."""

    def __setitem__(self, index: Any, block: Array) -> None:
        pass


def _same(block: Array) -> Array:
    return block


def _rows(blocks: int) -> da.Array:
    return da.zeros((blocks * BLOCK_ROWS, FEATURES), chunks=(BLOCK_ROWS, FEATURES), dtype=np.float32)


def _predicted(blocks: int) -> da.Array:
    found: da.Array = zc.predict("nothing", _rows(blocks), batch_size=BLOCK_ROWS)
    return found


def _copied(blocks: int) -> da.Array:
    return _rows(blocks).map_blocks(_same, dtype=np.float32, meta=np.empty((0, 0), np.float32))


def _store(array: da.Array, compute: bool = True) -> Any:
    return da.store(array, Nowhere(), lock=False, compute=compute)


def per_block(blocks: int, rounds: int) -> dict[str, Any]:
    """What a block costs of a model that does nothing, and one of Dask's own graph of as many, warm and in turn.

    Seconds, and processor seconds of the workers, and of this process, in which client and scheduler are.
    """
    with zc.LocalCluster(dashboard_address=None) as cluster, cluster.get_client() as client:
        zc.connect("file")
        zc.put(Nothing().eval(), "nothing")
        workers = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        spent: dict[str, dict[str, list[float]]] = {}

        def watched(way: str, predicted: Callable[[int], da.Array]) -> Callable[[], None]:
            found = spent.setdefault(way, {"workers": [], "scheduler": []})

            def run() -> None:
                before = _processor(workers), time.process_time()
                _store(predicted(blocks))
                found["workers"].append(_processor(workers) - before[0])
                found["scheduler"].append(time.process_time() - before[1])

            return run

        ways = {"zcinfer": watched("zcinfer", _predicted), "Dask alone": watched("Dask alone", _copied)}
        seconds = interleaved(ways, rounds)

        # Of a worker: while one is busy with what is no work of the user's, the others are too.
        def each(times: list[float], share: int = 1) -> dict[str, Any]:
            return summary([t / blocks * share for t in times])

        return {
            "blocks": blocks,
            "workers": len(workers),
            "seconds": {way: summary(times) for way, times in seconds.items()},
            "per_block": {way: each(times, len(workers)) for way, times in seconds.items()},
            # The first is to warm up
            "processor": {way: {who: each(used[1:]) for who, used in of.items()} for way, of in spent.items()},
        }


def _processor(processes: list[psutil.Process]) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


def many_blocks(blocks: int) -> dict[str, Any]:
    """One graph of many blocks: seconds to build, to hand over, to run; bytes of client and scheduler, one process."""
    with zc.LocalCluster(dashboard_address=None) as cluster, cluster.get_client() as client:
        zc.connect("file")
        zc.put(Nothing().eval(), "nothing")
        _store(_predicted(4))  # imports, and the model
        memory = {"before": process_memory().private}
        begin = time.perf_counter()
        stored = _store(_predicted(blocks), compute=False)
        built = time.perf_counter()
        memory["built"] = process_memory().private
        future = client.compute(stored)
        client.run_on_scheduler(_known, blocks)
        scheduled = time.perf_counter()
        memory["scheduled"] = process_memory().private
        wait(future)
        ended = time.perf_counter()
        if future.status != "finished":
            raise RuntimeError(f"the graph ended as {future.status}")
        memory["run"] = process_memory().private
        workers = client.run(lambda: process_memory().private)
        return {
            "blocks": blocks,
            "build_seconds": built - begin,
            "schedule_seconds": scheduled - built,
            "run_seconds": ended - scheduled,
            "memory": memory,
            "workers_memory": sum(workers.values()),
        }


async def _known(blocks: int, dask_scheduler: Any) -> None:
    """Come back once the scheduler has the graph."""
    import asyncio

    while len(dask_scheduler.tasks) < blocks and dask_scheduler.transition_counter < blocks:
        await asyncio.sleep(0.01)


def switching(rows: int, block: int, rounds: int) -> dict[str, Any]:
    """Seconds of `predict_by` over variants of one BERT, and of one of them over the same rows, warm and in turn."""
    models = {str(label): f"variant-{label}" for label in range(LABELS)}
    ids = np.random.default_rng(0).integers(1, 30_000, (rows, TOKENS))
    by = np.arange(rows) % LABELS
    np.random.default_rng(1).shuffle(by)
    x, labels = da.from_array(ids, chunks=(block, TOKENS)), da.from_array(by.astype(str), chunks=block)
    settings: dict[str, Any] = {"batch_size": BATCH, "output": _first_token}
    with zc.LocalCluster(dashboard_address=None) as cluster, cluster.get_client():
        zc.connect("file")
        zc.put(small_bert(0), models["0"])
        for label in range(1, LABELS):
            zc.put(small_bert(label), models[str(label)], base=models["0"])

        def many() -> Array:
            found: Array = zc.predict_by(models, input_ids=x, by=labels, **settings).compute()
            return found

        def one() -> Array:
            found: Array = zc.predict(models["0"], input_ids=x, **settings).compute()
            return found

        for _ in range(2):  # so that each worker has met all
            mixed, single = many(), one()
        # As every model by itself gives them, in batches of other rows.
        for label in (0, LABELS - 1):
            mine = np.flatnonzero(by == label)[:BATCH]
            with torch.inference_mode():
                expected = small_bert(label)(torch.from_numpy(ids[mine])).last_hidden_state[:, 0].numpy()
            if not np.allclose(mixed[mine], expected, atol=1e-5):
                raise RuntimeError(f"the rows of model {label} are not what it gives")
        if np.allclose(mixed, single):
            raise RuntimeError("all models give the same")
        seconds = interleaved({"nine": many, "one": one}, rounds)
        ratios = [o / m for o, m in zip(seconds["one"], seconds["nine"], strict=True)]
        return {
            "rows": rows,
            "block": block,
            "batch": BATCH,
            "rows_per_second": {way: summary([rows / t for t in times]) for way, times in seconds.items()},
            "ratio": summary(ratios),
        }


def _first_token(output: Any, inputs: Any) -> torch.Tensor:
    tensor: torch.Tensor = output.last_hidden_state[:, 0]
    return tensor
