"""What the scheduler tells of jobs: totals that are exact from the start, each block once, whatever happens."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client
from distributed.utils_test import captured_logger
from hypothesis import given
from hypothesis import strategies as st
from numbered import save
from processes import wait_until
from torch import nn

import zcinfer as zc
from zcinfer.devicestate import COLUMNS, HOUR, Device, Ring
from zcinfer.errors import BlockError
from zcinfer.jobstate import JobState
from zcinfer.observer import METRIC, Observer
from zcinfer.telemetry import PHASES, Job

pytestmark = pytest.mark.usefixtures("registry")

# On a cluster


class Held(nn.Module):
    """Waits as long as its file is there, having left its process id in another; refuses negative rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folder = Path(self.folder)
        if type(x) is torch.Tensor:
            if (folder / "hold").exists() and not (folder / "held").exists():
                mine = folder / f"held-{os.getpid()}"
                mine.write_text(str(os.getpid()))
                mine.rename(folder / "held")
                deadline = time.monotonic() + 60
                while (folder / "hold").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
            if (x < 0).any():
                raise ValueError("negative")
        return self.layer(x)


def snapshot(client: Client, since: int = 0, whole: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = client.sync(client.scheduler.zcinfer_snapshot, since=since, whole=whole)
    return found


def last(client: Client) -> dict[str, Any]:
    return dict(snapshot(client)["jobs"][-1])


def counts(job: dict[str, Any]) -> tuple[int, ...]:
    return tuple(job[name] for name in ("total", "done", "failed", "retried", "queued", "running", "cancelled"))


def ones(rows: int = 40) -> da.Array:
    return da.ones((rows, 4), chunks=(4, 4), dtype="f4")


@pytest.fixture
def model() -> str:
    zc.put(nn.Linear(4, 2).eval(), "linear")
    return "linear"


@pytest.mark.parametrize(
    ("compute", "blocks"),
    [
        (lambda x: zc.predict("linear", x).compute(), 10),
        (lambda x: zc.predict("linear", x).sum().compute(), 10),
        (lambda x: (zc.predict("linear", x)[:10] + 1).sum().compute(), 3),
        (lambda x: zc.predict("linear", zc.predict("square", x)).max().compute(), 10),
        (lambda x: dask.compute(*zc.predict(["linear", "square"], x)), 10),
        (lambda x: zc.predict_by({0: "linear", 1: "linear"}, x, by=np.zeros(40, int)).compute(), 10),
        (lambda x: x.map_blocks(p := zc.Predictor("linear"), **p.like(x)).sum().compute(), 10),
    ],
    ids=["array", "sum", "slice", "two models in a row", "ensemble", "switch", "map_blocks"],
)
def test_total_is_exact(client: Client, model: str, compute: Callable[[Any], Any], blocks: int) -> None:
    zc.put(nn.Linear(4, 4).eval(), "square")
    before = len(snapshot(client)["jobs"])
    compute(ones())
    jobs = snapshot(client)["jobs"][before:]
    assert {counts(job) for job in jobs} == {(blocks, blocks, 0, 0, 0, 0, 0)}
    assert {job["state"] for job in jobs} == {"finished"}
    assert all(job["begun"] <= job["last"] <= job["ended"] for job in jobs)


def test_models_and_names_are_told(client: Client, model: str, tmp_path: Path) -> None:
    zc.put(nn.Linear(4, 4).eval(), "square")
    dask.compute(*zc.predict([model, "square"], ones()))
    assert (last(client)["models"], last(client)["name"]) == (("linear@1", "square@1"), "linear@1, square@1")
    zc.run(model, save(tmp_path / "x.zarr", np.ones((23, 4), np.float32)), tmp_path / "y.zarr", progress=False)
    assert (last(client)["name"], last(client)["total"]) == ("linear@1 into y.zarr", 5)


def test_sums_are_what_workers_counted(client: Client, model: str) -> None:
    zc.predict(model, ones(80), batch_size=2).compute()
    wait_until(lambda: last(client)["sums"]["blocks"] == 20, 10)
    job = last(client)
    assert (job["sums"]["rows"], job["sums"]["batches"], job["sums"]["bytes_in"]) == (80, 40, 80 * 16)
    assert 0 < job["sums"]["computing"] < 10
    found = snapshot(client, whole=True)
    assert sum(device["totals"]["rows"] for device in found["devices"]) == sum(found["columns"]["rows"])
    assert sum(found["columns"]["rows"]) == sum(sum(history["rows"]) for history in found["history"].values())
    found = snapshot(client)
    assert len(found["devices"]) == 2
    assert all(device["private"] > 1e6 for device in found["devices"])
    later = found["seconds"][-2]
    assert snapshot(client, later)["seconds"][0] == found["seconds"][-1]


def test_a_restart_tells_what_was_done_before(client: Client, tmp_path: Path) -> None:
    zc.put(Held(tmp_path).eval(), "held")
    x = np.ones((23, 4), np.float32)
    x[22] = -1
    source = save(tmp_path / "x.zarr", x)
    with pytest.raises(BlockError, match="negative"):
        zc.run("held", source, tmp_path / "y.zarr", progress=False)
    wait_until(lambda: last(client)["state"] == "failed", 10)
    failed = last(client)
    assert (failed["failed"], failed["before"]) == (1, 0)
    (error,) = failed["errors"]
    assert error["message"] == "in Held: ValueError: negative"
    assert (error["count"], error["places"]) == (1, ("block 4, rows 20–22, of held@1",))
    wait_until(lambda: "in forward" in last(client)["errors"][0]["traceback"], 10)
    with pytest.raises(BlockError, match="negative"):
        zc.run("held", source, tmp_path / "y.zarr", progress=False)
    wait_until(lambda: last(client)["state"] == "failed", 10)
    again = last(client)
    assert failed["done"] <= again["before"] == 5 - again["total"]  # what ran on when it failed is done, too


def blocks_of_last(dask_scheduler: Any) -> list[Any]:
    """Tasks with blocks of the last job."""
    observer = dask_scheduler.plugins[Observer.name]
    return [key for key, jobs in observer._owners.items() if any(job.number == max(observer.jobs) for job in jobs)]


def sent(dask_scheduler: Any) -> list[Any]:
    """Each task that went to a worker, as the scheduler has noted it."""
    return [row[0] for row in dask_scheduler.transition_log if row[2] == "processing"]


@pytest.mark.slow
def test_a_block_that_is_done_twice_is_one(client: Client, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    zc.put(Held(tmp_path).eval(), "held")
    future = client.compute(zc.predict("held", ones()).sum())
    held = tmp_path / "held"
    wait_until(lambda: held.exists() and held.read_text(), 30)
    assert last(client)["running"] >= 1
    assert last(client)["state"] == "running"
    killed = int(held.read_text())
    blocks = client.run_on_scheduler(blocks_of_last)
    (tmp_path / "hold").unlink()
    os.kill(killed, signal.SIGKILL)
    future.result()
    total, done, failed, retried, *rest = counts(last(client))
    assert (total, done, failed, rest) == (10, 10, 0, [0, 0, 0])
    log = client.run_on_scheduler(sent)
    assert len(blocks) == 10
    assert retried == last(client)["done_again"] == sum(log.count(block) > 1 for block in blocks) >= 1
    gone = [device for device in snapshot(client)["devices"] if device["gone"] is not None]
    assert gone


def test_a_job_that_is_given_up_is_cancelled(client: Client, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    zc.put(Held(tmp_path).eval(), "held")
    future = client.compute(zc.predict("held", ones()).sum())
    held = tmp_path / "held"
    wait_until(lambda: held.exists() and held.read_text(), 30)
    future.cancel()
    wait_until(lambda: last(client)["state"] == "cancelled", 10)
    (tmp_path / "hold").unlink()


def test_installing_twice_changes_nothing(client: Client, model: str) -> None:
    zc.predict(model, ones()).compute()
    jobs = len(snapshot(client)["jobs"])
    client.register_plugin(Observer())
    zc.predict(model, ones() + 1).compute()
    assert len(snapshot(client)["jobs"]) == jobs + 1


def test_other_work_is_no_job(client: Client, model: str) -> None:
    zc.predict(model, ones()).compute()
    before = len(snapshot(client)["jobs"])
    ones().sum().compute()
    client.submit(sum, [1, 2]).result()
    assert len(snapshot(client)["jobs"]) == before


def test_nonsense_from_a_worker_does_not_reach_the_scheduler(client: Client, model: str) -> None:
    def break_it(dask_worker: Any) -> None:
        dask_worker.metrics[METRIC] = lambda _: {"epoch": "nonsense"}

    def failed(dask_scheduler: Any) -> list[str]:
        return sorted(dask_scheduler.plugins[Observer.name].failed)

    def mend(dask_worker: Any) -> None:
        from zcinfer.worker import dask_setup

        dask_setup(dask_worker)

    client.run(break_it)
    wait_until(lambda: client.run_on_scheduler(failed) == ["collect"], 10)
    zc.predict(model, ones()).compute()
    assert counts(last(client))[:2] == (10, 10)
    client.run(mend)


# Without a cluster


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([
    "waiting", "queued", "no-worker", "processing", "memory", "erred", "released", "forgotten",
]))))  # fmt: skip
def test_no_sequence_of_states_makes_counts_wrong(moves: list[tuple[int, str]]) -> None:
    blocks = {number: number + 1 for number in range(5)}
    state = JobState(1, Job("key", "name"), ["m@1"], blocks, 0, 0.0)
    done = 0
    sent: list[int] = []
    for now, (key, finish) in enumerate(moves):
        if finish == "processing" and state.ended is None:
            sent.append(key)
        state.moved(key, finish, float(now))
        told = state.plain()
        places = [told[name] for name in ("queued", "running", "done", "failed", "cancelled")]
        assert sum(places) == told["total"] == 15
        assert min(places) >= 0
        assert told["done"] >= done
        assert told["retried"] == sum(blocks[key] for key in blocks if sent.count(key) > 1)
        assert told["done_again"] <= min(told["retried"], told["done"])
        done = told["done"]
    if all(("memory") in [finish for number, finish in moves if number == key][:1] for key in blocks):
        assert state.state == "finished"


