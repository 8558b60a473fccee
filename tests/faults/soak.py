"""Half an hour of loads, predictions, publishes and deletes on two nodes: does anything grow?

A program: `python tests/faults/soak.py --minutes 30` (`make soak`). Nodes are hosts made of namespaces, or, where these
are not to be had, addresses of this machine. What is compared is the state in which all rest: after two minutes of
work, when all has been used that is kept, and at the end. Not for what is done to processes (`harness`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from harness import docs_table, with_what

from zcinfer.benchmarks.hosts import Command, commands, network, why_not

FIRST = 120.0  # seconds of work before the first sample
REST = 8.0  # seconds in which what is kept for a while is let go of, freed memory last
GROWTH = 0.05
# Less is no growth: an allocator's page here, a timer's thread there
LEAST = {"anonymous": 2_000_000, "descriptors": 2, "threads": 2}
MEMORY = "400MB"

PROGRAM = """
import gc, json, sys
from time import monotonic
import dask.array as da, numpy as np, torch
from distributed import Client
import zcinfer as zc

def main():
    torch.set_num_threads(1)
    x = np.random.default_rng(0).random((4000, 64), dtype=np.float32)
    lazy = da.from_array(x, chunks=(500, 64))
    number = 0
    with Client(sys.argv[1]) as client:
        zc.connect(sys.argv[2])
        for line in sys.stdin:
            end, trips, rounds = monotonic() + float(line), [], 0
            while monotonic() < end:
                number, rounds = number + 1, rounds + 1
                torch.manual_seed(number)
                model = torch.nn.Sequential(torch.nn.Linear(64, 20_000 + 5_000 * (number % 5)), torch.nn.ReLU())
                ref = zc.put(model.append(torch.nn.Linear(model[0].out_features, 3)).eval(), f"soak-{number % 3}")
                zc.prefetch(ref, client, progress=False)
                y = zc.predict(ref, lazy, batch_size=500)
                begin = monotonic()
                client.submit(int, number, pure=False).result()
                trips.append(monotonic() - begin)
                with torch.inference_mode():
                    wanted = model(torch.from_numpy(x[:500])).numpy()
                    assert np.array_equal(zc.load(ref)(torch.from_numpy(x[:500])).numpy(), wanted)
                assert np.array_equal(y.compute()[:500], wanted)
                zc.delete(ref)
            del model, y, ref
            gc.collect()
            client.run(gc.collect)
            print(json.dumps({"rounds": rounds, "trips": trips}), flush=True)

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class State:
    """What there is at one moment, by process (its role and id) or by node."""

    processes: dict[str, dict[str, int]]
    shared: dict[str, int]


