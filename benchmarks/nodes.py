"""How does a model come to all nodes of a cluster, how long does that take, and what goes over each link?

Hosts made of namespaces on this machine, each with links of 1 Gbit/s in both directions, a node (`zcinfer node`) and
one worker. *Prefetched*: `zc.prefetch`, where each node that has the model serves one other at a time. *All at once*:
all workers load it at the same moment, as at the beginning of a job without prefetch. Each load is of a model of its
own, and is compared, by the sum of its weights, with what was published.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from time import perf_counter
from typing import Any

from zcinfer import config
from zcinfer.ray_store import SLOWEST_NETWORK

from .benchmark import Benchmark, Options, say
from .figures import bars
from .hosts import PRIVATE, Command, Network, commands, network, why_not
from .measure import summary
from .tables import Table

RATE, LINK = "1gbit", 125e6  # bytes/s
PREFETCH, TOGETHER = "prefetched", "all at once"
PAPER = 1000  # nodes
QUESTIONS = 50  # to the holder, for their mean time


def measure(options: Options) -> dict[str, Any]:
    """Both ways on clusters of 2, 4 and 8 nodes."""
    reason = why_not()
    if reason is not None:
        return {"cases": [], "absent": {"hosts made of namespaces": reason}}
    megabytes, rounds = (50, 1) if options.quick else (100, 3)
    cases = []
    for number in (2,) if options.quick else (2, 4, 8):
        say(f"{number} nodes")
        cases += cluster(number, megabytes, rounds)
    return {"cases": cases}


def cluster(number: int, megabytes: int, rounds: int) -> list[dict[str, Any]]:
    """Both ways on a cluster of so many nodes, in turn."""
    with network(number, RATE) as net, commands() as started:
        begin = perf_counter()
        program = _start(net, started, megabytes)
        joined = perf_counter() - begin
        assert program.stdin is not None
        assert program.stdout is not None
        cases = []
        # The first load of a worker imports torch and connects to Ray, and is not counted
        for turn in range(rounds + 1):
            for way in (PREFETCH, TOGETHER):
                print(way, file=program.stdin, flush=True)
                nbytes = json.loads(program.stdout.readline())
                before = net.traffic()
                print("go", file=program.stdin, flush=True)
                told = json.loads(program.stdout.readline())
                after = net.traffic()
                links = {a: [after[a][k] - before[a][k] for k in (0, 1)] for a in after}
                if turn:
                    cases.append(
                        told | {"way": way, "nodes": number, "nbytes": nbytes, "links": links, "start": joined}
                    )
        program.stdin.close()
        program.wait(60)
        program.stdout.close()
    return cases


def _start(net: Network, started: list[Command], megabytes: int) -> Any:
    head, *others = net.hosts
    memory = {"DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY": f"{12 * megabytes}MB"}
    scheduler = f"tcp://{head.address}:8786"
    started.append(Command("--head", "--host", head.address, "--workers", "1", host=head, **memory).ready())
    for host in others:
        shutil.copy(head.path("zcinfer/ray-token"), host.path("token"))
        joining = ("--join", scheduler, "--token-file", str(PRIVATE / "token"), "--workers", "1")
        started.append(Command(*joining, host=host, **memory))
    for command in started:
        command.ready(300)
    return head.python("-m", "zcinfer.benchmarks.nodes", scheduler, f"ray:{head.address}:6379", str(megabytes))


def inside(scheduler: str, store: str, megabytes: int) -> None:
    """On the head: publish a new model for each way that standard input names, and bring it to all nodes at "go"."""
    import torch
    from distributed import Client

    import zcinfer as zc
    from zcinfer.catalog import ready

    with Client(scheduler) as client:
        connected = zc.connect(store)
        for number, line in enumerate(sys.stdin):
            way = line.strip()
            torch.manual_seed(number)
            model = torch.nn.Sequential(torch.nn.Linear(1000, megabytes * 250)).eval()
            ref = ready(zc.put(model, f"model{number}"))
            print(ref.nbytes, flush=True)
            sys.stdin.readline()
            begin = perf_counter()
            told: dict[str, Any] = {}
            if way == PREFETCH:
                frame = zc.prefetch(ref, client)
                told["came"] = frame.set_index("node")["bytes"].to_dict()
            else:
                client.run(load, ref)
            told["seconds"] = perf_counter() - begin
            sums = client.run(total, ref).values()
            want = float(sum(p.detach().sum(dtype=torch.float64) for p in model.parameters()))
            assert all(abs(found - want) <= 1e-6 * abs(want) + 1e-6 for found in sums), "results differ"
            begin = perf_counter()
            for _ in range(QUESTIONS):
                connected.publish(ref.digest)
            told["question"] = (perf_counter() - begin) / QUESTIONS
            print(json.dumps(told), flush=True)
            zc.delete(ref)


async def load(ref: Any) -> None:
    """Load a model beside the worker's event loop."""
    import asyncio

    from zcinfer.loading import load_ref

    await asyncio.to_thread(load_ref, ref)


