"""What the throughput benchmark's figures say: bars that were asked for, tables, plots. Not for measuring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.measure import bars, summary, table
from benchmarks.systems import FRAMEWORKS, LIMIT, ON_ALL_CORES, OURS, RAY_DATA, SYSTEMS
from benchmarks.workloads import SLEEP_ROWS

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

    def bar(name: str, found: float | None, *, least: float | None = None, most: float | None = None) -> None:
        if found is None:
            return
        met = found >= least if least is not None else most is not None and found <= most
        text = f"at least {least:g}" if least is not None else f"at most {most:g}"
        asked[name] = {"asked": text, "found": found, "met": bool(met)}

    for name, workload in results["workloads"].items():
        systems = workload["systems"]
        if name == SLEEP:
            ideal = workload["rows"] / results["cores"] / SLEEP_ROWS
            bar(f"sleep model, {ideal:g} s of it, seconds", middle(systems, OURS, "job"), most=SLEEP_SHARE * ideal)
            continue
        bar(f"{name}: steady, share of {LIMIT}", ratio(systems, OURS, LIMIT, "steady"), least=OF_LIMIT)
        fastest = best(systems, FRAMEWORKS, "steady", max)
        bar(
            f"{name}: steady, times the fastest framework ({fastest})", ratio(systems, OURS, fastest, "steady"), least=1
        )
        bar(f"{name}: first result, share of {RAY_DATA}'s time", ratio(systems, OURS, RAY_DATA, "first"), most=1)
        leanest = best(systems, ON_ALL_CORES, "workers_private", min)
        bar(
            f"{name}: private memory of all workers, share of the least of a framework on all cores ({leanest})",
            ratio(systems, OURS, leanest, "workers_private"),
            most=1,
        )
    if found := results["overhead"].get("per_block"):
        bar("overhead of a block, ms of a worker", found["per_block"]["zcinfer"]["median"] * 1e3, most=OVERHEAD_MS)
    if found := results["overhead"].get("switching"):
        bar("predict_by over nine variants, share of one model's speed", found["ratio"]["median"], least=SWITCHING)
    return asked


def best(systems: Runs, among: Sequence[str], figure: str, choose: Any) -> str:
    """The system of some with the best median; "" where none has one."""
    found = {system: value for system in among if (value := middle(systems, system, figure)) is not None}
    return str(choose(found, key=lambda system: found[system])) if found else ""


def report(results: Mapping[str, Any], how: str) -> str:
    """All tables, in Markdown."""
    title, _, rest = how.partition("\n")
    lines = [
        "# Throughput",
        "",
        f"{results['when']}, {results['machine']}, Python {results['python']}, "
        + ", ".join(f"{name} {version}" for name, version in results["packages"].items())
        + f"; {results['seconds'] / 60:.0f} minutes.",
        "",
        f"{title}\n{rest.rpartition('    python')[0].strip()}\n\nMedian (least–most) of the rounds.",
    ]
    for name, workload in results["workloads"].items():
        lines += ["", f"## {name}", "", *(sleeping(results, workload) if name == SLEEP else computing(workload))]
        errors = [
            f"- {system}: {run['error'].splitlines()[-1]}"
            for system, found in workload["systems"].items()
            for run in found["runs"]
            if run["error"]
        ]
        lines += ["", "Failed:", *errors] if errors else []
    lines += overheads(results["overhead"])
    if results["bars"]:
        rows = [["bar", "asked", "found", ""]]
        rows += [
            [name, bar["asked"], f"{bar['found']:.3g}", "met" if bar["met"] else "NOT MET"]
            for name, bar in results["bars"].items()
        ]
        lines += ["", "## What was asked", "", table(rows)]
    lines += ["", "## The systems", ""]
    lines += [f"- *{system}*: {function.__doc__}" for system, function in SYSTEMS.items()]
    return "\n".join(lines)


def spread(runs: Sequence[Mapping[str, Any]], figure: str, scale: float = 1.0, digits: int = 0) -> str:
    """Median and extremes, for a table."""
    values = [run[figure] * scale for run in runs]
    text = f"{median(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def computing(workload: Mapping[str, Any]) -> list[str]:
    """A workload that computes: what it is, and a row for each system."""
    systems, unit = workload["systems"], workload["unit"]
    head = [
        "system", f"{unit}/s, steady", "of the limit", "first result, s", "in all, s", "processor, s",
        "private MB", "of the workers", "proportional MB", "block", "batch", "threads", "result",
    ]  # fmt: skip
    rows = [head]
    for system in systems:
        runs, sizes = good(systems, system), workload["chosen"][system]
        if not runs:
            rows.append([system, "failed", *["–"] * (len(head) - 2)])
            continue
        of_limit = ratio(systems, system, LIMIT, "steady")
        given = sizes.get("framework_batch")
        rows.append(
            [
                system,
                spread(runs, "steady", digits=0 if runs[0]["steady"] > 1000 else 1),
                f"{of_limit:.2f}" if of_limit is not None else "–",
                spread(runs, "first", digits=1),
                spread(runs, "wall", digits=1),
                f"{median(run['processor'] for run in runs):,.1f}",
                f"{median(run['private'] for run in runs) / 1e6:,.0f}",
                f"{median(run['workers_private'] for run in runs) / 1e6:,.0f}",
                f"{median(run['pss'] for run in runs) / 1e6:,.0f}",
                f"{given or sizes['block']:,}",
                f"{sizes['batch']:,}",
                f"{runs[0]['workers']} x {sizes['threads']}",
                "equal" if all(run["equal"] for run in runs) else "close",
            ]
        )
    return [
        f"{workload['rows']:,} {unit}, {workload['input_nbytes'] / 1e6:,.0f} MB; a model of "
        f"{workload['nbytes'] / 1e6:,.1f} MB. The block, the batch and the threads are those that measured best with "
        "plain torch (for Ray Data, the block is what it gives to an actor at a time, of the sizes tried the best).",
        "",
        table(rows),
    ]


def sleeping(results: Mapping[str, Any], workload: Mapping[str, Any]) -> list[str]:
    """The workload that does not compute: how much longer it takes than it sleeps."""
    systems = workload["systems"]
    ideal = workload["rows"] / results["cores"] / SLEEP_ROWS
    rows = [["system", "seconds of the call", "first block's end to last, + 1 s"]]
    for system in systems:
        if runs := good(systems, system):
            rows.append([system, spread(runs, "job", digits=2), f"{median(run['span'] for run in runs) + 1:.2f}"])
    return [
        f"One second for every {SLEEP_ROWS:,} rows, {ideal:g} s in each process, after ray-project/ray issue 44905, "
        "where 10 s in one process took 11.26 s by a plain iterator and 13.52 s with actors. The call, in processes "
        "that are there and have the model; Ray Data starts its actors in it.",
        "",
        table(rows),
    ]


def overheads(found: Mapping[str, Any]) -> list[str]:
    """What zcinfer costs by itself."""
    lines: list[str] = []
    if block := found.get("per_block"):
        rows = [["", "seconds", "ms of a worker, for a block"]]
        for way, seconds in block["seconds"].items():
            each = block["per_block"][way]
            rows.append(
                [way, f"{seconds['median']:.2f}", "{:.2f} ({:.2f}–{:.2f})".format(*(each[k] * 1e3 for k in ORDER))]
            )
        lines += ["", f"## {block['blocks']:,} blocks of a model that does nothing", ""]
        lines += [
            f"{block['workers']} workers, warm, in turn. *Dask alone* is a graph of as many tasks without a model.", "",
            table(rows),
        ]  # fmt: skip
    if graph := found.get("many_blocks"):
        rows = [["", "seconds", "private MB after it"]]
        for step, title in (("build", "built"), ("schedule", "handed to the scheduler"), ("run", "run")):
            after = graph["memory"]["scheduled" if step == "schedule" else "built" if step == "build" else "run"]
            rows.append([title, f"{graph[f'{step}_seconds']:.1f}", f"{after / 1e6:,.0f}"])
        lines += ["", f"## {graph['blocks']:,} blocks in one graph", ""]
        lines += [
            f"Nothing is computed. Memory is that of client and scheduler, one process, which had "
            f"{graph['memory']['before'] / 1e6:,.0f} MB before; the workers have "
            f"{graph['workers_memory'] / 1e6:,.0f} MB in the end.",
            "",
            table(rows),
            "",
            "Both grow with the number of blocks. What to do beyond: longer blocks, of which a worker must hold a few "
            "in memory; or the rows in parts, `x[a:b]`, each a graph and a target of its own, one after the other.",
        ]
    if switching := found.get("switching"):
        rows = [["", "rows/s"]]
        for way, title in (("one", "one model over all rows"), ("nine", "nine, each over its rows")):
            rates = switching["rows_per_second"][way]
            rows.append([title, "{:,.0f} ({:,.0f}–{:,.0f})".format(*(rates[k] for k in ORDER))])
        lines += ["", "## Nine variants of one BERT", ""]
        lines += [
            f"`zc.predict_by` over {switching['rows']:,} rows in blocks of {switching['block']:,}, batches of "
            f"{switching['batch']}, warm. Share of one model's speed: {switching['ratio']['median']:.2f} "
            f"({switching['ratio']['low']:.2f}–{switching['ratio']['high']:.2f}).",
            "",
            table(rows),
        ]
    return lines


ORDER = ("median", "low", "high")


def figures(results: Mapping[str, Any]) -> list[Any]:
    """A plot of each workload's rates, first results and memory."""
    plots = []
    kinds = (("steady", "{unit}/s, steady", 1.0), ("first", "seconds to the first result", 1.0))
    memory = (("workers_private", "private MB of all workers", 1e-6),)
    for name, workload in results["workloads"].items():
        systems = workload["systems"]
        for figure, title, scale in kinds + memory if name != SLEEP else (("job", "seconds of the call", 1.0),):
            values = {
                system: summary([run[figure] * scale for run in good(systems, system)])
                for system in systems
                if good(systems, system)
            }
            if values:
                text = title.format(unit=workload["unit"])
                plots.append(bars(f"{name}: {text}", text, values))
    return plots
