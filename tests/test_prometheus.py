"""What is counted is on the pages that Dask serves for Prometheus, under the names that the documentation has."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import dask.array as da
import pytest
from distributed import Client
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import zcinfer as zc
from zcinfer.nvml import FIGURES
from zcinfer.prometheus import _of_gpus, _of_stores, _OfScheduler, _OfWorker
from zcinfer.telemetry import PHASES

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("registry")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def page(url: str) -> Samples:
    with urllib.request.urlopen(url) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("zcinfer_")
        }


def pages(client: Client) -> tuple[Samples, list[Samples]]:
    workers = client.scheduler_info()["workers"]
    ports = [worker["services"]["dashboard"] for worker in workers.values()]
    scheduler = client.dashboard_link.removesuffix("status") + "metrics"
    return page(scheduler), [page(f"http://127.0.0.1:{port}/metrics") for port in ports]


def total(samples: list[Samples], name: str, **labels: str) -> float:
    return sum(value for (n, found), value in _all(samples) if n == name and labels.items() <= dict(found).items())


def _all(samples: list[Samples]) -> list[tuple[Any, float]]:
    return [item for page in samples for item in page.items()]


def test_pages_agree_with_the_job(client: Client) -> None:
    zc.put(nn.Linear(4, 2).eval(), "linear")
    zc.predict("linear", da.ones((80, 4), chunks=(4, 4), dtype="f4"), batch_size=2).compute()
    scheduler, workers = pages(client)
    for name, expected in {"rows": 80, "blocks": 20, "batches": 40, "input_bytes": 1280, "output_bytes": 640}.items():
        assert total(workers, f"zcinfer_{name}_total", model="linear@1") == expected
    assert total(workers, "zcinfer_block_seconds_count") == 20
    assert total(workers, "zcinfer_block_seconds_bucket", le="+Inf") == 20
    phases = {phase: total(workers, "zcinfer_phase_seconds_total", phase=phase) for phase in PHASES}
    assert phases["computing"] > 0
    assert total(workers, "zcinfer_block_seconds_sum") == pytest.approx(sum(phases.values()))
    assert total(workers, "zcinfer_loads_total", kind="zero-copy") >= 1
    hits = total(workers, "zcinfer_loads_total", kind="resident hit")
    assert hits + total(workers, "zcinfer_loads_total", kind="zero-copy") == 20
    assert total([scheduler], "zcinfer_job_blocks", state="done") == 20
    assert total([scheduler], "zcinfer_job_blocks_all") == 20


def names() -> set[str]:
    """All that this version can tell, whether there is any of it or not."""
    return {family.name for page in (_OfWorker(), _OfScheduler()) for family in page.collect()}


def test_each_name_is_documented(client: Client) -> None:
    text = (ROOT / "docs" / "telemetry.md").read_text()
    assert set(re.findall(r"^\| `(zcinfer_\w+)`", text, re.MULTILINE)) == names()
    zc.put(nn.Linear(4, 2).eval(), "linear")
    zc.predict("linear", da.ones((8, 4), chunks=(4, 4), dtype="f4")).compute()
    scheduler, workers = pages(client)
    found = {re.sub("_(total|bucket|sum|count|created)$", "", name) for (name, _), _ in _all([scheduler, *workers])}
    assert {name for name in names() if not name.startswith(("zcinfer_gpu_", "zcinfer_store_"))} <= found <= names()


def test_cards_and_stores_have_figures_where_they_are_told() -> None:
    card = {"card": "0", "uuid": "GPU-1", "name": "A", **dict.fromkeys(FIGURES, 50.0), "power": "unavailable: no"}
    card["throttled"] = "power limit, temperature"
    store = {"store": "ray:a:1", "sizes": {"used": 7, "spilled": "unavailable: no"}, "healthy": False}
    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in (*_of_gpus([card]), *_of_stores([store]))
        for sample in family.samples
    }
    assert told["zcinfer_gpu_utilization_ratio", "0", "GPU-1", "A"] == 0.5
    assert told["zcinfer_gpu_clock_hertz", "0", "GPU-1", "A"] == 50e6
    assert told["zcinfer_gpu_throttled", "0", "GPU-1", "A", "temperature"] == 1
    assert told["zcinfer_store_bytes", "ray:a:1", "used"] == 7
    assert told["zcinfer_store_healthy", "ray:a:1"] == 0
    assert not any("power_watts" in key[0] or "spilled" in key for key in told)


def test_the_dashboard_for_grafana_asks_for_what_there_is() -> None:
    dashboard = json.loads((ROOT / "docker" / "grafana.json").read_text())
    assert (dashboard["title"], dashboard["schemaVersion"]) == ("zcinfer", 39)
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    families = {family.name: family.type for page in (_OfWorker(), _OfScheduler()) for family in page.collect()}
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    known = {name + suffix for name, kind in families.items() for suffix in suffixes[kind]}
    asked = set()
    for panel in panels:
        assert panel["targets"]
        for target in panel["targets"]:
            names = set(re.findall(r"zcinfer_\w+", target["expr"]))
            assert names <= known, target
            asked |= names
    assert any(name.startswith("zcinfer_gpu_") for name in asked)
    # None lies over another, and all are within Grafana's 24 columns.
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