def test_a_block_that_went_to_a_worker_again_is_retried_once() -> None:
    state = JobState(1, Job("key", "name"), [], dict.fromkeys("abcd", 2), 0, 0.0)
    moves = [
        *(("a", "processing"), ("a", "memory")),
        # Its worker was lost, twice
        *(("b", "processing"), ("b", "waiting"), ("b", "processing"), ("b", "waiting"), ("b", "processing")),
        # The result was lost with its worker
        *(("c", "processing"), ("c", "memory"), ("c", "released"), ("c", "waiting"), ("c", "processing")),
        ("d", "processing"),
    ]
    for key, finish in moves:
        state.moved(key, finish, 1.0)
    told = state.plain()
    assert (told["retried"], told["done_again"], told["done"], told["running"]) == (4, 2, 4, 4)
    for key in "bcd":
        state.moved(key, "memory", 2.0)
    told = state.plain()
    assert (told["retried"], told["done_again"], told["done"], told["state"]) == (4, 4, 8, "finished")


def test_pace_is_of_the_last_blocks() -> None:
    blocks = dict.fromkeys(range(300), 1)
    state = JobState(1, Job("key", "name"), [], blocks, 0, 0.0)
    assert state.seconds_a_block is None
    for key in range(200):
        state.moved(key, "memory", 10.0 * key)
    for key in range(200, 300):
        state.moved(key, "memory", 2000.0 + key)
    assert state.seconds_a_block == pytest.approx(1.0)
    assert (state.state, state.ended) == ("finished", 2299.0)


