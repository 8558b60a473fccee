"""What does watching cost? A job with everything counted against nothing counted, and with a page open against none.

*Nothing counted*: setting ``zcinfer.telemetry`` is false in the workers, and the scheduler is without our plugin. *A
page open*: the page's program beside the cluster, and a websocket that takes all that it sends, as a browser does; it
is not drawn. The same workers do all, in another order each round, and a cost is that of one round. Blocks
of a model that does nothing show what can be seen at all; those of the talk's MLP take about 10 ms, and should be 100.
On cores that others use too, a few percent are noise: the processor time of all processes varies less, and *by its
parts* is what counting takes of a processor in loops of its own, by what a block takes in all, which varies hardly.
"""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter, thread_time
from types import SimpleNamespace
from typing import Any

import dask
import dask.array as da
import numpy as np
import psutil
import torch
from distributed import Client
from torch import nn

import zcinfer as zc
from zcinfer import telemetry
from zcinfer.observer import NAME, Observer
from zcinfer.telemetry import PHASES

from .benchmark import Benchmark, Options, bar, say
from .figures import bars as plot
from .measure import summary
from .tables import Table

OFF, ON, PAGE = "nothing counted", "counted", "counted, a page open"
# Percent that counting, and a page that is open, may cost
COUNTING, WATCHING = 1.0, 2.0


@dataclass(frozen=True)
class Case:
    """A job that is run again and again.

    Attributes
    ----------
    name : str
    model : callable
        Makes it.
    blocks, rows, width, batch : int
        Blocks, rows of each, values of a row, rows of a batch.
    rounds : int
        Times that all ways are run.
    ways : tuple of str
        Of `OFF`, `ON` and `PAGE`.
    """

    name: str
    model: Callable[[], nn.Module]
    blocks: int
    rows: int
    width: int
    batch: int
    rounds: int
    ways: tuple[str, ...] = (OFF, ON)


class Nothing(nn.Module):
    """Gives what it gets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Nowhere:
    """Where results go that nobody wants."""

    def __setitem__(self, index: Any, block: Any) -> None:
        pass


def mlp() -> nn.Module:
    """The talk's."""
    torch.manual_seed(0)
    sizes = (64, 256, 128, 64)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 1)).eval()


def cases(quick: bool) -> list[Case]:
    """Jobs that are measured."""
    if quick:  # too short for a page
        return [
            Case("empty blocks", lambda: Nothing().eval(), 200, 8, 4, 8, rounds=2),
            Case("MLP", mlp, 40, 5_120, 64, 1_024, rounds=2),
        ]
    return [
        Case("empty blocks", lambda: Nothing().eval(), 5_000, 8, 4, 8, rounds=6),
        Case("MLP", mlp, 10_000, 5_120, 64, 1_024, rounds=3, ways=(OFF, ON, PAGE)),
    ]


def measure(options: Options) -> dict[str, Any]:
    """All jobs, on one cluster that stays up."""
    parts = alone(200, 3) if options.quick else alone(5_000, 9)
    results: dict[str, Any] = {"cases": {}, "alone": parts}
    with (
        tempfile.TemporaryDirectory() as directory,
        dask.config.set({"zcinfer.registry": directory}),
        zc.LocalCluster(dashboard=False) as cluster,
        cluster.get_client() as client,
    ):
        zc.connect("file")
        for case in cases(options.quick):
            if options.wants(case.name):
                say(f"{case.name}: {case.rounds} rounds of {len(case.ways)} x {case.blocks:,} blocks")
                results["cases"][case.name] = compare(client, case)
        zc.disconnect()
    results["bars"] = bars(results)
    return results


