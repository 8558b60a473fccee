"""How late figures are: from the end of a block in its worker to the scheduler's answer, and to the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import pytest
import torch
from distributed import Client
from processes import wait_until
from torch import nn

import zcinfer as zc

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registry")]

BLOCKS = 8
# By hand with more: 49 is what a heartbeat each second is for
WORKERS = int(os.environ.get("ZCINFER_LAG_WORKERS", "2"))
BAR = 2.0


class Ends(nn.Module):
    """Leaves the time in a file when it ends."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = str(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            time.sleep(0.05)
            Path(self.path).write_text(str(time.time()))
        return x


def rows(client: Client) -> float:
    found = client.sync(client.scheduler.zcinfer_snapshot)
    return float(sum(job["sums"]["rows"] for job in found["jobs"]))


@pytest.fixture
def client() -> Any:
    with zc.LocalCluster(n_workers=WORKERS, dashboard=False) as cluster, cluster.get_client() as client:
        yield client


def lags(client: Client, ended: Path, shown: Callable[[int], object]) -> list[float]:
    """Seconds from the end of one block after the other until ``shown`` holds for the rows so far."""
    zc.put(Ends(ended).eval(), "ends")
    found = []
    for number in range(BLOCKS):
        x = da.full((10, 3), number, chunks=(10, 3), dtype="f4")
        client.compute(zc.predict("ends", x, batch_size=10)).result()
        wait_until(lambda number=number: shown(10 * (number + 1)))  # type: ignore[misc]
        found.append(time.time() - float(ended.read_text()))
    return sorted(found)


def test_the_scheduler_knows_within_a_heartbeat(client: Client, tmp_path: Path) -> None:
    found = lags(client, tmp_path / "ended", lambda so_far: rows(client) == so_far)
    print(f"lag of the scheduler: median {found[BLOCKS // 2]:.2f} s, most {found[-1]:.2f} s")
    # A heartbeat each half second; the rest is for a machine that is busy with something else
    assert found[BLOCKS // 2] < 0.8
    assert found[-1] < BAR


def test_the_page_shows_it_within_two_seconds(
    client: Client, tab: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path
) -> None:
    here = tab()
    here.open(serve(client.scheduler.address).link)
    here.state("idle")
    # The page itself notes when it shows so many rows in all, so that asking it costs no time
    here.page.evaluate(
        """() => {
        window.seen = {};
        const look = () => {
          let rows = 0;
          for (const row of document.querySelectorAll("#part-jobs tbody tr")) rows += Number(row.cells[3].textContent);
          if (!(rows in window.seen)) window.seen[rows] = Date.now() / 1000;
        };
        new MutationObserver(look).observe(document.getElementById("part-jobs"), {childList: true, subtree: true});
        }"""
    )
    ended = tmp_path / "ended"
    ends: dict[int, float] = {}

    def shown(so_far: int) -> bool:
        ends[so_far] = float(ended.read_text())
        return str(so_far) in here.page.evaluate("window.seen")

    lags(client, ended, shown)
    seen = here.page.evaluate("window.seen")
    found = sorted(seen[str(so_far)] - end for so_far, end in ends.items())
    print(f"lag of the page: median {found[BLOCKS // 2]:.2f} s, most {found[-1]:.2f} s, {json.dumps(seen)}")
    assert found[BLOCKS // 2] < BAR
    assert found[-2] < BAR
    here.clean()
