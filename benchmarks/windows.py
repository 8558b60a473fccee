"""What do windows of time series cost in memory, as a specification and as a dask array of them?

Two workers, two channels, windows that overlap little (size / step 2) and much (32). *Predicted*: given to ``predict``
as they are, where tasks are fused. *Kept*: computed, and held by the workers before a model sees them, as after
``persist`` or where two computations share them; what does not fit is spilled, and then all of it is sent to the other
worker. Sums of the results are compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch
from distributed import Client, LocalCluster, wait

import zcinfer as zc

from .benchmark import Benchmark, Options
from .figures import bars
from .tables import Table

SIZE, CHUNK = 4096, 1 << 18  # samples; a chunk is 4 MiB
WAYS = ("zcinfer: a specification", "a dask array of windows")


class Energy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum((-1, -2))


def measure(options: Options) -> dict[str, Any]:
    """Both ways, predicted and kept, at both ratios of size and step."""
    chunks, ratios = (2, (32,)) if options.quick else (16, (2, 32))
    results: dict[str, Any] = {"samples": 2 * 8 * chunks * CHUNK, "cases": []}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DASK_ZCINFER__REGISTRY"] = directory  # of the workers
        with dask.config.set({"zcinfer.registry": directory}):
            zc.connect("file")
            zc.put(torch.nn.Sequential(Energy()).eval(), "energy")
            for ratio in ratios:
                found = {(way, kept): case(way, kept, ratio, chunks) for kept in (False, True) for way in WAYS}
                sums = [one["sum"] for one in found.values()]
                assert np.allclose(sums, sums[0], rtol=1e-6), f"results differ: {sums}"
                results["cases"] += found.values()
            zc.disconnect()
    return results


def case(way: str, kept: bool, ratio: int, chunks: int) -> dict[str, Any]:
    """One case, on a cluster of its own."""
    limits = {"target": 0.25, "spill": False, "pause": False, "terminate": False}
    settings = {f"distributed.worker.memory.{name}": limit for name, limit in limits.items()}
    with (
        dask.config.set(settings | {"distributed.admin.system-monitor.gil.enabled": False}),
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit="64 MiB",  # of which 16 MiB are kept, and the rest spilled
            dashboard_address="127.0.0.1:0",
            local_directory=scratch,
        ) as cluster,
        Client(cluster) as client,
    ):
        x = da.map_blocks(noise, chunks=((2,), (CHUNK,) * chunks), dtype=float, meta=np.empty((0, 0)))
        small = zc.windows(x[:, : 4 * SIZE], SIZE, SIZE)
        zc.predict("energy", small, batch_size=32).compute()  # imports, and the model
        client.run(forget_peak)
        before = client.run(peak)
        begin = perf_counter()
        w = zc.windows(x, SIZE, SIZE // ratio)
        largest = 0
        if not kept:
            rows = w if way == WAYS[0] else w.to_dask()
            total = float(zc.predict("energy", rows, batch_size=32).sum().compute())
        else:
            here, there = client.scheduler_info()["workers"]
            held = client.persist(w.segments() if way == WAYS[0] else w.to_dask(), workers=[here])
            wait(held)
            futures = client.futures_of(held)
            keys = [future.key for future in futures]
            largest = max(client.run_on_scheduler(sizes, keys))
            spec = w.spec if way == WAYS[0] else None
            pairs = zip(futures, w.blocks(), strict=True)
            sums = [client.submit(energy, f, block.first, spec, workers=[there]) for f, block in pairs]
            total = float(sum(client.gather(sums)))
        seconds = perf_counter() - begin
        after = client.run(peak)
        return {
            "way": way,
            "kept": kept,
            "ratio": ratio,
            "rows": len(w),
            "sum": total,
            "seconds": seconds,
            "largest": largest,
            "spilled": sum(client.run(spilled).values()),
            "sent": sum(client.run(received).values()),
            "peak": max(after[worker] - before[worker] for worker in after),
        }


def noise(block_id: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
    return np.random.default_rng(block_id[1]).normal(size=(2, CHUNK))


def energy(samples: np.ndarray[Any, Any], first: int, spec: Any) -> float:
    rows = samples if spec is None else spec.expand(samples, first)
    batches = (rows[start : start + 32].astype("f4") for start in range(0, len(rows), 32))
    return float(sum(float(np.square(batch).sum((-1, -2)).sum(dtype="f8")) for batch in batches))


def sizes(keys: list[Any], dask_scheduler: Any) -> list[int]:
    return [dask_scheduler.tasks[key].nbytes for key in keys]


def spilled(dask_worker: Any) -> int:
    return int(dask_worker.data.spilled_total.disk)


def received(dask_worker: Any) -> int:
    return int(sum(entry["total"] for entry in dask_worker.transfer_incoming_log))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of memory that this process has had at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table of all cases."""
    columns = {"": "", "way": "", "size / step": "", "rows": "", "largest result": "MB", "spilled": "MB", "sent": "MB",
               "peak of a worker": "MB", "time": "s"}  # fmt: skip
    rows = [
        ["kept" if one["kept"] else "predicted", one["way"], one["ratio"], one["rows"],
         one["largest"] if one["kept"] else None, one["spilled"], one["sent"], one["peak"], one["seconds"]]
        for one in results["cases"]
    ]  # fmt: skip
    return [Table(f"Windows of {results['samples'] / 1e6:,.0f} MB of samples", columns, rows)]


def figures(results: Mapping[str, Any]) -> list[Any]:
    """What is spilled, what is sent, and the peak, where windows are kept."""
    return [
        bars(f"kept windows: MB {name}", "MB",
             {f"{one['way']}, size / step {one['ratio']}": one[name] for one in results["cases"] if one["kept"]})
        for name in ("spilled", "sent", "peak")
    ]  # fmt: skip


BENCHMARK = Benchmark("windows", "Windows of time series", __doc__, measure, tables, figures)
