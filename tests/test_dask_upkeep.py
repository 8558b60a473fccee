"""A scheduler and a worker that compute many graphs keep no more of them than they need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import dask
import pytest
from distributed import Client, Event, LocalCluster, default_client, span
from processes import wait_until

import zcinfer as zc
from zcinfer import dask_upkeep
from zcinfer.cluster import worker_options
from zcinfer.dask_upkeep import SETTINGS, TICK, BoundedSpans, bound_spans, bound_sums, upkeep_settings


@pytest.fixture(scope="module")
def bounded() -> Iterator[tuple[Client, Any]]:
    """A client, and the spans of its scheduler, of which eight are to be kept."""
    with (
        pytest.MonkeyPatch.context() as patch,
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        patch.setattr(dask_upkeep, "SPANS", 8)
        bound_spans(cluster.scheduler)
        yield client, cluster.scheduler.extensions["spans"]


_graphs = itertools.count()


def compute(number: int) -> int:
    """Four times what follows ``number``, by a graph that Dask has forgotten afterwards."""
    client, group = default_client(), f"graph-{next(_graphs)}"
    future = client.submit(lambda: 4 + 4 * number, key=(group, 0))
    found: int = future.result()
    future.release()
    wait_until(lambda: group not in client.cluster.scheduler.task_groups)
    return found


def test_spans_of_graphs_that_are_gone_are_forgotten_but_the_newest(bounded: tuple[Client, Any]) -> None:
    client, spans = bounded
    kept = client.submit(int, 7, key=("kept", 7))
    assert [compute(number) for number in range(30)] == [4 + 4 * number for number in range(30)]
    for number in range(10):
        with span("one", "more"):
            compute(number)
    roots = spans.root_spans
    assert len(roots) < 2 * 8
    everything = {child for root in roots for child in root.traverse_spans()}
    assert set(spans.spans.values()) == everything
    for found in (spans.spans_search_by_name, spans.spans_search_by_tag):
        assert {one for some in found.values() for one in some} == everything
        assert all(found.values())
    # What somebody holds has its span, to which a task of the same group comes later
    group = client.cluster.scheduler.tasks["kept", 7].group
    assert spans.spans[group.span_id] in roots
    assert client.submit(int, 8, key=("kept", 8)).result() == kept.result() + 1 == 8
    assert group.states["memory"] + group.states["forgotten"] == 2


def test_pages_of_spans_go_on_when_some_are_forgotten(bounded: tuple[Client, Any]) -> None:
    _, spans = bounded
    with span("training"):
        compute(0)
    assert spans.merge_by_tags("training").cumulative_worker_metrics is not None
    for number in range(20):
        compute(number)
    assert "training" not in spans.spans_search_by_tag
    assert spans.merge_by_tags("training").name == spans.merge_all().name


def test_a_span_that_goes_on_forgets_what_is_gone_of_it(
    bounded: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, spans = bounded
    monkeypatch.setattr(dask_upkeep, "GROUPS", 5)
    go_on = Event("go on")
    busy = client.submit(lambda: Event("go on").wait(), key="busy")
    for number in range(20):
        compute(number)
    group = client.cluster.scheduler.tasks["busy"].group
    found = spans.spans[group.span_id]
    assert len(found.groups) < 5 + 3 * 3
    assert group in found.groups
    assert len(found.metadata["collections"]) < 5 + 3
    go_on.set()
    busy.result()


def test_a_long_span_that_has_ended_tells_when(bounded: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, spans = bounded
    with span("long") as number:
        for n in range(20):
            compute(n)
    monkeypatch.setattr(dask_upkeep, "GROUPS", 5)
    spans._forget()
    long = spans.spans[number]
    assert long.done
    assert long.enqueued < long.stop <= max(group.stop for group in long.groups)
    assert len(long.groups) == 5
    assert spans.merge_all().stop >= long.stop


def test_many_results_that_are_held_are_looked_at_seldom(
    bounded: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, spans = bounded
    calls = []
    monkeypatch.setattr(spans, "_forget", lambda: calls.append(1))
    held = []
    for number in range(200):
        held.append(client.submit(int, number, key=(f"held-{number}", 0)))
        held[-1].result()  # a span for each
    assert len(spans.spans) > 200
    assert len(calls) < 40  # not half of all


def test_metrics_of_a_span_that_is_forgotten_harm_nobody(bounded: tuple[Client, Any]) -> None:
    _, spans = bounded
    compute(0)
    (*_, newest) = spans.spans
    before = spans.spans[newest].cumulative_worker_metrics.get(("execute", "x", "y", "z"), 0)
    spans.heartbeat(None, {("execute", "gone", "x", "y", "z"): 1.0, ("execute", newest, "x", "y", "z"): 2.0})
    assert spans.spans[newest].cumulative_worker_metrics["execute", "x", "y", "z"] == before + 2


def test_spans_that_were_there_before_stay() -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        early = client.submit(int, 1, key=("early", 1))
        early.result()
        bound_spans(cluster.scheduler)
        assert client.submit(int, 2, key=("early", 2)).result() == 2
        del cluster.scheduler.extensions["spans"]
        bound_spans(cluster.scheduler)
        assert "spans" not in cluster.scheduler.extensions


def test_sums_of_a_worker_are_forgotten_but_the_newest(
    bounded: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = bounded
    worker = next(iter(client.cluster.workers.values()))
    for number in range(10):
        compute(number)
    of_spans = [key for key in worker.digests_total if isinstance(key, tuple) and key[0] == "execute"]
    others = worker.digests_total.keys() - set(of_spans)
    monkeypatch.setattr(dask_upkeep, "SUMS", 5)
    bound_sums(worker)
    assert [key for key in worker.digests_total if key in of_spans] == of_spans[-5:]
    assert others <= worker.digests_total.keys()
    assert len(worker.digests_max) <= len(others) + 5
    assert compute(3) == 16


@pytest.mark.parametrize(("name", "other"), [*zip(SETTINGS, (2000, "5ms", "5ms"), strict=True)])
def test_settings_are_ours_unless_they_are_chosen(name: str, other: Any) -> None:
    nested: Any = other
    for part in reversed(name.split(".")):
        nested = {part: nested}
    assert worker_options(1)["config"][name] == SETTINGS[name]
    assert name not in worker_options(1, config=nested)["config"]
    assert worker_options(1, config={name: other})["config"][name] == other
    for chosen in (other, None):
        with dask.config.set({name: chosen}):
            assert upkeep_settings({}) == {one: value for one, value in SETTINGS.items() if one != name}


def test_clusters_have_the_bounds() -> None:
    def find(dask_worker: Any) -> tuple[Any, ...]:
        callbacks = dask_worker.periodic_callbacks
        return (
            dask_worker.profile_history.maxlen,
            callbacks["profile"].callback_time,
            callbacks["tick"].callback_time,
            callbacks["zcinfer-sums"].is_running(),
            dask.config.get("distributed.admin.event-loop"),
        )

    with zc.LocalCluster(n_workers=1, dashboard=False) as cluster, cluster.get_client() as client:
        assert isinstance(cluster.scheduler.extensions["spans"], BoundedSpans)
        for server in (cluster.scheduler, *cluster.workers.values()):
            assert server.periodic_callbacks["tick"].callback_time == 100
        (found,) = client.run(find).values()
    assert found == (100, 100, 100, True, dask.config.get("distributed.admin.event-loop"))


def test_a_number_that_is_chosen_holds_for_scheduler_and_nannies() -> None:
    with (
        dask.config.set({TICK: "30ms"}),
        zc.LocalCluster(n_workers=1, dashboard=False) as cluster,
        cluster.get_client() as client,
    ):
        servers = (cluster.scheduler, *cluster.workers.values())
        assert [server.periodic_callbacks["tick"].callback_time for server in servers] == [30, 30]
        found = client.run(lambda dask_worker: dask_worker.periodic_callbacks["tick"].callback_time)
        assert [*found.values()] == [30]
