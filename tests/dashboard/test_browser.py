"""The page in a real browser, beside live jobs: what it says is what is so."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import psutil
import pytest
from distributed import Client, Event, wait
from numpy.typing import NDArray
from processes import wait_until
from torch import nn

import zcinfer as zc

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registry")]

ROWS = 10
EVIL = "<img src=x onerror=alert(1)>"


def held(block: NDArray[Any], event: str, every: int) -> NDArray[Any]:
    """Lets blocks through, but the last of ``every`` waits for the event. Refuses a row of -1."""
    if (block == -1).any():
        raise ValueError(f"no {EVIL} here")
    number = int(block.max()) // ROWS
    if every and number % every == every - 1 and not Event(event).wait("60s"):
        raise TimeoutError(event)
    return block


class Job:
    """Blocks of ten rows, of which one in ``every`` waits; 0: none does."""

    def __init__(self, client: Client, blocks: int, every: int = 0, bad: int | None = None):
        self.client = client
        self.event = f"go-{time.monotonic_ns()}"
        x = np.repeat(np.arange(blocks * ROWS, dtype=np.float32)[:, None], 3, axis=1)
        if bad is not None:
            x[bad * ROWS] = -1
        arrays = da.from_array(x, chunks=(ROWS, 3)).map_blocks(
            held, event=self.event, every=every, meta=np.empty((0, 0), np.float32)
        )
        self.future = client.compute(zc.predict("embed", arrays, batch_size=ROWS))

    def go(self) -> None:
        Event(self.event, client=self.client).set()
        wait(self.future)

    def told(self) -> dict[str, Any]:
        """What the scheduler knows of it."""
        return dict(self.client.sync(self.client.scheduler.zcinfer_snapshot)["jobs"][-1])


@pytest.fixture
def client() -> Iterator[Client]:
    with zc.LocalCluster(n_workers=2, dashboard=False) as cluster, cluster.get_client() as client:
        zc.put(nn.Linear(3, 1).eval(), "embed")
        yield client


def done(job: Job) -> int:
    return int(job.told()["done"])


def test_it_follows_a_job_from_its_first_block_to_its_last(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any], registry: Path
) -> None:
    here = tab()
    here.open(serve(client.scheduler.address).link)
    assert here.state("idle") == "No jobs yet: 2 workers ready"
    job = Job(client, 40, every=1)
    assert here.state("waiting").startswith("Waiting for a model to run embed@1: 0 of 40 blocks")
    job.go()
    assert re.fullmatch(
        r"Finished embed@1: 40 blocks, (400 rows, )?in [\d.]+ (s|min \d+ s), none failed", here.state("finished")
    )
    wait_until(lambda: "40 blocks, 400 rows, in" in here.text("h1"))
    # A page that was not there when it ran says the same.
    for one in (here, tab()):
        if one is not here:
            one.open(here.page.url)
        wait_until(lambda one=one: "400" in one.text("#part-jobs tbody"))  # type: ignore[misc]
        told = job.told()
        assert (told["done"], told["sums"]["rows"]) == (40, 400)
        assert re.search(r"embed@1 Finished 40 of 40 400 ", one.text("#part-jobs tbody"))
        assert one.text("#part-progress") == "40 done 0 retried 0 failed 0 running 0 queued"
        assert "400 rows" in one.text("#part-rates")
        assert "All zero-copy" in one.text("#part-tiles")
        hits = sum(loads["counts"][3] for loads in client.sync(client.scheduler.zcinfer_snapshot)["models"])
        assert f"found loaded {hits} times" in one.text("#part-models")
        wait_until(lambda one=one: "in the page cache" in one.text("#part-models .store"))  # type: ignore[misc]
        assert f"file:{registry}" in one.text("#part-models .store")
        assert one.page.locator(".chart canvas").count()
        one.clean()


def test_it_says_running_stalled_and_how_long_it_takes(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    here = tab()
    here.open(serve(client.scheduler.address).link)
    job = Job(client, 40, every=6)
    said = here.state("stalled")
    told = job.told()
    assert 4 <= told["done"] < 40
    assert said.startswith(
        f"Stalled: embed@1: {told['done']} of 40 blocks, {told['done'] * 100 // 40} %, nothing finished for "
    )
    assert said.endswith("2 of 2 devices busy, none failed")
    expected = f"{told['done']} done 0 retried 0 failed {told['running']} running {told['queued']} queued"
    assert here.text("#part-progress") == expected
    # Paused, it stays as it is.
    here.page.click("#pause")
    job.go()
    wait_until(lambda: done(job) == 40)
    other = tab()
    other.open(here.page.url)
    other.state("finished")
    assert here.text("h1").startswith("Stalled")
    here.page.click("#pause")
    here.state("finished")
    here.clean()
    other.clean()


def test_a_failed_block_is_told_with_its_traceback_and_as_text(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    here = tab()
    here.open(serve(client.scheduler.address).link)
    job = Job(client, 8, bad=5)
    wait(job.future)
    assert here.state("failed").startswith("Failed embed@1: 1 block failed, ")
    assert "1 block" in here.text("#part-tiles")
    assert EVIL in here.text("#part-errors .message")
    here.page.click("#part-errors summary")
    assert f"no {EVIL} here" in here.text("#part-errors")
    assert "def held" in here.text("#part-errors pre") or "in held" in here.text("#part-errors pre")
    # What comes after it leaves the traceback open.
    Job(client, 4).go()
    here.state("finished")
    assert here.page.evaluate("document.querySelector('#part-errors details').open")
    assert here.page.evaluate("document.querySelectorAll('img').length") == 0
    here.clean()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scheduler(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_scheduler_may_die_and_come_back(tab: Callable[..., Any], serve: Callable[..., Any]) -> None:
    port = free_port()
    here = tab()
    here.open(serve(f"tcp://127.0.0.1:{port}").link)
    assert here.state("connecting").startswith(f"Connecting to tcp://127.0.0.1:{port}")
    running = scheduler(port)
    try:
        # It had no plugin of ours, and has now.
        assert here.state("idle") == "No jobs yet: no workers yet"
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert here.state("disconnected").endswith("trying again")
        running = scheduler(port)
        here.state("idle")
        here.clean()
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_anybody_can_read_it(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any], scheme: str, width: int
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    wait(Job(client, 8, bad=5).future)
    job = Job(client, 40, every=6)
    here = tab(width, 800, scheme)
    here.open(serve(client.scheduler.address).link)
    here.state("stalled")
    here.page.click("#part-errors summary")
    found = Axe().run(here.page).response["violations"]
    assert [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found] == []
    # Nothing makes the page wider than it is.
    assert here.page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:  # all that matters is seen without scrolling
        for part in ("#part-state", "#part-progress", "#part-tiles", ".chart", "#part-devices"):
            box = here.page.locator(part).bounding_box()
            assert box["y"] + box["height"] <= 800, part
    job.go()


def test_ten_open_pages_cost_little(client: Client, tab: Callable[..., Any], serve: Callable[..., Any]) -> None:
    served = serve(client.scheduler.address)
    for _ in range(10):
        tab().open(served.link)
    job = Job(client, 400, every=50)
    process = psutil.Process(served.process.pid)
    begin, cpu = time.monotonic(), process.cpu_times()
    wait_until(lambda: time.monotonic() - begin > 15)
    after = process.cpu_times()
    share = (after.user + after.system - cpu.user - cpu.system) / (time.monotonic() - begin)
    print(f"ten open pages: {share:.1%} of a core")
    assert share < 0.1
    job.go()


def test_the_report_and_the_samples_say_the_same(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path
) -> None:
    job = Job(client, 12)
    job.go()
    wait_until(lambda: job.told()["sums"]["rows"] == 120)
    here = tab()
    here.open(serve(client.scheduler.address).link)
    here.state("finished")
    saved = {}
    for name in ("samples.jsonl", "report.html"):
        with here.page.expect_download() as download:
            here.page.click(f'a[href="{name}"]')
        saved[name] = tmp_path / name
        download.value.save_as(saved[name])
    first, *seconds = map(json.loads, saved["samples.jsonl"].read_text().splitlines())
    assert first["jobs"][-1]["done"] == 12
    assert sum(second["rows"] for second in seconds) == 120
    assert sum(device["rows"] for second in seconds for device in second["devices"].values()) == 120
    report = tab()
    report.open(saved["report.html"].as_uri())
    assert report.text("h1") == here.text("h1")
    assert report.text("#part-jobs") == here.text("#part-jobs")
    assert report.page.locator(".chart canvas").count()
    assert all(url.startswith(("file:", "data:", "blob:")) for url in report.asked)
    report.clean()
    here.clean()


def test_who_has_no_password_sees_nothing(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any], password_file: Path
) -> None:
    here = tab()
    link = serve(client.scheduler.address, "--password-file", str(password_file)).link
    for path in ("", "samples.jsonl", "report.html"):
        here.page.goto(link + path)
        assert here.page.url.startswith(f"{link}login")
        assert "embed" not in here.page.content()
    for password, right in (("wrong", False), ("open sesame", True)):
        here.page.goto(link)
        here.page.fill('input[name="username"]', "anybody")
        here.page.fill('input[name="password"]', password)
        here.page.click("button")
        if right:
            here.page.wait_for_selector("#page[data-ready]", timeout=20_000)
            here.state("idle")
        else:
            here.page.wait_for_selector(".wrong")
    assert [complaint for complaint in here.complaints if "favicon" not in complaint] == []
