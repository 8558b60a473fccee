"""How many rows a second, beside plain torch and other frameworks, and what is paid besides?

Every run is a fresh process that starts all that it needs, reads its inputs from memory maps in ``.npy`` files (which
are in the page cache), and writes its results to one. All systems run in turn, in another order each round.

*Steady* counts rows from when every worker had finished its first block until the last block. *First result* and *in
all* count from the start of the first process, imports and the end of all processes included; models lie on disk in
each system's own form before. Memory is that of all processes together, at its highest: *private*, that of the
*workers* alone (which finished blocks), and *proportional*, in which the inputs count too where they are mapped.
*Processor seconds* are those of all processes.

The machine must do nothing else. 4 GB of inputs go to TMPDIR for a while.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .benchmark import Benchmark, Options, say
from .comparison import bars_of, figures, tables
from .runs import Outcome, run
from .systems import LIMIT, ONE_PROCESS, OURS, RAY_DATA, SYSTEMS
from .workloads import WORKLOADS

SLEEP = "sleep"
# Systems that sleep: the limit, ours, and whose figures were published.
SLEEPERS = (LIMIT, RAY_DATA, OURS)
# Workloads and systems of a quick run, and those of it that sleep
QUICK, QUICK_SYSTEMS, QUICK_SLEEPERS = ("MLP", SLEEP), (LIMIT, RAY_DATA, OURS), (LIMIT, OURS)
# Seconds that a block should take, at least so many of them for each process, and seconds that a run may take.
BLOCK_SECONDS, BLOCKS_EACH, TIMEOUT = 0.25, 10, 180.0
# Share by which the rates of batches differ from one try to the next.
NOISE = 0.05


def measure(options: Options) -> dict[str, Any]:
    """Every workload that is asked for, then what zcinfer costs by itself."""
    with tempfile.TemporaryDirectory(prefix="zcinfer-throughput-") as directory:
        bench = Bench(Path(directory), options.quick)
        names = [name for name in (QUICK if options.quick and not options.only else WORKLOADS) if options.wants(name)]
        results: dict[str, Any] = {
            "cores": bench.cores,
            "workloads": {},
            "overhead": bench.overhead(options.wants),
            "absent": bench.absent,
        }
        for name in names:
            systems: tuple[str, ...]
            if name == SLEEP:
                systems = QUICK_SLEEPERS if options.quick else SLEEPERS
            else:
                systems = QUICK_SYSTEMS if options.quick else tuple(SYSTEMS)
            results["workloads"][name] = bench.workload(name, systems)
    return results | {"bars": bars_of(results)}


class Bench:
    """All measurements, in one directory.

    Parameters
    ----------
    directory : path
        Of inputs, results and a registry of its own.
    quick : bool
        Few rows.
    """

    def __init__(self, directory: Path, quick: bool):

        self.directory, self.quick, self.rounds = directory, quick, 1 if quick else 3
        self.absent: dict[str, str] = {}  # what was not done, and why
        self.cores = len(os.sched_getaffinity(0))
        self.env = {"DASK_ZCINFER__REGISTRY": str(directory / "registry"), "RAY_USAGE_STATS_ENABLED": "0"}

    def workload(self, name: str, systems: Sequence[str], asked_rows: int | None = None) -> dict[str, Any]:
        """These systems at one workload, of its own number of rows unless another is asked for."""
        work, place = WORKLOADS[name], self.directory / name
        place.mkdir()
        rows = work.quick_rows if self.quick else work.rows
        if name == SLEEP:
            rows = rows // 2 * self.cores  # as much for each process as the published figures are for one
        elif asked_rows:
            rows = asked_rows
        say(f"{name}: {rows:,} {work.unit}")
        made = self._result("zcinfer.benchmarks.workloads:prepare", name=name, directory=str(place), rows=rows)
        self.task: dict[str, Any] = {
            "workload": name, "directory": str(place), "output": "", "records": "", "rows": rows,
            "block": work.batches[0], "batch": work.batches[0], "processes": self.cores,
        }  # fmt: skip
        if name == SLEEP:
            sizes: dict[str, Any] = {"block": work.batches[0], "batch": work.batches[0]}
            chosen = dict.fromkeys(systems, sizes | {"framework_batch": work.batches[0], "warm": True})
            rates = None
        else:
            rates = self._result("zcinfer.benchmarks.systems:rates", task=self.task)
            chosen = self.chosen(rates, rows, systems)
        found: dict[str, Any] = {
            "rows": rows, "unit": work.unit, **made, "rates": rates, "systems": {}, "chosen": chosen,
        }  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        order, shuffled = list(systems), random.Random(0)
        for number in range(self.rounds):
            shuffled.shuffle(order)
            for system in order:
                runs[system].append(self.once(system, chosen[system], number))
                say(f"  {number + 1}/{self.rounds} {system}: {told(runs[system][-1])}")
        self.check(runs)
        found["systems"] = {system: {"runs": all_of} for system, all_of in runs.items()}
        shutil.rmtree(place)
        return found

    def chosen(self, rates: Mapping[str, Mapping[str, float]], rows: int, systems: Sequence[str]) -> dict[str, Any]:
        """Batch, block and threads of each system, from what plain torch does with each batch."""
        best = {way: largest_good(found) for way, found in rates.items()}
        all_cores = f"{self.cores} x 1"
        batch = int(best[all_cores])
        each = rates[all_cores][str(batch)] / self.cores
        most = max(1, rows // (self.cores * BLOCKS_EACH * batch))
        block = batch * max(1, min(most, round(BLOCK_SECONDS * each / batch)))
        sizes = {"block": block, "batch": batch, "threads": 1}
        one, many = "1 x 1", f"1 x {self.cores}"
        way = many if rates[many][best[many]] > rates[one][best[one]] else one
        alone = {"block": block, "batch": int(best[way]), "threads": self.cores if way == many else 1}
        chosen = {system: dict(alone if system in ONE_PROCESS else sizes) for system in systems}
        if RAY_DATA in systems:
            chosen[RAY_DATA] |= {"framework_batch": block}
            tried = {}
            candidates = {block} if self.quick else {batch, max(batch, block // 4 // batch * batch), block}
            for rows_given in sorted(candidates) if len(candidates) > 1 else ():
                asked = chosen[RAY_DATA] | {"framework_batch": rows_given, "rows": min(rows, 16 * block)}
                tried[rows_given] = self.once(RAY_DATA, asked, 0)
                say(f"  Ray Data by {rows_given:,}: {told(tried[rows_given])}")
            good = {given: outcome["steady"] for given, outcome in tried.items() if not outcome["error"]}
            if good:
                chosen[RAY_DATA]["framework_batch"] = max(good, key=lambda given: good[given])
        return chosen

    def once(self, system: str, sizes: Mapping[str, Any], number: int) -> dict[str, Any]:
        """One run of one system, in figures; its result stays for `check`."""
        task = self.task | dict(sizes)
        work = WORKLOADS[task["workload"]]
        records, output = (
            self.directory / "records",
            Path(task["directory"], f"{number}-{list(SYSTEMS).index(system)}.npy"),
        )
        records.mkdir()
        written = np.lib.format.open_memmap(output, mode="w+", dtype=np.float32, shape=(task["rows"], work.width))
        written[:] = np.nan
        written.flush()
        task |= {"output": str(output), "records": str(records)}
        outcome = run("zcinfer.benchmarks.systems:perform", {"system": system, "task": task}, TIMEOUT, self.env)
        figures = read(outcome, records, task["rows"])
        shutil.rmtree(records)
        return figures | {"output": str(output)}

    def check(self, runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Compare all results with plain torch's; those that differ are errors."""
        whole = [outcome for outcome in runs.get(LIMIT, ()) if not outcome["error"]]
        expected = np.load(whole[0]["output"]) if whole else None
        for outcomes in runs.values():
            for outcome in outcomes:
                found = np.load(outcome.pop("output"))
                if expected is None or outcome["error"]:
                    continue
                outcome["equal"] = bool(np.array_equal(found, expected))
                if not np.allclose(found, expected, rtol=1e-4, atol=1e-5):
                    outcome["error"] = f"its result differs, by {np.abs(found - expected).max():.1e} at most"

    def overhead(self, wants: Callable[[str], bool]) -> dict[str, Any]:
        """What ours costs by block, by graph, by change of model: of these, what is asked for."""
        found = {}
        for name, whole, quick in (
            ("per_block", {"blocks": 2000, "rounds": 3}, {"blocks": 200, "rounds": 1}),
            ("many_blocks", {"blocks": 20_000}, None),
            (
                "switching",
                {"rows": 9 * 1536, "block": 9 * 256, "rounds": 3},
                {"rows": 9 * 64, "block": 9 * 32, "rounds": 1},
            ),
        ):
            arguments = quick if self.quick else whole
            if arguments is None or not wants(name):
                continue
            say(name.replace("_", " "))
            outcome = run(f"zcinfer.benchmarks.overhead:{name}", arguments, TIMEOUT, self.env)
            if outcome.error:
                self.absent[name.replace("_", " ")] = outcome.error.splitlines()[0]
            else:
                found[name] = outcome.result
        return found

    def _result(self, function: str, **arguments: Any) -> Any:
        outcome = run(function, arguments, TIMEOUT, self.env)
        if outcome.error:
            raise SystemExit(f"{function} failed: {outcome.error}")
        return outcome.result


