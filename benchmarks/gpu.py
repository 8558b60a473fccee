"""What a GPU gives, and how near its limits that is: the talk's MLP by batch, jobs and engine, and larger models.

The MLP (64-256-128-64-1) over 10^5 and 10^7 rows that lie in memory, by processes that were started before, have the
model on the device and have done a block: each setting runs until its rows are done, or for some seconds. Beside it the
talk's own ways: a loop, four threads, and processes. Limits are measured in the same run: copies of pinned memory,
matrix products, launches of a kernel that does next to nothing, and the same module on rows that are on the device.
Encoders of the size of BERT-base and a ResNet-50, with random weights, against a loop over one CUDA graph written by
hand; their loads; and windows of strain. Every setting's first block is compared with torch on the CPU.

Not shown: blocks that are read from a disk, Dask's own share, and several cards. MPS is used if its daemon runs, which
the first table says: for with and without, run it twice.

    python -m zcinfer.benchmarks.gpu --quick      where bokeh and rich are not installed; writes gpu.json and gpu.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import zcinfer as zc
from zcinfer.mps import mps

from .benchmark import Benchmark, Options, all_tables, bar, say
from .figures import bars
from .gpu_jobs import LOOP, OURS, THREADS, Processes
from .tables import Table
from .workloads import mlp

MODELS = {"BERT-base": "rows/s", "ResNet-50": "images/s"}
PROCESSES = "processes"
ROW_BYTES = 64 * 4


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes
    ----------
    rows, batches, jobs : tuple
        Of the MLP.
    engines : tuple of str
    seconds : float
        That one setting may take.
    rounds : int
    model_batches : tuple of int
    copied, side, launches : int
        Of the limits (`gpu_parts.limits`).
    strain : float
        Seconds of data.
    small : bool
        Models of next to no size.
    """

    rows: tuple[int, ...] = (100_000, 10_000_000)
    batches: tuple[int | str, ...] = (8, 64, 512, 4096, "auto")
    jobs: tuple[int, ...] = (1, 2, 4, 8)
    engines: tuple[str, ...] = ("eager", "graph")
    seconds: float = 3.0
    rounds: int = 7
    model_batches: tuple[int, ...] = (8, 32, 128)
    copied: int = 1 << 29
    side: int = 8192
    launches: int = 2000
    strain: float = 4096.0
    small: bool = False


WHOLE = Scale()
QUICK = Scale(batches=(8, 512, "auto"), jobs=(1, 4), seconds=1.0, rounds=3, model_batches=(32, 128), strain=1024.0)
# To see on the CPU that it works: no figure of it says anything
SMALLEST = Scale((2000,), (8, "auto"), (1,), ("eager",), 0.1, 1, (2,), 1 << 16, 16, 10, 8.0, True)


def measure(options: Options) -> dict[str, Any]:
    """On the GPU of this process."""
    return measure_on("cuda", QUICK if options.quick else WHOLE, options)


def measure_on(device: str, scale: Scale, options: Options) -> dict[str, Any]:
    """All parts that are asked for, on that device."""
    results: dict[str, Any] = {"device": device, "card": "", "mps": "", "absent": {}, "models": {}, "loads": {}}
    if device == "cuda":
        results |= {"card": torch.cuda.get_device_name(), "mps": mps()}
    with tempfile.TemporaryDirectory(prefix="zcinfer-bench-") as folder:
        directory = Path(folder)
        _prepare(directory, max(scale.rows))
        with (
            Processes(max(scale.jobs), device, directory) as processes,
            Processes(2, device, directory, DASK_ZCINFER__GPU__SHARE="true") as sharing,
        ):
            say("limits")
            sizes = {"copied": scale.copied, "side": scale.side, "launches": scale.launches}
            (results["limits"],) = processes.ask([0], "part", part="limits", **sizes)
            if options.wants("MLP"):
                results |= _mlp(processes, scale)
            for name in filter(options.wants, MODELS):
                _model(processes, sharing, scale, name, results)
            if options.wants("strain"):
                say("windows of strain")
                asked = {"seconds": scale.strain, "rounds": scale.rounds}
                (results["strain"],) = processes.ask([0], "part", part="strain", **asked)
    results["bars"] = compare(results)
    return results