def compare(client: Client, case: Case) -> dict[str, Any]:
    """One job in all ways, in turn; each run is checked to have been what it is taken for."""
    zc.put(case.model(), "watched")
    x = da.ones((case.blocks * case.rows, case.width), chunks=(case.rows, case.width), dtype=np.float32)
    y = zc.predict("watched", x, batch_size=case.batch)
    with torch.inference_mode():
        expected = case.model()(torch.ones((case.batch, case.width))).numpy()
    if not np.allclose(y[: case.rows].compute(), expected[:1], atol=1e-5):
        raise SystemExit(f"{case.name}: other results than torch's")
    processes = [psutil.Process(pid) for pid in {*client.run(_pid).values(), client.run_on_scheduler(_pid)}]
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    used: dict[str, list[float]] = {way: [] for way in case.ways}
    pages: list[float] = []
    order, shuffled = list(case.ways), random.Random(0)
    for number in range(case.rounds + 1):
        shuffled.shuffle(order)
        for way in order:
            client.run(set_counting, way != OFF)
            client.run_on_scheduler(set_following, way != OFF)
            before = counted(client)
            opened: AbstractContextManager[list[psutil.Process]] = (
                page(client.scheduler.address) if way == PAGE else nullcontext([])
            )
            with opened as served:
                cpu, begin, drawn = _used(processes), perf_counter(), _used(served)
                da.store(y, Nowhere(), lock=False)
                took = perf_counter() - begin
                spent, drawn = _used(processes) - cpu, _used(served) - drawn
            if number:  # the first is to warm up
                seconds[way].append(took)
                used[way].append(spent)
                pages += [drawn / took] if way == PAGE else []
            check(case, way, before, counted(client))
    client.run(set_counting, True)
    client.run_on_scheduler(set_following, True)
    return {
        "rounds": case.rounds,
        "blocks": case.blocks,
        "rows": case.rows,
        "seconds": {way: summary(found) for way, found in seconds.items()},
        "cores": {way: summary(found) for way, found in used.items()},
        "page": summary(pages) if pages else None,
        "costs": {
            f"{what}, {name}": summary([100 * (a / b - 1) for a, b in zip(found[way], found[base], strict=True)])
            for what, way, base in (("counting", ON, OFF), ("a page", PAGE, ON))
            if way in case.ways
            for name, found in (("time", seconds), ("processor time", used))
        },
    }


def counted(client: Client) -> tuple[int, int]:
    """Rows that workers have counted, and jobs that the scheduler has followed."""
    rows = sum(work["rows"] for found in client.run(telemetry.snapshot).values() for work in found["work"])
    jobs = client.sync(client.scheduler.zcinfer_snapshot)["jobs"]
    return rows, max((job["number"] for job in jobs), default=0)