def total(ref: Any) -> float:
    """The sum of a model's weights."""
    import torch

    from zcinfer.loading import load_ref

    return float(sum(p.detach().sum(dtype=torch.float64) for p in load_ref(ref).parameters()))


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of each number of nodes and way; what goes over links as multiples of the model."""
    rows = []
    for number in sorted({case["nodes"] for case in results["cases"]}):
        for way in (PREFETCH, TOGETHER):
            cases = [case for case in results["cases"] if (case["nodes"], case["way"]) == (number, way)]
            # Of each load, by host, the head first: sent and received
            links = [[[n / case["nbytes"] for n in link] for link in case["links"].values()] for case in cases]
            rows.append(
                {
                    "nodes": number,
                    "way": way,
                    "nbytes": cases[0]["nbytes"],
                    "seconds": summary([case["seconds"] for case in cases]),
                    "received": summary([received for load in links for _, received in load[1:]]),
                    "head": summary([load[0][0] for load in links]),
                    "other": max(sent for load in links for sent, _ in load[1:]),
                    "question": mean(case["question"] for case in cases),
                }
            )
    return rows


def tables(results: Mapping[str, Any]) -> Sequence[Table]:
    rows = rows_of(results)
    if not rows:
        return []
    columns = {
        "": "", "until all have it": "s", "a node receives": "models", "the head sends": "models",
        "another sends at most": "models",
    }  # fmt: skip
    measured = [
        [f"{row['nodes']} nodes, {row['way']}", *(row[name] for name in ("seconds", "received", "head", "other"))]
        for row in rows
    ]
    note = f"A model of {rows[0]['nbytes'] / 1e6:,.0f} MB; sent and received in multiples of it."
    return [Table("A model on all nodes", columns, measured, note), on_paper(rows)]


def on_paper(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the largest cluster measured says of one of `PAPER` nodes, and what breaks first there."""
    largest = max(row["nodes"] for row in rows)
    (together,) = (row for row in rows if (row["nodes"], row["way"]) == (largest, TOGETHER))
    sent = together["head"]["median"]
    share, a_copy = sent / (largest - 1), together["seconds"]["median"] / sent
    patience = float(config.get("ray.timeout")) + together["nbytes"] / SLOWEST_NETWORK
    here, there = simulated(largest, a_copy), simulated(PAPER, a_copy)
    found: list[list[Any]] = [
        ["one copy over the head's link, measured", a_copy, "s"],
        [f"{PAPER:,} nodes, all at once: copies by the head", share * (PAPER - 1), "models"],
        [f"{PAPER:,} nodes, all at once", share * (PAPER - 1) * a_copy, "s"],
        [f"{largest} nodes, prefetched, simulated", here[0], "s"],
        [f"{largest} nodes, prefetched, simulated: copies by the head", here[1], "models"],
        [f"{PAPER:,} nodes, prefetched, simulated", there[0], "s"],
        [f"{PAPER:,} nodes, prefetched, simulated: copies by the head", there[1], "models"],
        ["breaks first: a load without prefetch gives up after", patience, "s"],
        ["- which is enough for", patience / a_copy / share, "nodes"],
        ["then: an answer of the holder, measured", together["question"], "s"],
        [f"- to the first loads of 16 workers on each of {PAPER:,} nodes", 16 * PAPER * together["question"], "s"],
    ]
    cells = [[name, f"{value:,.4g} {unit}"] for name, value, unit in found]
    note = "Simulated: links are shared evenly, and Ray chooses a source at random among those that have the model."
    return Table(f"{PAPER:,} nodes, on paper", {"": "", "figure": ""}, cells, note)


def simulated(nodes: int, a_copy: float, runs: int = 20) -> tuple[float, float]:
    """Seconds of a prefetch, and models that the head sends; means of runs in which sources are chosen at random."""
    times, sent = [], []
    for seed in range(runs):
        choice = random.Random(seed).choice
        holders, waiting, free, now, head = [0], nodes - 1, 1, 0.0, 0
        pulls: list[tuple[int, float]] = []  # source, and how much is missing
        while waiting or pulls:
            while waiting and free:
                pulls.append((choice(holders), 1.0))
                waiting, free = waiting - 1, free - 1
            sharing = Counter(source for source, _ in pulls)
            step = min(missing * sharing[source] for source, missing in pulls)
            now += step * a_copy
            left = [(source, missing - step / sharing[source]) for source, missing in pulls]
            pulls = [(source, missing) for source, missing in left if missing > 1e-9]
            ended = [source for source, missing in left if missing <= 1e-9]
            holders += range(len(holders), len(holders) + len(ended))
            free += 2 * len(ended)
            head += ended.count(0)
        times.append(now)
        sent.append(head)
    return mean(times), mean(sent)


def figures(results: Mapping[str, Any]) -> Sequence[Any]:
    if not results["cases"]:
        return []

    def named(figure: str) -> dict[str, Any]:
        ours = {PREFETCH: "zcinfer: ", TOGETHER: ""}
        return {f"{ours[row['way']]}{row['way']}, {row['nodes']} nodes": row[figure] for row in rows_of(results)}

    return [
        bars("until all nodes have the model", "s", named("seconds")),
        bars("what the head sends", "models", named("head")),
    ]


BENCHMARK = Benchmark(
    "nodes",
    "How does a model come to all nodes, and what goes over each link?",
    __doc__.partition("\n")[2].strip(),
    measure,
    tables,
    figures,
)

if __name__ == "__main__":
    inside(sys.argv[1], sys.argv[2], int(sys.argv[3]))
