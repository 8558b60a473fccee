"""The talk's comparison: an MLP (64-256-128-64-1) over 100,000 rows in batches of 8, by programs that a user may write.

A loop, four threads, and spawned processes with two and four jobs per device, written from the talk's description, and
zcinfer in one process and as a job on a cluster, with the same batch and with "auto"; on each CUDA device where there
are any, else on the CPU. Each program runs
in a process of its own that has torch imported, all in turn, round after round. *Rows/s* counts from when its workers
can compute (imports done, model loaded, batch size measured) to its last row; *in all* from its first line to its last,
with the start and the end of workers. *Lines* are those of the program as it ran, without what is the clock's. *Cores
busy* is the processor time of a program and its workers while it computes, by that time; of a GPU what its driver says.
Results are compared with plain torch in batches of 8: equal bits, but for "auto", whose batches are others.

Not shown: data that is read from a disk, and models for which a batch of 8 is enough to fill a device. The batch
decides here, and not the device: a loop in larger batches is the first thing to try.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import dask
import numpy as np
import psutil
import torch
from torch import nn
from tqdm import tqdm

from zcinfer import catalog

from . import talk_programs
from .benchmark import Benchmark, Options, bar, say
from .figures import bars
from .measure import forked, summary
from .tables import Table

ROWS, BATCH = 100_000, 8
LOOP, THREADS = "a loop", "four threads"
PROCESSES = {jobs: f"processes, {jobs} jobs per device" for jobs in (2, 4)}
HERE, HERE_AUTO = "zcinfer, in one process, batches of 8", "zcinfer, in one process, auto"
JOB, JOB_AUTO = "zcinfer, a job on a cluster, batches of 8", "zcinfer, a job on a cluster, auto"
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

OURS = (HERE, HERE_AUTO, JOB, JOB_AUTO)

# The program, what it is made of (its lines are the user's), and its batch.
Program = tuple[Callable[..., Any], tuple[Callable[..., Any], ...], int | str]
PROGRAMS: dict[str, Program] = {
    LOOP: (talk_programs.loop, (talk_programs.loop, talk_programs.batches), BATCH),
    THREADS: (talk_programs.threads, (talk_programs.threads, talk_programs.batches), BATCH),
    **{
        name: (
            functools.partial(talk_programs.processes, jobs=jobs),
            (talk_programs.processes, talk_programs.work),
            BATCH,
        )
        for jobs, name in PROCESSES.items()
    },
    HERE: (talk_programs.in_process, (talk_programs.in_process,), BATCH),
    HERE_AUTO: (talk_programs.in_process, (talk_programs.in_process,), "auto"),
    JOB: (talk_programs.cluster_job, (talk_programs.cluster_job,), BATCH),
    JOB_AUTO: (talk_programs.cluster_job, (talk_programs.cluster_job,), "auto"),
}


def mlp() -> nn.Module:
    """The talk's model, from a fixed seed."""
    torch.manual_seed(0)
    sizes = (64, 256, 128, 64, 1)
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


class Clock:
    """Times and processor time of one program, and a bar with what it keeps busy, where there is a terminal."""

    def __init__(self, name: str):
        self._bar = tqdm(total=ROWS, desc=f"{name:>42}", unit=" rows", disable=None, leave=True)
        self._shown = perf_counter()
        self.begun = self._shown
        self.ready_at = self.finished_at = 0.0
        self.busy = 0.0

    def ready(self) -> None:
        """Its workers can compute."""
        self._used = used()
        self.ready_at = perf_counter()

    def done(self, rows: int) -> None:
        """Some rows more; from any thread."""
        self._bar.update(rows)
        now = perf_counter()
        if not self._bar.disable and now - self._shown > 0.5:
            self._shown = now
            self._bar.set_postfix_str(self._busy(now))

    def finished(self) -> None:
        """All rows are there."""
        self.finished_at = perf_counter()
        self.busy = (used() - self._used) / (self.finished_at - self.ready_at)
        self._bar.n = ROWS
        self._bar.set_postfix_str(self._busy(self.finished_at))
        self._bar.close()

    def _busy(self, now: float) -> str:
        cores = (used() - self._used) / (now - self.ready_at)
        gpu = gpu_utilisation()
        return f"{cores:.1f} cores busy" + (f", GPU {gpu:.0f} %" if gpu is not None else "")


def used() -> float:
    """Seconds of processors that this process and those below it have used."""
    seconds = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def gpu_utilisation() -> float | None:
    """Per cent of the first GPU, as its driver says; None where there is none, or nobody to ask."""
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):  # pynvml is not a requirement
            return float(torch.cuda.utilization())
    return None