def test_errors_of_one_message_are_one() -> None:
    state = JobState(1, Job("key", "name"), [], dict.fromkeys(range(300), 1), 0, 0.0)
    for key in range(300):
        state.erred(key, f"BlockError('block {key}, rows 0–1, of m@1: cause: {key % 60}')", "trace", float(key))
    state.told("block 7, rows 0–1, of m@1: cause: 7", "the whole trace")
    errors = state.plain()["errors"]
    assert len(errors) == 50
    assert (errors[0]["message"], errors[0]["count"]) == ("cause: 0", 5)
    assert errors[0]["places"] == [f"block {key}, rows 0–1, of m@1" for key in range(0, 300, 60)]
    assert [error["traceback"] for error in errors[6:9]] == ["trace", "the whole trace", "trace"]
    other = JobState(1, Job("key", "name"), [], {0: 1}, 0, 0.0)
    other.erred(("sum", 0), "ZeroDivisionError('division: by zero')", "trace", 0.0)
    assert other.plain()["errors"][0]["places"] == ["('sum', 0)"]
    assert other.plain()["errors"][0]["message"] == "division: by zero"


_clock = itertools.count(1.0)


def counted(epoch: str, rows: int) -> dict[str, Any]:
    work = dict.fromkeys(COLUMNS, 0) | {"rows": rows, "job": "j", "model": "m@1", "seconds": [0.0] * len(PHASES)}
    return {
        "epoch": epoch, "time": next(_clock), "work": [work], "loads": [], "failures": [], "private": 1, "shared": 2
    }  # fmt: skip


