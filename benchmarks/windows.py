"""What do windows of time series cost in memory, as a specification and as a dask array of them?

Two workers, two channels, windows that overlap little (size / step 2) and much (32). *Predicted*: given to ``predict``
as they are, where tasks are fused. *Kept*: computed, and held by the workers before a model sees them, as after
``persist`` or where two computations share them; what does not fit is spilled, and then all of it is sent to the other
worker. Sums of the results are compared.
"""

from __future__ import annotations

import argparse
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
from benchmarks.measure import bars, machine, table, write

SIZE, CHUNK = 4096, 1 << 18  # samples; a chunk is 4 MiB
WAYS = ("zcinfer: a specification", "a dask array of windows")


class Energy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum((-1, -2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    chunks = 4 if arguments.quick else 16
    results: dict[str, Any] = machine() | {"samples": 2 * 8 * chunks * CHUNK, "cases": []}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DASK_ZCINFER__REGISTRY"] = directory  # of the workers
        with dask.config.set({"zcinfer.registry": directory}):
            zc.connect("file")
            zc.put(torch.nn.Sequential(Energy()).eval(), "energy")
            for ratio in (2, 32):
                found = {(way, kept): measure(way, kept, ratio, chunks) for kept in (False, True) for way in WAYS}
                sums = [case["sum"] for case in found.values()]
                assert np.allclose(sums, sums[0], rtol=1e-6), f"results differ: {sums}"
                results["cases"] += found.values()
            zc.disconnect()
    text = report(results)
    write(arguments.out, "windows", results, text, figures(results))
    print(text)


def measure(way: str, kept: bool, ratio: int, chunks: int) -> dict[str, Any]:
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
            dashboard_address=None,
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


def report(results: Mapping[str, Any]) -> str:
    head = f"{results['when']}, {results['machine']}, {results['samples'] / 1e6:,.0f} MB of samples, MB and seconds"
    rows = [["", "way", "size / step", "rows", "largest result", "spilled", "sent", "peak of a worker", "seconds"]]
    for case in results["cases"]:
        kept = case["kept"]
        rows.append(
            [
                "kept" if kept else "predicted",
                case["way"],
                str(case["ratio"]),
                f"{case['rows']:,}",
                f"{case['largest'] / 1e6:,.1f}" if kept else "–",
                *(f"{case[name] / 1e6:,.1f}" for name in ("spilled", "sent", "peak")),
                f"{case['seconds']:.1f}",
            ]
        )
    return f"# Windows\n\n{head}\n\n{__doc__.partition(chr(10))[2].strip()}\n\n{table(rows)}\n"


def figures(results: Mapping[str, Any]) -> list[Any]:
    found = []
    for name in ("spilled", "sent", "peak"):
        values = {
            f"{case['way']}, size / step {case['ratio']}": dict.fromkeys(("median", "low", "high"), case[name] / 1e6)
            for case in results["cases"]
            if case["kept"]
        }
        found.append(bars(f"kept windows: MB {name}", "MB", values))
    return found


if __name__ == "__main__":
    main()