def _prepare(directory: Path, rows: int) -> None:
    """Write the rows, the model as a file and published, and what the first rows give."""
    x = np.lib.format.open_memmap(directory / "x.npy", mode="w+", dtype=np.float32, shape=(rows, 64))
    random = np.random.default_rng(0)
    for start in range(0, rows, 1 << 18):
        random.random(dtype=np.float32, out=x[start : start + (1 << 18)])
    model = mlp()
    torch.save(model, directory / "model.pt")
    with torch.inference_mode():
        np.save(directory / "expected.npy", model(torch.from_numpy(np.array(x[: 1 << 17]))).numpy())
    zc.connect(f"file:{directory / 'registry'}")
    zc.put(model, "mlp")
    zc.disconnect()


def _mlp(processes: Processes, scale: Scale) -> dict[str, Any]:
    sizes = [batch for batch in scale.batches if isinstance(batch, int)] + ([] if scale.small else [1 << 15, 1 << 18])
    (resident,) = processes.ask([0], "part", part="resident", rows=sizes, most=scale.launches)
    found: dict[str, Any] = {"resident": resident, "mlp": []}
    first = int(scale.batches[0])
    settings = [(LOOP, 1, first, "eager"), (THREADS, 1, first, "eager")]
    settings += [(LOOP, jobs, first, "eager") for jobs in scale.jobs if jobs > 1]
    settings += [(OURS, j, b, e) for b in scale.batches for j in scale.jobs for e in scale.engines]  # type: ignore[misc]
    for rows in scale.rows:
        jobs_before = 0
        for way, jobs, batch, engine in sorted(settings, key=lambda setting: setting[1]):
            if jobs != jobs_before:
                jobs_before = jobs
                each = [{"number": number} for number in range(jobs)]
                processes.ask(range(jobs), "rows", each, of=jobs, rows=rows)
            told = processes.rate(jobs, way, batch, engine, scale.seconds)
            name = f"{PROCESSES}, {jobs} jobs" if way == LOOP and jobs > 1 else way
            setting = {"way": name, "rows": rows, "jobs": jobs, "asked": batch, "engine": engine}
            found["mlp"].append(setting | told)
            say(f"MLP, {rows:,} rows, {name}, {jobs} jobs, batch {batch}, {engine}: {told['rate']:,.0f} rows/s")
    return found