def check(case: Case, way: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    """Refuse a run of which more, or less, was counted than ought to be."""
    rows, jobs = (now - then for now, then in zip(after, before, strict=True))
    if (rows, jobs) != ((0, 0) if way == OFF else (case.blocks * case.rows, 1)):
        raise SystemExit(f"{case.name}, {way}: {rows:,} rows and {jobs} jobs were counted")


def set_counting(on: bool) -> None:
    """Have a worker count, or not."""
    dask.config.set({"zcinfer.telemetry": on})


def set_following(on: bool, dask_scheduler: Any) -> None:
    """Have the scheduler follow jobs, or not."""
    plugin = dask_scheduler.plugins.pop(NAME, None) or dask_scheduler.zcinfer_plugin
    assert isinstance(plugin, Observer)
    dask_scheduler.zcinfer_plugin = plugin
    if on:
        dask_scheduler.plugins[NAME] = plugin
        if not plugin._clock.is_running():
            plugin._clock.start()
    else:
        plugin._clock.stop()


def _pid() -> int:
    return psutil.Process().pid


def _used(processes: list[psutil.Process]) -> float:
    return float(sum(times.user + times.system for times in (process.cpu_times() for process in processes)))


def alone(many: int, rounds: int) -> dict[str, Any]:
    """Seconds of a processor that watching takes of one block, each part by itself in a loop: what noise hides."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory, dask.config.set({"zcinfer.registry": directory}):
        zc.connect("file")
        zc.put(Nothing().eval(), "watched")
        x = da.ones((many * 8, 4), chunks=(8, 4), dtype=np.float32)
        stored = da.store(zc.predict("watched", x, batch_size=8), Nowhere(), lock=False, compute=False)
        graph = dict(dask.optimize(stored)[0].__dask_graph__())
        zc.disconnect()
    for _ in range(rounds):
        for way in (ON, OFF):
            with dask.config.set({"zcinfer.telemetry": way == ON}):
                found.setdefault(f"in the worker, {way}", []).append(_seconds(_count, many) / many)
        scheduler = _Scheduler(graph)
        observer = Observer()
        observer.scheduler = scheduler
        begun = _seconds(partial(_begin, observer, scheduler), 1)
        found.setdefault("in the scheduler, when the job begins", []).append(begun / many)
        moved = _seconds(partial(_move, observer, scheduler), 1)
        found.setdefault("in the scheduler, while it runs", []).append(moved / many)
        (job,) = observer.told()["jobs"]
        assert (job["state"], job["done"]) == ("finished", many)
    return {part: summary(values) for part, values in found.items()}


class _Scheduler:
    """Tasks of a graph, as an `Observer` sees them."""

    def __init__(self, graph: Mapping[Any, Any]):
        self.tasks = {
            key: SimpleNamespace(run_spec=task, state="released", waiters=(), who_wants=())
            for key, task in graph.items()
        }
        self.workers: dict[str, Any] = {}


_STATES = ("released", "waiting", "processing", "memory", "released", "forgotten")


def _begin(observer: Observer, scheduler: _Scheduler) -> None:
    observer.update_graph(scheduler, tasks=list(scheduler.tasks))


def _move(observer: Observer, scheduler: _Scheduler) -> None:
    for key in scheduler.tasks:
        for before, after in pairwise(_STATES):
            observer.transition(key, before, after)


def _count() -> None:
    """As a block of five batches is counted."""
    with telemetry.block(telemetry.Job("alone", "alone"), "m@1", "block 0", 1, 1, 1) as clock:
        for _ in range(5):
            for phase in range(len(PHASES)):
                clock.lap(phase)


def _seconds(function: Callable[[], object], times: int) -> float:
    begin = thread_time()
    for _ in range(times):
        function()
    return thread_time() - begin


def watching(results: Mapping[str, Any]) -> float:
    """Seconds of a processor that watching takes of one block, all parts together."""
    return float(sum((-1 if part.endswith(OFF) else 1) * one["median"] for part, one in results["alone"].items()))


@contextmanager
def page(address: str) -> Iterator[list[psutil.Process]]:
    """The page's program, and somebody who looks; yields the first."""
    with _program("-m", "zcinfer", "dashboard", address, "--port", "0") as (served, said):
        link = said.removeprefix("dashboard ").strip()
        with _program("-m", "zcinfer.benchmarks.telemetry", link) as (viewer, _):
            yield [psutil.Process(served.pid)]
            if served.poll() is not None or viewer.poll() is not None:
                raise SystemExit("the page, or who looked at it, has ended before the job")


@contextmanager
def _program(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that has said its first line."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise SystemExit(f"{arguments[1]} did not start")
            yield process, said
        finally:
            process.terminate()


async def look(link: str) -> None:
    """Take what a page is sent, until the end."""
    from tornado.httpclient import AsyncHTTPClient, HTTPRequest
    from tornado.websocket import websocket_connect

    html = (await AsyncHTTPClient().fetch(link)).body.decode()
    found = re.search(r'"token":\s*"([^"]+)"', html)
    assert found is not None
    request = HTTPRequest(link.replace("http", "ws", 1) + "ws")
    socket = await websocket_connect(request, subprotocols=["bokeh", found[1]])
    for _ in range(3):  # what a page is sent when it opens, and what is new
        assert await socket.read_message() is not None
    print("open", flush=True)
    while await socket.read_message() is not None:
        pass


def bars(results: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked: of the time, and of the processors by the parts that were measured by themselves."""
    found = {}
    for case, one in results["cases"].items():
        per_block = one["cores"][OFF]["median"] / one["blocks"]
        found[f"{case}: counting, by its parts, costs percent"] = bar(
            COUNTING, 100 * watching(results) / per_block, most=True
        )
        for what, cost in one["costs"].items():
            if not what.endswith("processor time"):
                asked = COUNTING if what.startswith("counting") else WATCHING
                # Of two times that hardly differ: no ratio that another run must come near
                found[f"{case}: {what}, costs percent"] = bar(asked, cost["median"], most=True, unit="%")
    return found


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Jobs, costs, and the counting of a block."""
    jobs = [
        [f"{case}, {way}", found["blocks"], one, found["blocks"] * found["rows"] / one["median"], found["cores"][way]]
        for case, found in results["cases"].items()
        for way, one in found["seconds"].items()
    ]
    costs = [
        [f"{case}: {what}", f"{cost['median']:+.1f} ({cost['low']:+.1f} to {cost['high']:+.1f})"]
        for case, found in results["cases"].items()
        for what, cost in found["costs"].items()
    ]
    parts = [[part, one] for part, one in results["alone"].items()]
    pages = [
        [f"{case}: the page's program takes of a core", f"{100 * found['page']['median']:.1f}"]
        for case, found in results["cases"].items()
        if found["page"] is not None
    ]
    return [
        Table("Jobs", {"job": "", "blocks": "n", "time": "s", "speed": "rows/s", "processors": "s"}, jobs),
        Table("What it costs, percent: the median of the rounds, and quartiles", {"": "", "cost": ""}, [*costs, *pages],
              ", ".join(f"{case}: {found['rounds']} rounds" for case, found in results["cases"].items())),
        Table("What a block takes of a processor to be counted, of five batches", {"": "", "time": "µs"}, parts),
    ]  # fmt: skip


def figures(results: Mapping[str, Any]) -> list[Any]:
    """Seconds of each job."""
    return [plot(f"{case}: seconds", "s", found["seconds"]) for case, found in results["cases"].items()]


BENCHMARK = Benchmark("telemetry", "What watching costs", __doc__, measure, tables, figures)

if __name__ == "__main__":
    asyncio.run(look(sys.argv[1]))
