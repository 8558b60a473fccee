"""The throughput benchmark: how it watches and ends processes, what it makes of their notes, and that it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import wait_until

from zcinfer.benchmarks import runs
from zcinfer.benchmarks.comparison import bars_of, figures, tables
from zcinfer.benchmarks.throughput import Bench, read

# Functions that run in the process of a run, in a module that is imported in no time.
MEMBERS = """
import subprocess, sys, time

def hold(nbytes):
    code = f"import time; held = bytearray(b'x') * {nbytes}; time.sleep(1)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    child.wait()
    return child.pid

def hang(path):
    code = "import time; time.sleep(600)"
    shell = f"{sys.executable} -c '{code}' & echo $! > {path}"  # a child that another process adopts
    subprocess.run(["sh", "-c", shell], check=True, start_new_session=True)
    time.sleep(600)
"""


@pytest.fixture
def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "members.py").write_text(MEMBERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "members"


def test_memory_of_children_counts(members: str) -> None:
    outcome = runs.run(f"{members}:hold", {"nbytes": 100_000_000}, 60)
    assert outcome.error == ""
    child = {outcome.result}
    assert 100e6 < outcome.peak(child) < 130e6
    assert outcome.peak() > outcome.peak(child)
    assert outcome.left == []


@pytest.mark.slow
def test_a_run_that_hangs_is_told_and_ended(members: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 0.5)
    path = tmp_path / "pid"
    outcome = runs.run(f"{members}:hang", {"path": str(path)}, 4)
    assert "not done after 4 s" in outcome.error
    assert len(outcome.left) == 1
    pid = int(path.read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_what_fails_says_why() -> None:
    outcome = runs.run("zcinfer.benchmarks.runs:nothing_there", {}, 60)
    assert "has no attribute 'nothing_there'" in outcome.error
    assert outcome.result is None


def test_steady_begins_when_all_workers_have_finished_a_block(tmp_path: Path) -> None:
    # From 12 on both work: 3 blocks in 4 seconds. The first of 8 is of a warming job.
    (tmp_path / "1").write_text("8 0 100 0\n11 0 100 0\n13 200 100 0\n16 400 50 0\n")
    (tmp_path / "2").write_text("12 100 100 0\n15 300 100 0\n")
    outcome = runs.Outcome(5.0, 20.0, {"begin": 10.0, "end": 17.0}, private=[{1: 10, 2: 20, 3: 5}, {1: 15, 3: 50}])
    figures = read(outcome, tmp_path, 450)
    assert figures["error"] == ""
    assert figures["steady"] == 250 / 4
    assert (figures["first"], figures["job"], figures["span"]) == (6.0, 7.0, 5.0)
    assert (figures["private"], figures["workers_private"]) == (65, 30)
    assert "it finished 450 of 460 rows" in read(outcome, tmp_path, 460)["error"]


def test_bars_compare_the_same_rounds() -> None:
    def system(*steady: float) -> dict[str, Any]:
        same = {"error": "", "first": 1.0, "workers_private": 1}
        return {"runs": [same | {"steady": rate} for rate in steady]}

    # A machine that becomes slower slows both: the shares are 0.9, 1.0 and 1.0.
    systems = {"zcinfer": system(90, 50, 20), "plain torch, all cores": system(100, 50, 20)}
    results = {"workloads": {"MLP": {"systems": systems}}, "overhead": {}}
    (bar,) = bars_of(results).values()
    assert bar == {"asked": 0.95, "most": False, "found": 1.0, "met": True, "unit": ""}
    for run in systems["zcinfer"]["runs"][1:]:
        run["error"] = "failed"
    (bar,) = bars_of(results).values()
    assert not bar["met"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run(tmp_path: Path) -> None:
    """A few rows of ours, of the limit and of a framework, and what ours costs by itself."""
    bench = Bench(tmp_path, quick=True)
    systems = ["plain torch, all cores", "zcinfer, file store", "dask.delayed(model)"]
    results: dict[str, Any] = {"cores": bench.cores, "workloads": {"MLP": bench.workload("MLP", systems, 30_000)}}
    results["overhead"] = bench.overhead(lambda name: name != "many_blocks")
    results["bars"] = bars_of(results)
    made = results["workloads"]["MLP"]["systems"]
    assert [run["error"] for system in systems for run in made[system]["runs"]] == ["", "", ""]
    assert made["zcinfer, file store"]["runs"][0]["equal"]
    again = json.loads(json.dumps(results))
    assert [table.title for table in tables(again)][:3] == [
        "MLP", "200 blocks of a model that does nothing", "Nine variants of one BERT",
    ]  # fmt: skip
    assert len(figures(again)) == 3
