"""What the throughput benchmark's figures say: bars that were asked for, tables, plots. Not for measuring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .benchmark import bar
from .figures import bars
from .measure import summary
from .systems import FRAMEWORKS, LIMIT, ON_ALL_CORES, OURS, RAY_DATA, SYSTEMS
from .tables import Table
from .workloads import SLEEP_ROWS

OF_LIMIT, OVERHEAD_MS, SLEEP_SHARE, SWITCHING = 0.95, 3.0, 1.05, 0.9
SLEEP = "sleep"
Runs = Mapping[str, Mapping[str, Any]]


def good(systems: Runs, system: str) -> list[dict[str, Any]]:
    """The runs of a system that gave a right result."""
    return [run for run in systems.get(system, {}).get("runs", ()) if not run["error"]]


def middle(systems: Runs, system: str, figure: str) -> float | None:
    """Median over the rounds; None where there is no good one."""
    found = [run[figure] for run in good(systems, system)]
    return median(found) if found else None


def ratio(systems: Runs, one: str, other: str, figure: str) -> float | None:
    """Median of the ratios of two systems in the same rounds, whose machine was in the same mood."""
    pairs = zip(systems.get(one, {}).get("runs", ()), systems.get(other, {}).get("runs", ()), strict=False)
    found = [mine[figure] / theirs[figure] for mine, theirs in pairs if not mine["error"] and not theirs["error"]]
    return median(found) if found else None


def bars_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar: what was asked, what was found."""
    asked: dict[str, dict[str, Any]] = {}

    def ask(name: str, found: float | None, *, least: float = 0, most: float | None = None, unit: str = "") -> None:
        if found is not None:
            asked[name] = bar(least if most is None else most, found, most=most is not None, unit=unit)

    for name, workload in results["workloads"].items():
        systems = workload["systems"]
        if name == SLEEP:
            ideal = workload["rows"] / results["cores"] / SLEEP_ROWS
            ask(
                f"sleep model, {ideal:g} s of it, seconds",
                middle(systems, OURS, "job"),
                most=SLEEP_SHARE * ideal,
                unit="s",
            )
            continue
        ask(f"{name}: steady, share of {LIMIT}", ratio(systems, OURS, LIMIT, "steady"), least=OF_LIMIT)
        fastest = best(systems, FRAMEWORKS, "steady", max)
        ask(
            f"{name}: steady, times the fastest framework ({fastest})", ratio(systems, OURS, fastest, "steady"), least=1
        )
        ask(f"{name}: first result, share of {RAY_DATA}'s time", ratio(systems, OURS, RAY_DATA, "first"), most=1)
        leanest = best(systems, ON_ALL_CORES, "workers_private", min)
        ask(
            f"{name}: private memory of all workers, share of the least of a framework on all cores ({leanest})",
            ratio(systems, OURS, leanest, "workers_private"),
            most=1,
        )
    if found := results["overhead"].get("per_block"):
        overhead = found["per_block"]["zcinfer"]["median"] * 1e3
        ask("overhead of a block, ms of a worker", overhead, most=OVERHEAD_MS, unit="ms")
    if found := results["overhead"].get("switching"):
        ask("predict_by over nine variants, share of one model's speed", found["ratio"]["median"], least=SWITCHING)
    return asked


def best(systems: Runs, among: Sequence[str], figure: str, choose: Any) -> str:
    """The system of some with the best median; "" where none has one."""
    found = {system: value for system in among if (value := middle(systems, system, figure)) is not None}
    return str(choose(found, key=lambda system: found[system])) if found else ""


def tables(results: Mapping[str, Any]) -> list[Table]:
    """A table for each workload, then what zcinfer costs by itself, and what the systems are."""
    found = []
    for name, workload in results["workloads"].items():
        found.append(sleeping(results, workload) if name == SLEEP else computing(name, workload))
    found += overheads(results["overhead"])
    errors = [
        [system, name, run["error"].splitlines()[-1]]
        for name, workload in results["workloads"].items()
        for system, of_system in workload["systems"].items()
        for run in of_system["runs"]
        if run["error"]
    ]
    if errors:
        found.append(Table("Runs that failed", {"system": "", "workload": "", "why": ""}, errors))
    described = [[system, str(function.__doc__)] for system, function in SYSTEMS.items()]
    return [*found, Table("The systems", {"system": "", "what it is": ""}, described)]


