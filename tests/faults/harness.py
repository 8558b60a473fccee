"""Jobs through faults: `zcinfer run` over 400 blocks, struck at a random moment, started again, compared to the bit.

A program: `python tests/faults/harness.py --runs 100` (`make faults`). It runs in namespaces of its own, so that it can
fill a disk, and that nothing of it stays, however it ends. Not for what strikes (`strikes`), nor what is struck
(`machines`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
from counted import BATCH, BLOCKS, ROWS, rows
from machines import Alone, Client, until
from strikes import FAULTS, Fault, Scene

from zcinfer.benchmarks.machine import machine as facts_of_machine

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "faults.md"
DISK = "32m"
# Seconds after which a job counts as one that hangs; a lost link alone is noticed after 30
LIMIT = 150.0
# Starts of a job after the last fault, of which one must do
STARTS = 3


@dataclass
class Run:
    """What became of one struck job.

    Attributes
    ----------
    survived : bool
        It went on by itself.
    starts : int
        How often it was started again.
    twice : int
        Blocks computed more than once; each time counts.
    lost : float
        Seconds more than the undisturbed job took, those for what had to be started again among them.
    wrong : list of str
        What must not be; empty where all is well.
    """

    seed: int
    fault: str
    at: int
    survived: bool = False
    starts: int = 0
    twice: int = 0
    lost: float = 0.0
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Harness:
    """Sources, model, machines, and what the undisturbed jobs gave."""

    def __init__(self, folder: Path, quick: bool):
        self.folder, self.disk, self.quick = folder, folder / "disk", quick
        self._kinds = ["in.npy"] if quick else ["in.npy", "in.zarr"]
        self.log = folder / "log"
        self._machines: dict[type[Alone], Alone] = {}
        self._expected: dict[tuple[type[Alone], str], tuple[float, dict[str, str]]] = {}
        self._sources()

    def _sources(self) -> None:
        import zarr

        x = rows()
        np.save(self.folder / "in.npy", x)
        zarr.create_array(str(self.folder / "in.zarr"), data=x, chunks=(10 * ROWS, x.shape[1]))

    def machine(self, kind: type[Alone]) -> Alone:
        if kind not in self._machines:
            # One at a time: there are few cores
            while self._machines:
                self._machines.popitem()[1].close()
            made = self._machines[kind] = kind(self.folder)
            client = made.clients.start(["put", "counted:build", "--name", "counted"], self.folder / "put.log")
            assert client.wait(LIMIT), "put hangs"
            assert client.status == 0, client.printed
        return self._machines[kind]

    def start(self, machine: Alone, source: str) -> Client:
        more = ["--chunk-rows", str(ROWS // 4)] if source == "in.zarr" else []
        paths = [str(self.folder / source), str(self.disk / "out.zarr")]
        settings = ["--batch-size", str(BATCH), "--block-rows", str(ROWS), *more, *machine.options]
        return machine.clients.start(["run", "counted", *paths, *settings], self.folder / "client.log")

    def clear(self) -> None:
        for path in [*self.disk.iterdir(), self.folder / "client.log", self.log]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def undisturbed(self, kind: type[Alone], source: str) -> tuple[float, dict[str, str]]:
        """Seconds of the job, and its output."""
        if (kind, source) not in self._expected:
            machine = self.machine(kind)
            for _ in range(2):  # the first one imports, connects and loads
                machine.mend()
                self.clear()
                begin = time.monotonic()
                client = self.start(machine, source)
                assert client.wait(LIMIT), "the undisturbed job hangs: " + client.printed
                assert client.status == 0, client.printed
            assert self.computed() == Counter(range(BLOCKS)), "the undisturbed job computes blocks twice"
            self._expected[kind, source] = time.monotonic() - begin, contents(self.disk)
        return self._expected[kind, source]

    def computed(self) -> Counter[int]:
        """How often each block was computed."""
        return Counter(map(int, self.log.read_text().split())) if self.log.exists() else Counter()

    def done(self) -> int:
        """Blocks that are marked as done."""
        with suppress(FileNotFoundError):
            return len(os.listdir(self.disk / "out.zarr.partial" / ".zcinfer" / "done"))
        return 0

    def run(self, seed: int, fault: Fault) -> Run:
        """Strike one job."""
        random = Random(seed)
        source = random.choice(self._kinds)
        seconds, expected = self.undisturbed(fault.machine, source)
        machine = self.machine(fault.machine)
        machine.mend()
        self.clear()
        run = Run(seed, fault.name, random.randrange(BLOCKS * 19 // 20))
        begin = time.monotonic()
        client = self.start(machine, source)
        try:
            until(lambda: client.wait(0) or self.done() >= run.at, LIMIT, f"{run.at} blocks")
            if client.status is not None:
                run.wrong.append("it ended before it was struck")
            scene = Scene(machine, client, random, self.disk, self.quick)
            for wait in fault.strike(scene):
                if client.status not in (None, 0):
                    client = self._again(run, machine, source, client)
                client.wait(LIMIT if wait == inf else wait)
            while not self._ended(run, client):
                if run.starts >= STARTS + 3:
                    run.wrong.append(f"not done after {run.starts} more starts")
                    break
                machine.mend()
                client = self._again(run, machine, source, client)
            run.survived = run.starts == 0
            run.lost = time.monotonic() - begin - seconds
            self._compare(run, expected)
        except (TimeoutError, AssertionError) as error:
            run.wrong.append(f"{type(error).__name__}: {error}")
        return run

    def _again(self, run: Run, machine: Alone, source: str, client: Client) -> Client:
        lines = [line for line in client.printed.splitlines() if line.startswith("error: ")]
        run.said += lines
        if client.status not in (-9, 0) and not lines:
            run.wrong.append(f"it ended with status {client.status} and said no error: {client.printed[-2000:]}")
        # Workers that lose a client that was killed may say so as they like
        if client.status != -9 and "Traceback" in client.printed:
            run.wrong.append(f"a traceback: {client.printed[-2000:]}")
        (self.folder / "client.log").unlink(missing_ok=True)
        run.starts += 1
        return self.start(machine, source)

    def _ended(self, run: Run, client: Client) -> bool:
        """Whether the job is done; one that hangs fails."""
        if not client.wait(LIMIT):
            raise TimeoutError(f"the job hangs, with {self.done()} blocks done: {client.printed[-2000:]}")
        return client.status == 0

    def _compare(self, run: Run, expected: dict[str, str]) -> None:
        computed = self.computed()
        run.twice = sum(times - 1 for times in computed.values())
        if missing := set(range(BLOCKS)) - set(computed):
            run.wrong.append(f"never computed: {sorted(missing)[:9]}")
        found = contents(self.disk)
        for what, paths in (
            ("missing", expected.keys() - found.keys()),
            ("foreign", found.keys() - expected.keys()),
            ("different", {path for path in expected.keys() & found.keys() if expected[path] != found[path]}),
        ):
            if paths:
                run.wrong.append(f"{len(paths)} files {what}: {sorted(paths)[:5]}")

    def close(self) -> None:
        for machine in self._machines.values():
            machine.close()


def contents(directory: Path) -> dict[str, str]:
    """Digests of all files below a directory, by their paths; of empty directories an empty text."""
    found = {}
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[name] = ""
    return found


def table(runs: Sequence[Run]) -> str:
    """A line for each fault, in Markdown."""
    lines = [
        "| fault | runs | output equal | went on by itself | starts again | blocks computed twice | seconds lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        these = [run for run in runs if run.fault == fault.name]
        if these:
            twice, lost = [run.twice for run in these], [run.lost for run in these]
            equal, survived = sum(not run.wrong for run in these), sum(run.survived for run in these)
            starts = max(run.starts for run in these)
            lines.append(
                f"| {fault.name} | {len(these)} | {equal} | {survived} | {starts or '-'} "
                f"| {median(twice):.0f}, at most {max(twice)} | {median(lost):.1f}, at most {max(lost):.1f} |"
            )
    return "\n".join(lines) + "\n"


def with_what(what: str) -> str:
    """When, where and with what."""
    facts = facts_of_machine()
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in ("ray", "distributed", "torch"))
    day, python = facts["when"][:10], facts["python"]
    return f"{day}, {what}; {facts['machine']}; Python {python}, {versions}; commit {facts['commit']}."


def docs_table(name: str, text: str) -> None:
    """Put a text where the docs have the one of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = DOCS.read_text().partition(begin)
    DOCS.write_text(before + begin + text + end + rest.partition(end)[2])


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for all files, with a small disk in it."""
    place = Path(tempfile.mkdtemp(prefix="zcf-", dir="/tmp"))
    try:
        (place / "disk").mkdir()
        for size, point in ((DISK, place / "disk"), ("2g", "/dev/shm")):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)], check=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place / "disk")], check=False)
        shutil.rmtree(place, ignore_errors=True)


def namespaces() -> list[str]:
    """Command that runs another in namespaces of its own, whose processes all end with it."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [
        "setpriv",
        "--pdeathsig=KILL",
        "unshare",
        *own,
        "--mount",
        "--pid",
        "--mount-proc",
        "--fork",
        "--kill-child",
    ]


