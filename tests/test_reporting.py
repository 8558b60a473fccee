"""``zc.report``: the figures of a block are the run's own, whoever computes it and however it ends."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from torch import nn

import zcinfer as zc
from zcinfer import reporting
from zcinfer.errors import BlockError, OutputError, SettingsError
from zcinfer.recording import Recording

pytestmark = pytest.mark.usefixtures("registry")

EVIL = "<img src=x onerror=alert(1)>"


def refuse_nan(rows: NDArray[Any]) -> NDArray[Any]:
    if np.isnan(rows).any():
        raise ValueError(f"no {EVIL} here")
    return rows


@pytest.fixture
def model() -> str:
    torch.manual_seed(0)
    zc.put(nn.Linear(4, 2).eval(), "linear")
    return "linear"


def rows(bad: int | None = None) -> NDArray[Any]:
    x = np.ones((40, 4), np.float32)
    if bad is not None:
        x[bad] = np.nan
    return x


def blocks(bad: int | None = None) -> da.Array:
    return da.from_array(rows(bad), chunks=(4, 4))


class Told:
    """What a report says."""

    def __init__(self, page: Path):
        self.html = page.read_text()
        self.state, *self.seconds = map(json.loads, page.with_suffix(".jsonl").read_text().splitlines())
        (self.sentence,) = (re.sub("<.*?>", "", found) for found in re.findall("<h1>.*?</h1>", self.html))
        self.notes = re.findall('<p class="said">(.*?)</p>', self.html)

    def jobs(self, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(job[name] for name in names) for job in self.state["jobs"]]

    def sums(self, *names: str) -> list[tuple[float, ...]]:
        return [tuple(job["sums"][name] for name in names) for job in self.state["jobs"]]

    def rows(self) -> float:
        """Rows of all seconds; the same of all devices."""
        total = sum(second["rows"] for second in self.seconds)
        assert total == sum(device["rows"] for second in self.seconds for device in second["devices"].values())
        return float(total)


COUNTS = ("state", "total", "done", "failed", "cancelled", "before")

# In one process


def test_arrays_in_memory_and_on_threads_are_told(model: str, tmp_path: Path) -> None:
    zc.predict(model, rows())
    zc.predict(model, blocks() + 1).compute(num_workers=1)  # a second thread would load a module of its own
    with zc.report(tmp_path / "run.html") as page:
        zc.predict(model, rows())
        zc.predict(model, rows()[:3])
        zc.predict(model, blocks()).sum().compute(num_workers=1)
        dask.compute(*zc.predict([model, model], blocks() + 2), scheduler="sync")
    zc.predict(model, rows())
    told = Told(page)
    assert told.jobs("name", *COUNTS) == [
        ("linear@1", "finished", 2, 2, 0, 0, 0),
        ("linear@1", "finished", 10, 10, 0, 0, 0),
        ("linear@1", "finished", 10, 10, 0, 0, 0),
    ]
    assert told.sums("rows", "bytes_in", "errors") == [(43, 43 * 16, 0), (40, 640, 0), (80, 1280, 0)]
    assert told.rows() == 163
    (loads,) = told.state["models"]
    assert loads["counts"] == [0, 0, 0, 32]  # the model had been loaded before
    assert told.state["report"]["error"] is None
    assert told.sentence.startswith("Finished linear@1: 10 blocks, 80 rows, in ")


def test_a_job_and_its_rest_are_told(model: str, tmp_path: Path) -> None:
    x = rows(bad=33)
    zarr.create_array(tmp_path / "x.zarr", data=x, chunks=(4, 4))

    def run() -> None:
        zc.run(model, tmp_path / "x.zarr", tmp_path / "y.zarr", preprocess=refuse_nan, batch_size=4, progress=False)

    with pytest.raises(BlockError, match="onerror"), zc.report(tmp_path / "run.html") as page:
        run()
    told = Told(page)
    assert told.jobs("name", *COUNTS) == [("linear@1 into y.zarr", "failed", 10, 8, 1, 1, 0)]
    assert told.sums("rows", "blocks", "errors") == [(32, 8, 1)]
    (error,) = told.state["jobs"][0]["errors"]
    assert error["message"] == f"ValueError: no {EVIL} here"
    assert error["places"] == ["block 8, rows 32–35, of linear@1"]
    assert "refuse_nan" in error["traceback"]
    assert told.sentence.startswith("Failed linear@1 into y.zarr: 1 block failed, 8 of 10 blocks done")
    assert told.state["report"]["error"].startswith("BlockError: block 8")
    assert "The program was stopped by BlockError: block 8" in told.notes[0]
    assert EVIL not in told.html
    with pytest.raises(BlockError), zc.report(page):
        run()
    assert Told(page).jobs(*COUNTS) == [("failed", 2, 0, 1, 1, 8)]


def test_a_graph_that_fails_is_told(model: str, tmp_path: Path) -> None:
    with pytest.raises(BlockError), zc.report(tmp_path / "run.html") as page:
        zc.predict(model, blocks(bad=17), preprocess=refuse_nan, batch_size=4).compute(scheduler="threads")
    told = Told(page)
    ((state, total, done, failed, cancelled, _),) = told.jobs(*COUNTS)
    assert (state, total, failed, done + cancelled) == ("failed", 10, 1, 9)
    assert told.sums("errors") == [(1,)]


def test_a_graph_that_fails_before_the_model_is_told(model: str, tmp_path: Path) -> None:
    def broken(block: NDArray[Any]) -> NDArray[Any]:
        raise OSError("the disk is gone")

    x = blocks().map_blocks(broken, meta=np.empty((0, 0), np.float32))
    with pytest.raises(OSError, match="gone"), zc.report(tmp_path / "run.html") as page:
        zc.predict(model, x, batch_size=4).compute(scheduler="sync")
    told = Told(page)
    assert told.jobs(*COUNTS) == [("failed", 10, 0, 1, 9, 0)]
    assert told.state["jobs"][0]["errors"][0]["message"] == "the disk is gone"


def fail_after(page: Path, work: Callable[[], object]) -> None:
    with zc.report(page):
        work()
        raise RuntimeError(f"my own {EVIL}")


def test_an_error_of_the_program_is_told(model: str, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    with pytest.raises(RuntimeError, match="my own"):
        fail_after(page, lambda: zc.predict(model, rows()))
    told = Told(page)
    assert told.jobs(*COUNTS) == [("finished", 1, 1, 0, 0, 0)]
    assert told.notes[0] == "The program was stopped by RuntimeError: my own &lt;img src=x onerror=alert(1)&gt;"
    with pytest.raises(SystemExit), zc.report(page):
        raise SystemExit(0)
    assert Told(page).notes[0] == "Nothing was predicted."


def test_series_go_on_from_second_to_second(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "_EVERY", 0.02)
    with zc.report(tmp_path / "run.html") as page:
        deadline = time.monotonic() + 0.5
        calls = 0
        while time.monotonic() < deadline:
            zc.predict(model, rows())
            calls += 1
    told = Told(page)
    assert told.jobs("done") == [(calls,)]
    assert told.rows() == 40 * calls
    assert len(told.seconds) > 2
    assert sum(second["rows"] > 0 for second in told.seconds) > 2


def test_reports_may_be_within_each_other(model: str, tmp_path: Path) -> None:
    with zc.report(tmp_path / "outer.html") as outer:
        zc.predict(model, rows())
        with zc.report(tmp_path / "inner.html") as inner:
            zc.predict(model, rows()).sum()
    assert [Told(page).rows() for page in (outer, inner)] == [80, 40]
    assert threading.active_count() == len(threading.enumerate())
    assert not [thread for thread in threading.enumerate() if thread.name == "zcinfer-report"]


def test_the_page_loads_nothing(model: str, tmp_path: Path) -> None:
    with zc.report(tmp_path / "run.html") as page:
        zc.predict(model, rows())
    html = re.sub("<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert "<script" in page.read_text()
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//[^"')\s>]*""", html)
    assert not re.findall(r"<script[^>]*src", page.read_text())