def computing(name: str, workload: Mapping[str, Any]) -> Table:
    """A workload that computes: a row for each system."""
    systems, unit = workload["systems"], workload["unit"]
    columns = {
        "system": "", "steady": f"{unit}/s", "of the limit": "x", "first result": "s", "in all": "s", "processors": "s",
        "private": "MB", "private of the workers": "MB", "proportional": "MB", "block": "n", "batch": "n",
        "processes x threads": "", "result": "",
    }  # fmt: skip
    rows: list[list[Any]] = []
    for system in systems:
        runs, sizes = good(systems, system), workload["chosen"][system]
        if not runs:
            rows.append([system, *[None] * (len(columns) - 2), "failed"])
            continue
        rows.append(
            [
                system,
                spread(runs, "steady"),
                ratio(systems, system, LIMIT, "steady"),
                spread(runs, "first"),
                spread(runs, "wall"),
                *(median(run[figure] for run in runs) for figure in ("processor", "private", "workers_private", "pss")),
                sizes.get("framework_batch") or sizes["block"],
                sizes["batch"],
                f"{runs[0]['workers']} x {sizes['threads']}",
                "equal" if all(run["equal"] for run in runs) else "close",
            ]
        )
    note = (
        f"{workload['rows']:,} {unit}, {workload['input_nbytes'] / 1e6:,.0f} MB; a model of "
        f"{workload['nbytes'] / 1e6:,.1f} MB. Block, batch and threads are those that measured best with plain torch; "
        "Ray Data's block is what it gives to an actor at a time, the best of those tried. Equal: to the last bit to "
        "plain torch on all cores; close: within 1e-4."
    )
    return Table(name, columns, rows, note)


def spread(runs: Sequence[Mapping[str, Any]], figure: str) -> dict[str, float]:
    """Median and quartiles of the rounds."""
    return summary([run[figure] for run in runs])


def sleeping(results: Mapping[str, Any], workload: Mapping[str, Any]) -> Table:
    """The workload that does not compute: how much longer it takes than it sleeps."""
    systems = workload["systems"]
    ideal = workload["rows"] / results["cores"] / SLEEP_ROWS
    rows = [
        [system, spread(runs, "job"), median(run["span"] for run in runs) + 1]
        for system in systems
        if (runs := good(systems, system))
    ]
    note = (
        f"One second for every {SLEEP_ROWS:,} rows, {ideal:g} s in each process, after ray-project/ray issue 44905, "
        "where 10 s in one process took 11.26 s by a plain iterator and 13.52 s with actors. The call, in processes "
        "that are there and have the model; Ray Data starts its actors in it, and plain torch's processes end in it."
    )
    return Table(
        "A model that sleeps", {"system": "", "the call": "s", "first block's end to last, + 1 s": "s"}, rows, note
    )


def overheads(found: Mapping[str, Any]) -> list[Table]:
    """What zcinfer costs by itself."""
    made = []
    if block := found.get("per_block"):
        rows = [
            [
                way,
                seconds,
                seconds["median"] / block["blocks"],
                block["per_block"][way],
                used["workers"],
                used["scheduler"],
            ]
            for (way, seconds), used in zip(block["seconds"].items(), block["processor"].values(), strict=True)
        ]
        note = (
            f"{block['workers']} workers, warm, in turn. Dask alone is a graph of as many tasks without a model. Of a "
            "worker: seconds by the number of workers, by the number of blocks, though it waits for the scheduler."
        )
        columns = {
            "way": "",
            "in all": "s",
            "a block": "ms",
            "of a worker, for a block": "ms",
            "processor, of the workers": "ms",
            "processor, of client and scheduler": "ms",
        }
        made.append(Table(f"{block['blocks']:,} blocks of a model that does nothing", columns, rows, note))
    if graph := found.get("many_blocks"):
        memory = graph["memory"]
        steps = [
            ["built", graph["build_seconds"], memory["built"]],
            ["handed to the scheduler", graph["schedule_seconds"], memory["scheduled"]],
            ["run", graph["run_seconds"], memory["run"]],
        ]
        note = (
            "Nothing is computed. Memory is that of client and scheduler, one process, which had "
            f"{memory['before'] / 1e6:,.0f} MB before; the workers have {graph['workers_memory'] / 1e6:,.0f} MB in the "
            "end. Both grow with the number of blocks. What to do beyond: longer blocks, of which a worker must hold a "
            "few in memory; or the rows in parts, each a graph and a target of its own, one after the other."
        )
        columns = {"step": "", "time": "s", "private memory after it": "MB"}
        made.append(Table(f"{graph['blocks']:,} blocks in one graph", columns, steps, note))
    if switching := found.get("switching"):
        rates = switching["rows_per_second"]
        rows = [
            ["one model over all rows", rates["one"], 1.0],
            ["nine, each over its rows", rates["nine"], switching["ratio"]],
        ]
        note = (
            f"`zc.predict_by` over {switching['rows']:,} rows in blocks of {switching['block']:,}, batches of "
            f"{switching['batch']}, warm."
        )
        made.append(Table("Nine variants of one BERT", {"way": "", "speed": "rows/s", "of one model": "x"}, rows, note))
    return made


def figures(results: Mapping[str, Any]) -> list[Any]:
    """A plot of each workload's rates, first results and memory."""
    plots = []
    computed = (("steady", "steady"), ("first", "to the first result"), ("workers_private", "private"))
    for name, workload in results["workloads"].items():
        systems = workload["systems"]
        units = {"steady": f"{workload['unit']}/s", "workers_private": "MB"}
        for figure, what in computed if name != SLEEP else (("job", "the call"),):
            values = {system: spread(runs, figure) for system in systems if (runs := good(systems, system))}
            if values:
                plots.append(bars(f"{name}: {what}", units.get(figure, "s"), values, most=figure == "steady"))
    return plots