def _model(processes: Processes, sharing: Processes, scale: Scale, name: str, results: dict[str, Any]) -> None:
    say(f"{name}: loads")
    (nbytes,) = processes.ask([0], "part", part="publish", name=name, small=scale.small)
    (loads,) = processes.ask([0], "part", part="cuda_loads", name=name, rounds=scale.rounds)
    sharing.ask([0], "part", part="hold", name=name)
    (second,) = sharing.ask([1], "part", part="second_load", name=name)
    results["loads"][name] = {"nbytes": nbytes, "ways": loads, "second": second}
    results["models"][name] = {}
    for batch in scale.model_batches:
        say(f"{name}: batches of {batch}")
        asked = {"name": name, "small": scale.small, "batch": batch, "batches": 8, "rounds": scale.rounds}
        (results["models"][name][str(batch)],) = processes.ask([0], "part", part="model_rates", **asked)


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked of the card, where it was measured."""
    found: dict[str, Any] = {}
    settings = results.get("mlp", [])
    if settings:
        most = max(one["rows"] for one in settings)
        auto = [
            one["rate"] for one in settings if one["way"] == OURS and one["asked"] == "auto" and one["rows"] == most
        ]
        limit = min(results["limits"]["pinned copy in"] / ROW_BYTES, max(results["resident"].values()))
        found["MLP, auto: rows/s by the lower of two limits"] = bar(0.7, max(auto) / limit)
        small = [one for one in settings if one["asked"] == min(o["asked"] for o in settings if o["asked"] != "auto")]
        loop = max(one["rate"] for one in small if one["way"] == LOOP)
        ours = max(one["rate"] for one in small if one["way"] == OURS)
        found["MLP, smallest batch: rows/s by those of the loop"] = bar(10, ours / loop)
    for name, batches in results["models"].items():
        best = max(batches.values(), key=lambda ways: ways["by hand"]["median"])
        ours = max(ways[way]["median"] for ways in batches.values() for way in ways if way != "by hand")
        found[f"{name}, best batch: by a loop over one graph"] = bar(0.95, ours / best["by hand"]["median"])
    for name, loads in results["loads"].items():
        ways, second = {way: one["median"] for way, one in loads["ways"].items()}, loads["second"]
        ours, theirs = ways["zcinfer, first job"], ways["model.cuda() from pageable memory"]
        copy = ways["pinned copy of as many bytes"]
        found[f"{name}: a load by a pinned copy"] = bar(1.3, ours / copy, most=True)
        found[f"{name}: model.cuda() by a load"] = bar(5, theirs / ours)
        found[f"{name}: ms of the second job's load"] = bar(5, second["seconds"] * 1e3, most=True, unit="ms")
        found[f"{name}: percent more memory of the second job"] = bar(
            1, 100 * second["bytes"] / loads["nbytes"], most=True, unit="%"
        )
    return found


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Limits, the grid, models, loads, strain."""
    limits = [[name, value] for name, value in results["limits"].items()]
    told = ", ".join(filter(None, [results["card"] or "the CPU", results["mps"]]))
    found = [Table("Limits", {"": "", "a second": "bytes, operations or kernels"}, limits, told)]
    if "mlp" in results:
        resident = [[f"batch {batch}", rate] for batch, rate in results["resident"].items()]
        found.append(Table("The talk's MLP on rows that are on the device", {"": "", "speed": "rows/s"}, resident))
        columns = {"way": "", "rows": "", "jobs": "", "batch": "", "engine": "", "speed": "rows/s"}
        grid = [
            [one["way"], one["rows"], one["jobs"], f"auto: {one['batch']}" if one["asked"] == "auto" else one["batch"],
             one["engine"], one["rate"]]
            for one in results["mlp"]
        ]  # fmt: skip
        found.append(Table("The talk's MLP", columns, grid, "Engines are ours; the other ways have none."))
    for name, batches in results["models"].items():
        columns = {"way": "", "batch": "", "speed": MODELS[name]}
        rows = [[way, int(batch), rate] for batch, ways in batches.items() for way, rate in ways.items()]
        found.append(Table(f"{name}, of random weights", columns, rows))
    for name, loads in results["loads"].items():
        rows = [[way, one, None] for way, one in loads["ways"].items()]
        second = loads["second"]
        rows.append(["zcinfer, second job", second["seconds"], second["bytes"]])
        columns = {"way": "", "time": "ms", "more memory of the device": "MB"}
        found.append(Table(f"{name} to the device, {loads['nbytes'] / 1e6:,.0f} MB", columns, rows))
    if "strain" in results:
        columns = {"": "", "data": "s a second"}
        found.append(Table("Windows of strain", columns, [["two detectors, 4096 Hz", results["strain"]]]))
    return found


def figures(results: Mapping[str, Any]) -> list[Any]:
    """The grid at its most rows, and the models."""
    found = []
    settings = results.get("mlp", [])
    if settings:
        most = max(one["rows"] for one in settings)
        named = {
            f"{one['way']}, {one['jobs']} jobs, batch {one['asked']}, {one['engine']}": one["rate"]
            for one in settings
            if one["rows"] == most
        }
        found.append(bars(f"the talk's MLP, {most:,} rows", "rows/s", named, most=True))
    for name, batches in results["models"].items():
        named = {f"{way}, batch {batch}": rate for batch, ways in batches.items() for way, rate in ways.items()}
        found.append(bars(name, MODELS[name], named, most=True))
    return found


BENCHMARK = Benchmark("gpu", "On a GPU", __doc__, measure, tables, figures)


def main() -> None:
    """Measure, and write JSON and Markdown, with nothing but what is measured."""
    from .machine import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer settings, in less than 8 minutes")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="MLP, BERT, ResNet or strain")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cpu", action="store_true", help="next to nothing, on the CPU, to see that it works")
    asked = parser.parse_args()
    options = Options(asked.quick, asked.out, tuple(asked.only))
    if not asked.cpu and not torch.cuda.is_available():
        sys.exit(f"it needs a GPU, and torch {torch.__version__} finds none; --cpu shows that it works")
    begin = perf_counter()
    found = measure_on("cpu", SMALLEST, options) if asked.cpu else measure(options)
    results = {"on": machine(), "quick": options.quick} | found | {"took": perf_counter() - begin}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(results, indent=1))
    parts = [
        f"### {table.title}\n\n{table.markdown()}\n\n{table.note}".rstrip() for table in all_tables(BENCHMARK, results)
    ]
    text = "\n\n".join(parts) + "\n"
    (options.out / "gpu.md").write_text(text)
    print(text)
    say(f"took {results['took']:.0f} s; written: {options.out / 'gpu.json'} and gpu.md")


if __name__ == "__main__":
    main()