# What is refused


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/run.html", "cannot be written to .*missing: No such file or directory. Make the directory"),
        ("folder.html", "folder.html is a directory"),
        ("taken.html", "taken.jsonl is a directory"),
        ("run", "a report is an HTML file, and run is not called one: run.html"),
        ("/proc/run.html", "cannot be written to /proc"),
    ],
)
def test_a_path_is_refused_before_any_work(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "taken.jsonl").mkdir()
    with pytest.raises(OutputError, match=message), zc.report(tmp_path / path):
        raise AssertionError("the block was entered")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["folder.html", "taken.jsonl"]


def test_it_needs_the_extra_and_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        dask.config.set({"zcinfer.telemetry": False}),
        pytest.raises(SettingsError, match=r"zcinfer\.telemetry is false"),
        zc.report(tmp_path / "run.html"),
    ):
        raise AssertionError("the block was entered")
    monkeypatch.setattr("zcinfer.activation.is_installed", lambda: False)
    with pytest.raises(SettingsError, match=r"pip install 'zcinfer\[dashboard\]'"), zc.report(tmp_path / "run.html"):
        raise AssertionError("the block was entered")


def test_a_report_that_cannot_be_written_hides_no_error(model: str, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(RuntimeError, match="my own"):
        fail_after(folder / "run.html", folder.rmdir)
    assert f"the report {folder / 'run.html'} could not be written: No such file or directory" in caplog.text
    folder.mkdir()
    with pytest.raises(OutputError, match="could not be written"), zc.report(folder / "run.html"):
        folder.rmdir()


# On a cluster that knows nothing of zcinfer


@pytest.fixture
def client() -> Iterator[Client]:
    """Two workers in this process, which count together."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", memory_limit=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_cluster_tells_of_its_jobs(client: Client, model: str, tmp_path: Path) -> None:
    zc.predict(model, blocks()).compute()
    with Client(client.scheduler.address, set_as_default=False) as other, zc.report(tmp_path / "run.html") as page:
        y = zc.predict(model, blocks())
        y.compute()
        y.sum().compute()
        other.compute(zc.predict(model, blocks() + 1)).result()
        zc.run(model, blocks() + 2, tmp_path / "y.zarr", progress=False)
    zc.predict(model, blocks() + 3).compute()
    told = Told(page)
    assert told.jobs("name", *COUNTS) == [
        ("linear@1", "finished", 10, 10, 0, 0, 0),
        ("linear@1", "finished", 10, 10, 0, 0, 0),
        ("linear@1 into y.zarr", "finished", 10, 10, 0, 0, 0),
    ]
    assert told.sums("rows", "blocks", "bytes_in", "errors") == [(40, 10, 640, 0)] * 3
    assert told.rows() == 160  # of the devices, whose they are
    assert told.notes == []
    assert told.sentence.startswith("Finished linear@1 into y.zarr: 10 blocks, 40 rows, in ")


def test_a_failure_on_a_cluster_is_told_and_goes_on(client: Client, model: str, tmp_path: Path) -> None:
    with pytest.raises(BlockError, match="onerror"), zc.report(tmp_path / "run.html") as page:
        zc.predict(model, blocks(bad=17), preprocess=refuse_nan, batch_size=4).compute()
    told = Told(page)
    ((state, total, done, failed, cancelled, _),) = told.jobs(*COUNTS)
    assert (state, total, failed, done + cancelled) == ("failed", 10, 1, 9)
    assert told.state["jobs"][0]["errors"][0]["message"] == f"ValueError: no {EVIL} here"
    assert "refuse_nan" in told.state["jobs"][0]["errors"][0]["traceback"]
    assert EVIL not in told.html


def test_of_a_scheduler_that_is_lost_the_last_is_told(
    client: Client, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "_EVERY", 0.02)
    with zc.report(tmp_path / "run.html") as page:
        zc.predict(model, blocks()).compute()
        seen = threading.Event()
        take = Recording.take

        def taken(self: Any, snapshot: Any) -> None:
            take(self, snapshot)
            if [job["done"] for job in self.jobs] == [10]:
                seen.set()

        monkeypatch.setattr(Recording, "take", taken)
        assert seen.wait(20)
        client.cluster.close()
    told = Told(page)
    assert told.jobs(*COUNTS) == [("finished", 10, 10, 0, 0, 0)]
    assert re.match(
        r"The scheduler did not answer at the end \(.+\): this was known of it \d\.\d s before\.", told.notes[0]
    )


_go = threading.Event()


def held(block: NDArray[Any]) -> NDArray[Any]:
    _go.wait(30)
    return block


def test_what_runs_when_the_scheduler_is_lost_is_lost(
    client: Client, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "_EVERY", 0.02)
    seen = threading.Event()
    take = Recording.take

    def taken(self: Any, snapshot: Any) -> None:
        take(self, snapshot)
        if any(job["running"] for job in self.jobs):
            seen.set()

    monkeypatch.setattr(Recording, "take", taken)
    x = blocks().map_blocks(held, meta=np.empty((0, 0), np.float32))
    with zc.report(tmp_path / "run.html") as page:
        future = client.compute(zc.predict(model, x, batch_size=4))
        assert seen.wait(20)
        threading.Timer(0.2, _go.set).start()
        client.cluster.close()
        del future
    assert Told(page).sentence == "Lost linear@1: 0 of 10 blocks done, its scheduler has ended"


def test_a_cluster_of_the_block_itself_is_refused(model: str, tmp_path: Path) -> None:
    with (
        pytest.raises(SettingsError, match="inside the block of the cluster"),
        zc.report(tmp_path / "run.html") as page,
        Client(processes=False, dashboard_address="127.0.0.1:0"),
    ):
        zc.predict(model, blocks())
    assert Told(page).notes[0].startswith("The program was stopped by SettingsError")
    zc.predict(model, rows())


@pytest.mark.slow
def test_what_the_program_computes_itself_is_said(model: str, tmp_path: Path) -> None:
    with zc.LocalCluster(n_workers=1, dashboard=False) as cluster, cluster.get_client():
        with zc.report(tmp_path / "run.html") as page:
            zc.predict(model, rows())
            zc.predict(model, blocks()).compute()
        told = Told(page)
        assert told.notes == ["1 blocks of linear@1 were computed by the program itself, and are not in these figures."]
        assert told.sums("rows", "blocks") == [(40, 10)]
        assert told.rows() == 40
        (loads,) = told.state["models"]
        assert sum(loads["counts"]) == 10
        assert sum(loads["counts"][:3]) in (1, 2)  # by each of the worker's threads that had a block