def measure(options: Options) -> dict[str, Any]:
    """Each program in turn, in rounds."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    torch.set_num_threads(1)
    rounds = 1 if options.quick else 7
    programs = [name for name in PROGRAMS if options.wants(name)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory(prefix="zcinfer-bench-") as directory:
        x = np.random.default_rng(0).normal(size=(ROWS, 64)).astype(np.float32)
        np.save(Path(directory, "x.npy"), x)
        with torch.inference_mode():
            model = mlp()
            expected = np.concatenate([model(rows).numpy() for rows in torch.split(torch.from_numpy(x), BATCH)])
        np.save(Path(directory, "expected.npy"), expected)
        for number in range(rounds):
            for name in programs:
                say(f"round {number + 1} of {rounds}: {name}")
                found[name].append(forked(lambda name=name: once(name, Path(directory))))  # type: ignore[misc]
    results: dict[str, Any] = {
        "rows": ROWS,
        "rounds": rounds,
        "devices": torch.cuda.device_count(),
        "programs": {
            name: {
                "lines": sum(map(lines, PROGRAMS[name][1])),
                **{key: summary([one[key] for one in found[name]]) for key in found[name][0]},
            }
            for name in programs
        },
    }
    results["bars"] = compare(results)
    return results


def once(name: str, directory: Path) -> dict[str, float]:
    """Run one program, and compare what it gives."""
    program, _, batch = PROGRAMS[name]
    model = mlp()
    with (
        tempfile.TemporaryDirectory(dir=directory) as own,
        dask.config.set({"zcinfer.registry": f"{own}/registry", "distributed.admin.system-monitor.gil.enabled": False}),
    ):
        path = Path(own, "x.npy")
        path.symlink_to(directory / "x.npy")
        clock = Clock(name)
        y = program(path, model, batch, clock)
        catalog.disconnect()  # a Ray of ours ends with the program
        ended = perf_counter()
    expected = np.load(directory / "expected.npy")
    same = np.array_equal(y, expected) if batch == BATCH else np.allclose(y, expected, rtol=1e-4, atol=1e-5)
    if not same and not (torch.cuda.is_available() and np.allclose(y, expected, rtol=1e-3, atol=1e-4)):
        raise SystemExit(f"{name} gives other results: {np.abs(y - expected).max():g} apart")
    computing = clock.finished_at - clock.ready_at
    return {
        "rate": ROWS / computing,
        "computing": computing,
        "in all": ended - clock.begun,
        "busy": clock.busy,
    }


def lines(function: Callable[..., Any]) -> int:
    """Lines of a function that are the user's: not empty, not the clock's.

    Examples
    --------
    >>> lines(talk_programs.warm)
    2
    """
    found = (line.strip() for line in inspect.getsource(function).splitlines())
    return sum(1 for line in found if line and not line.startswith("#") and not line.endswith("# clock"))


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """Whether ours is beside the talk's best."""
    rate = {name: one["rate"]["median"] for name, one in results["programs"].items()}
    if set(rate) != set(PROGRAMS):
        return {}
    theirs = max(rate[name] for name in (LOOP, THREADS, *PROCESSES.values()))
    return {
        "rows/s of the best of zcinfer's, by those of the best of the talk's": bar(
            1, max(rate[name] for name in OURS) / theirs
        )
    }


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table of all programs."""
    programs = results["programs"]
    base = next(iter(programs.values()))["rate"]["median"]
    first = next(iter(programs))
    columns = {"program": "", f"times as fast as {first}": "x", "rate": "rows/s", "lines to write": "",
               "cores busy": "cores", "computing": "s", "in all": "s"}  # fmt: skip
    rows = [
        [name, one["rate"]["median"] / base, one["rate"], one["lines"], one["busy"], one["computing"], one["in all"]]
        for name, one in programs.items()
    ]
    where = f"on {results['devices']} CUDA devices" if results["devices"] else "on the CPU, as one device"
    title = f"An MLP over {results['rows']:,} rows, {where}"
    return [Table(title, columns, rows, f"{results['rounds']} rounds. In all: with the start and end of workers.")]


def figures(results: Mapping[str, Any]) -> list[Any]:
    """Rows per second, and seconds in all."""
    programs = results["programs"]
    return [
        bars("rows per second, once workers can compute", "rows/s", {n: p["rate"] for n, p in programs.items()},
             most=True),
        bars("seconds in all, with the start and end of workers", "s", {n: p["in all"] for n, p in programs.items()}),
    ]  # fmt: skip


BENCHMARK = Benchmark("talk", "The talk's comparison", __doc__, measure, tables, figures)
