"""A report in a real browser, without a network: it says what the run itself says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from torch import nn

import zcinfer as zc

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registry")]


def test_a_report_opens_without_a_network(tab: Callable[..., Any], tmp_path: Path) -> None:
    zc.put(nn.Linear(3, 1).eval(), "embed")
    zarr.create_array(tmp_path / "x.zarr", data=np.ones((123, 3), np.float32), chunks=(10, 3))
    with (
        zc.LocalCluster(n_workers=2, dashboard=False) as cluster,
        cluster.get_client(),
        zc.report(tmp_path / "run.html") as page,
    ):
        done = zc.run("embed", tmp_path / "x.zarr", tmp_path / "y.zarr", progress=False)
    here = tab()
    here.page.context.set_offline(True)
    here.open(page.as_uri())
    assert here.text("h1").startswith(f"Finished embed@1 into y.zarr: {done.blocks} blocks, {done.rows} rows, in ")
    assert f"embed@1 Finished {done.blocks} of {done.blocks} {done.rows} " in here.text("#part-jobs tbody")
    assert here.text("#part-progress") == f"{done.blocks} done 0 retried 0 failed 0 running 0 queued"
    assert here.page.locator(".chart canvas").count()
    assert [url for url in here.asked if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    here.clean()
    first = json.loads(page.with_suffix(".jsonl").read_text().splitlines()[0])
    assert [loads["counts"][3] for loads in first["models"]] != []
    hits = sum(loads["counts"][3] for loads in first["models"])
    assert f"found loaded {hits} times" in here.text("#part-models")


def test_a_report_of_a_failure_shows_names_as_text(tab: Callable[..., Any], tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    zc.put(nn.Linear(3, 1).eval(), "embed")
    page = tmp_path / "run.html"
    with pytest.raises(zc.ZcinferError), zc.report(page):
        zc.predict("embed", np.ones((4, 3), np.float32), preprocess=Refuse(evil))
    here = tab()
    here.open(page.as_uri())
    assert here.text("h1").startswith("Failed embed@1: 1 block failed")
    assert "The program was stopped by BlockError" in here.text("main")
    assert evil in here.text("#part-errors .message")
    assert here.page.evaluate("document.querySelectorAll('img').length") == 0
    here.clean()


class Refuse:
    """Refuses all but zeros, which shapes are found with."""

    def __init__(self, why: str):
        self.why = why

    def __call__(self, rows: Any) -> Any:
        if rows.any():
            raise ValueError(self.why)
        return rows