class Nodes:
    """Two nodes of a cluster, a worker each, and the program on the head."""

    def __init__(self, started: list[Command], hosts: Sequence[Any], place: Path):
        self.hosts, self._started, self._place = hosts, started, place
        addresses = [host.address for host in hosts] or ["127.0.0.2", "127.0.0.3"]
        self.addresses = addresses
        scheduler = f"tcp://{addresses[0]}:18786"
        own = {
            "DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY": MEMORY,
            "DASK_ZCINFER__RESIDENTS": "4",
            "DASK_ZCINFER__REGISTRY": str(place / "registry"),
        }
        if not hosts:
            own["TMPDIR"] = str(place)
        for number, address in enumerate(addresses):
            host = hosts[number] if hosts else None
            options = ("--head", "--port", "18786", "--ray-port", "16379") if not number else ("--join", scheduler)
            more = dict(own)
            if host and number:
                shutil.copy(hosts[0].path("zcinfer/ray-token"), host.path("token"))
                more["DASK_ZCINFER__RAY__TOKEN_FILE"] = "/mnt/token"
            started.append(Command(*options, "--host", address, "--workers", "1", host=host, **more).ready())
        command = ["-c", PROGRAM, scheduler, f"ray:{addresses[0]}:16379"]
        if hosts:
            hosts[0].environment |= own
            self.program = hosts[0].python(*command)
        else:
            environment = os.environ | own | {"DASK_ZCINFER__RAY__HOST": addresses[0]}
            pipe = subprocess.PIPE
            self.program = subprocess.Popen(
                [sys.executable, *command], env=environment, stdin=pipe, stdout=pipe, text=True
            )

    def work(self, seconds: float) -> dict[str, Any]:
        """Have the program work, and all of it rest."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        print(seconds, file=self.program.stdin, flush=True)
        line = self.program.stdout.readline()
        if not line:
            printed = "\n".join(command.printed[-4000:] for command in self._started)
            raise SystemExit(f"the program ended, see above; what the nodes have printed last:\n{printed}")
        told: dict[str, Any] = json.loads(line)
        time.sleep(REST)
        return told

    def state(self) -> State:
        if self.hosts:
            found = [process for host in self.hosts for process in host.processes()]
            shared = {host.address: _used(host.path("../dev/shm")) for host in self.hosts}
        else:
            pids = [self.program.pid, *(command.process.pid for command in self._started)]
            found = [p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
            shared = {"this machine": _used(Path("/dev/shm"))}
        processes = {}
        for process in found:
            with suppress(psutil.Error, OSError):
                processes[f"{_role(process)} {process.pid}"] = {
                    "anonymous": _anonymous(process.pid),
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                }
        return State(processes, shared | {"registry": _size(self._place / "registry")})


def _used(path: Path) -> int:
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def _role(process: psutil.Process) -> str:
    line = process.cmdline()
    text = " ".join(line)
    for mark, role in (
        ("ray::Holder", "holder"), ("ray::", "Ray's spare worker"), ("raylet/raylet", "raylet"),
        ("gcs_server", "Ray's head process"), ("agent", "Ray's agent"), ("spawn_main", "Dask worker"),
        ("resource_tracker", "Python's tracker"), ("zcinfer.ray_node", "keeper"), ("zcinfer node", "node"),
        ("-m zcinfer", "node"), ("soak-", "program"),
    ):  # fmt: skip
        if mark in text:
            return role
    return process.name()


@contextmanager
def nodes() -> Iterator[Nodes]:
    place = Path(tempfile.mkdtemp(prefix="zcs-", dir="/tmp"))
    try:
        if why_not() is None:
            with network(2) as net, commands() as started:
                yield Nodes(started, net.hosts, place)
        else:
            with commands() as started:
                yield Nodes(started, [], place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def growths(first: State, last: State) -> list[str]:
    """What has grown by more than 5 %."""
    found = []
    for name, before in first.processes.items():
        after = last.processes.get(name)
        if after is None:
            found.append(f"{name} has ended")
            continue
        for what, least in LEAST.items():
            grown = after[what] - before[what]
            if grown > max(least, GROWTH * before[what]):
                found.append(f"{name}: {what} {before[what]:,} -> {after[what]:,}")
    for name, used in first.shared.items():
        if last.shared[name] - used > max(LEAST["anonymous"], GROWTH * used):
            found.append(f"shared memory of {name}: {used:,} -> {last.shared[name]:,}")
    return found


def table(first: State, last: State, trips: Sequence[Sequence[float]]) -> str:
    """In Markdown: each process after two minutes and at the end."""
    lines = ["| | private memory, MB | descriptors | threads |", "|---|---|---|---|"]
    for name in sorted(first.processes):
        before, after = first.processes[name], last.processes.get(name)
        if after is not None:
            cells = [f"{before['anonymous'] / 1e6:.1f} → {after['anonymous'] / 1e6:.1f}"]
            cells += [f"{before[what]} → {after[what]}" for what in ("descriptors", "threads")]
            lines.append(f"| {name.rpartition(' ')[0]} | {' | '.join(cells)} |")
    for name, used in first.shared.items():
        what = "files of the registry" if name == "registry" else f"shared memory of {name}"
        lines.append(f"| {what} | {used / 1e6:.1f} → {last.shared[name] / 1e6:.1f} | | |")
    for when, some in (("in the first two minutes", trips[0]), ("at the end", trips[-1])):
        lines.append(
            f"| round trip of a small call {when}: {1e3 * median(some):.0f} ms, at most {1e3 * max(some):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/faults.md")
    asked = parser.parse_args()
    with nodes() as cluster:
        told = [cluster.work(FIRST)]
        first = last = cluster.state()
        left = 60 * asked.minutes - FIRST
        while left > 1:
            told.append(cluster.work(min(60.0, left)))
            left -= 60.0
            last = cluster.state()
            print(
                f"{60 * asked.minutes - max(0.0, left):6.0f} s, {sum(one['rounds'] for one in told)} rounds", flush=True
            )
            print(*("  " + found for found in growths(first, last)), sep="\n", flush=True)
        assert cluster.program.stdin is not None
        cluster.program.stdin.close()
        cluster.program.wait(60)
    text = table(first, last, [one["trips"] for one in told])
    rounds = sum(one["rounds"] for one in told)
    print("\n" + text)
    if asked.docs:
        docs_table("soak", f"{with_what(f'{asked.minutes:.0f} minutes, {rounds:,} models')}\n\n{text}")
    sys.exit(bool(growths(first, last)))


if __name__ == "__main__":
    main()