def chosen(number: int, names: Sequence[str], first: int, quick: bool) -> list[tuple[int, Fault]]:
    """Seeds and faults of so many runs: each fault as often as the others, those of one machine together."""
    faults = [fault for fault in FAULTS if fault.quick or not quick]
    if names:
        faults = [fault for fault in FAULTS if any(name in fault.name for name in names)]
    made = [(first + turn, faults[turn % len(faults)]) for turn in range(number)]
    kinds = [fault.machine for fault in FAULTS]
    return sorted(made, key=lambda one: kinds.index(one[1].machine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--only", action="append", default=[], help="faults whose names contain this")
    parser.add_argument("--quick", action="store_true", help="the faults of CI, jobs of 100 blocks")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each run")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/faults.md")
    asked = parser.parse_args()
    if "ZCINFER_FAULTS_INSIDE" not in os.environ:
        blocks = {"ZCINFER_FAULTS_BLOCKS": "100"} if asked.quick else {}
        environment = os.environ | blocks | {"ZCINFER_FAULTS_INSIDE": "1"}
        sys.exit(subprocess.run([*namespaces(), sys.executable, *sys.argv], env=environment).returncode)
    runs: list[Run] = []
    with folder() as place:
        harness = Harness(place, asked.quick)
        try:
            for seed, fault in chosen(asked.runs, asked.only, asked.seed, asked.quick):
                runs.append(run := harness.run(seed, fault))
                if asked.json:
                    print(json.dumps(asdict(run)), flush=True)
                else:
                    verdict = "; ".join(run.wrong) or "equal"
                    how = "went on" if run.survived else f"started again {run.starts} x"
                    print(
                        f"{seed:4}  {fault.name} at block {run.at}: {how}, {run.twice} blocks twice, {run.lost:.1f} s "
                        f"lost, {verdict}",
                        *("      " + said for said in run.said), sep="\n", flush=True,
                    )  # fmt: skip
        finally:
            harness.close()
    if not asked.json:
        print("\n" + table(runs), end="")
    if asked.docs:
        docs_table("faults", f"{with_what(f'{asked.runs} runs')}\n\n{table(runs)}")
    sys.exit(any(run.wrong for run in runs))


if __name__ == "__main__":
    main()
