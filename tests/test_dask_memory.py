"""A scheduler and a worker that compute many graphs keep no more of them than they need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import pytest
from distributed import Client, LocalCluster, span

import zcinfer as zc
from zcinfer import dask_memory
from zcinfer.cluster import worker_options
from zcinfer.dask_memory import LOG_LENGTH, LOGGED, BoundedSpans, bound_spans, bound_sums


@pytest.fixture(scope="module")
def bounded() -> Iterator[tuple[Client, Any]]:
    """A client, and the spans of its scheduler, of which eight are to be kept."""
    with (
        pytest.MonkeyPatch.context() as patch,
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        patch.setattr(dask_memory, "SPANS", 8)
        bound_spans(cluster.scheduler)
        yield client, cluster.scheduler.extensions["spans"]


def compute(number: int) -> int:
    return int((da.ones(4, chunks=2) + number).sum().compute())


def test_spans_of_graphs_that_are_gone_are_forgotten_but_the_newest(bounded: tuple[Client, Any]) -> None:
    client, spans = bounded
    kept = client.submit(int, 7, key="kept-7")
    assert [compute(number) for number in range(30)] == [4 + 4 * number for number in range(30)]
    for number in range(10):
        with span("one", "more"):
            compute(number)
    roots = spans.root_spans
    assert len(roots) <= 8 + 2 + 1
    everything = {child for root in roots for child in root.traverse_spans()}
    assert set(spans.spans.values()) == everything
    for found in (spans.spans_search_by_name, spans.spans_search_by_tag):
        assert {one for some in found.values() for one in some} == everything
        assert all(found.values())
    # What somebody holds has its span, and may be asked for again
    group = client.cluster.scheduler.tasks["kept-7"].group
    assert spans.spans[group.span_id] in roots
    assert client.submit(int, 7, key="kept-7").result() == kept.result() == 7
    assert spans.merge_all().done  # what Dask's page shows
    assert spans.merge_by_tags("one").cumulative_worker_metrics


def test_metrics_of_a_span_that_is_forgotten_harm_nobody(bounded: tuple[Client, Any]) -> None:
    _, spans = bounded
    compute(0)
    (*_, newest) = spans.spans
    before = spans.spans[newest].cumulative_worker_metrics.get(("execute", "x", "y", "z"), 0)
    spans.heartbeat(None, {("execute", "gone", "x", "y", "z"): 1.0, ("execute", newest, "x", "y", "z"): 2.0})
    assert spans.spans[newest].cumulative_worker_metrics["execute", "x", "y", "z"] == before + 2


def test_sums_of_a_worker_are_forgotten_but_the_newest(
    bounded: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = bounded
    worker = next(iter(client.cluster.workers.values()))
    for number in range(10):
        compute(number)
    (*_, newest) = [key for key in worker.digests_total if isinstance(key, tuple)]
    names = {key for key in worker.digests_total if not isinstance(key, tuple)}
    monkeypatch.setattr(dask_memory, "SUMS", 5)
    bound_sums(worker)
    left = [key for key in worker.digests_total if isinstance(key, tuple)]
    assert len(left) == 5
    assert left[-1] == newest
    assert names <= set(worker.digests_total)
    assert len(worker.digests_max) <= len(names) + 5
    assert compute(3) == 16


def test_logs_are_short_unless_their_length_is_chosen() -> None:
    assert worker_options(1)["config"][LOG_LENGTH] == LOGGED
    with dask.config.set({LOG_LENGTH: 50}), zc.LocalCluster(n_workers=1, dashboard=False) as cluster:
        assert isinstance(cluster.scheduler.extensions["spans"], BoundedSpans)
        with cluster.get_client() as client:
            (length,) = client.run(lambda dask_worker: dask_worker.profile_history.maxlen).values()
            (others,) = client.run(lambda: dask.config.get("distributed.admin.event-loop")).values()
    assert length == 50
    assert others == dask.config.get("distributed.admin.event-loop")