def test_counters_of_a_worker_that_was_started_anew_begin_anew() -> None:
    device = Device("tcp://a:1", "0", "a")
    added = []
    for epoch, rows in [("a", 5), ("a", 5), ("a", 9), ("b", 2), ("b", 3)]:
        added += [more[0] for _, more in device.take(counted(epoch, rows), 0.0)]
    assert added == [5, 4, 2, 1]
    assert device.plain()["totals"]["rows"] == 12


def work(job: str, blocks: int) -> dict[str, Any]:
    told = counted("a", 10 * blocks)
    told["work"][0] |= {"job": job, "blocks": blocks, "computing": 0.0}
    told["work"][0]["seconds"] = [0.5 * blocks] * len(PHASES)
    return told


def test_an_array_that_is_computed_twice_is_two_jobs_with_rows_of_their_own() -> None:
    observer = Observer()
    observer.scheduler = SimpleNamespace(workers={"a": SimpleNamespace(name=0, host="h", nthreads=1, metrics={})})
    metrics, processing = observer.scheduler.workers["a"].metrics, []
    observer.scheduler.workers["a"].processing = processing

    def rows() -> list[float]:
        return [job["sums"]["rows"] for job in observer.told()["jobs"]]

    metrics[METRIC] = work("other", 7)
    first, second, third = (JobState(0, Job("j", "n"), ["m@1"], dict.fromkeys(range(10), 1), 0, 0.0) for _ in range(3))
    observer.keep(first)
    for key in range(10):
        first.moved(key, "memory", 1.0)
    observer.keep(second)
    metrics[METRIC] = work("j", 4)
    assert rows() == [40, 0]
    metrics[METRIC] = work("j", 13)  # what comes late belongs to both
    assert rows() == [100, 30]
    metrics[METRIC] = work("j", 14)
    assert rows() == [100, 40]
    observer.keep(third)  # waits for the same blocks as the second
    metrics[METRIC] = work("j", 20)
    assert rows() == [100, 100, 60]
    assert sum(observer.sums[1]) == pytest.approx(100 + 10 + 0.5 * 10 * len(PHASES))


def test_a_ring_forgets_after_an_hour() -> None:
    ring = Ring(2)
    for second in range(1_000_000, 1_000_000 + HOUR + 10):
        ring.put(second, (second % 7, 1))
    seconds, columns = ring.since(0)
    assert (seconds[0], seconds[-1], len(seconds)) == (1_000_010, 1_000_000 + HOUR + 9, HOUR)
    assert columns[0] == [second % 7 for second in seconds]
    assert ring.since(seconds[-3])[0] == seconds[-2:]


def test_a_thousand_workers_cost_little() -> None:
    class Worker:
        def __init__(self, number: int) -> None:
            self.name, self.host, self.nthreads = number, f"host{number}", 2
            self.metrics: dict[str, Any] = {}

    class Scheduler:
        def __init__(self) -> None:
            self.workers = {f"tcp://{number}": Worker(number) for number in range(1000)}

    observer = Observer()
    observer.scheduler = Scheduler()
    rounds, seconds = 10, 0.0
    for number in range(1, rounds + 1):
        for worker in observer.scheduler.workers.values():
            worker.metrics[METRIC] = counted("a", number * 10)
        begin = time.process_time()
        observer.sample()
        seconds += time.process_time() - begin
    assert observer.failed == set()
    assert observer.others["j"][0] == 1000 * rounds * 10
    print(f"{seconds / rounds:.1%} of the scheduler's time")
    assert seconds / rounds < 0.05


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with captured_logger("distributed.worker"):
        yield
