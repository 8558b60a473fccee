"""What is counted is on the pages that Dask serves for Prometheus, under the names that the documentation has."""

from __future__ import annotations

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
from zcinfer.telemetry import PHASES

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


def test_each_name_is_documented(client: Client) -> None:
    zc.put(nn.Linear(4, 2).eval(), "linear")
    zc.predict("linear", da.ones((8, 4), chunks=(4, 4), dtype="f4")).compute()
    scheduler, workers = pages(client)
    found = {re.sub("_(total|bucket|sum|count|created)$", "", name) for (name, _), _ in _all([scheduler, *workers])}
    text = (Path(__file__).parents[1] / "docs" / "telemetry.md").read_text()
    documented = set(re.findall(r"^\| `(zcinfer_\w+)`", text, re.MULTILINE))
    assert found == documented