def largest_good(rates: Mapping[str, float]) -> str:
    """The largest batch that is as fast as any, within the noise: what each costs is then paid least often."""
    most = max(rates.values())
    return max((batch for batch, rate in rates.items() if rate >= most * (1 - NOISE)), key=int)


def read(outcome: Outcome, records: Path, rows: int) -> dict[str, Any]:
    """The figures of a run, from its processes and what they noted."""
    blocks = []
    for file in records.iterdir():
        for line in file.read_text().splitlines():
            end, _, count, _ = map(float, line.split())
            blocks.append((end, int(file.name), int(count)))
    blocks.sort()
    figures: dict[str, Any] = {"error": outcome.error, "wall": outcome.seconds, "left": outcome.left, "equal": None}
    if outcome.error or not blocks:
        return figures | {"error": outcome.error or "it finished no block"}
    # A warm run has rows twice: those after the clock began are meant.
    begun, ended = outcome.result["begin"], blocks[-1][0]
    blocks = [block for block in blocks if block[0] >= begun]
    if sum(count for _, _, count in blocks) != rows:
        return figures | {"error": f"it finished {sum(count for _, _, count in blocks):,} of {rows:,} rows"}
    workers = {pid for _, pid, _ in blocks}
    all_work = max(min(end for end, pid, _ in blocks if pid == worker) for worker in workers)
    after = sum(count for end, _, count in blocks if end > all_work)
    return figures | {
        "steady": after / (ended - all_work) if after else rows / (ended - begun),
        "first": blocks[0][0] - outcome.begun,
        "job": outcome.result["end"] - begun,
        "span": ended - blocks[0][0],
        "private": outcome.peak(),
        "workers_private": outcome.peak(workers),
        "pss": outcome.pss,
        "processor": sum(outcome.cpu.values()),
        "workers": len(workers),
    }


def told(outcome: Mapping[str, Any]) -> str:
    if outcome["error"]:
        return str(outcome["error"])
    return (
        f"{outcome['steady']:,.0f} rows/s, first result after {outcome['first']:.1f} s, {outcome['wall']:.1f} s in all"
    )


BENCHMARK = Benchmark("throughput", "Throughput", __doc__, measure, tables, figures)
