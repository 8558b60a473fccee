"""What Dask keeps of each graph and second, within bounds, and what it does each second, more seldom.

For clusters of ours that run for weeks, on machines that have other work. Dask keeps a span for each graph, and sums of
its metrics for each, for good: 20 kB in the scheduler and 6 kB in each worker; logs and profiles of a worker keep the
last thousand entries; all of it together 45 MB in a worker after half an hour of small jobs. And it looks a hundred
times a second at what each thread does, and fifty times whether the event loop lives: without any work, that is 4 % of
a core for each worker. Not for schedulers that others start.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import dask.config
from dask.utils import parse_timedelta
from distributed.spans import CONTEXTS_WITH_SPAN_ID, Span, SpansSchedulerExtension

# Ended spans, for Dask's page of what tasks spend their time on; groups of tasks that are gone in one that goes on; and
# sums of metrics that a worker has by span
SPANS, GROUPS, SUMS = 200, 1000, 500

# In the place of Dask's own. Entries of each of its logs, events of a topic, and seconds of profiles; the time from one
# look at the threads to the next; and from one look at the event loop, which is to answer within three seconds
TICK = "distributed.admin.tick.interval"
SETTINGS: Mapping[str, int | str] = {
    "distributed.admin.low-level-log-length": 100,
    "distributed.worker.profile.interval": "100ms",
    TICK: "100ms",
}


class BoundedSpans(SpansSchedulerExtension):  # type: ignore[misc]
    """Dask's spans, of which the oldest are forgotten once Dask has forgotten their tasks."""

    spans: dict[str, Span]
    root_spans: list[Span]

    def __init__(self, scheduler: Any):
        super().__init__(scheduler)
        self._graphs = self._next = 0

    def observe_tasks(self, *arguments: Any, **keywords: Any) -> Any:
        """As Dask's: take up the tasks of a new graph."""
        found = super().observe_tasks(*arguments, **keywords)
        self._graphs += 1
        if self._graphs >= self._next:
            self._forget()
            # To forget is to look at all: the more there are, the less often
            self._next = self._graphs + max(SPANS, len(self.spans)) // 4
        return found

    def heartbeat(self, ws: Any, data: dict[tuple[Any, ...], float]) -> None:
        """As Dask's: add up what a worker tells, but for spans that are forgotten."""
        super().heartbeat(ws, {key: value for key, value in data.items() if key[1] in self.spans})

    def merge_by_tags(self, *tags: str) -> Span:
        """As Dask's; of all spans where those with the tags are forgotten, since its page offers them on."""
        known = [tag for tag in tags if tag in self.spans_search_by_tag]
        return super().merge_by_tags(*known) if known else self.merge_all()

    def _forget(self) -> None:
        gone = {
            span
            for root in self.root_spans[:-SPANS]
            if not any(self._is_there(group) for group in root.traverse_groups())
            for span in root.traverse_spans()
        }
        if gone:
            self.root_spans = [span for span in self.root_spans if span not in gone]
            self.spans = {number: span for number, span in self.spans.items() if span not in gone}
            for found in (self.spans_search_by_name, self.spans_search_by_tag):
                for key in {key for span in gone for key in (span.name, *span.name)} & found.keys():
                    found[key] = [span for span in found[key] if span not in gone]
                    if not found[key]:
                        del found[key]
        for span in self.spans.values():
            self._shorten(span)

    def _shorten(self, span: Span) -> None:
        """Forget what is gone of a span that goes on, as that of a cluster that is never without tasks."""
        if len(span.groups) > GROUPS:
            # Some that are gone stay: Dask takes the time at which a span ended from its groups
            gone = sorted((g for g in span.groups if not self._is_there(g)), key=lambda group: group.stop)
            span.groups.difference_update(gone[:-GROUPS])
        if span.metadata is not None:
            del span.metadata["collections"][:-GROUPS]
        for code in list(span._code)[:-GROUPS]:
            del span._code[code]

    def _is_there(self, group: Any) -> bool:
        return self.scheduler.task_groups.get(group.name) is group


def bound_spans(scheduler: Any) -> None:
    """Keep the spans of a scheduler within bounds, if it has any."""
    if (theirs := scheduler.extensions.get("spans")) is not None:
        ours = scheduler.extensions["spans"] = BoundedSpans(scheduler)
        ours.__dict__.update(theirs.__dict__)  # a client may have been faster


def bound_sums(worker: Any) -> None:
    """Forget the oldest sums by span of a worker, which Dask writes and never reads."""
    for sums in (worker.digests_total, worker.digests_max):
        if len(sums) > 2 * SUMS:
            for key in [key for key in sums if _has_span(key)][:-SUMS]:
                del sums[key]


def _has_span(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] in CONTEXTS_WITH_SPAN_ID


def upkeep_settings(config: dict[str, Any]) -> dict[str, int | str]:
    """Ours of Dask's settings, but those that the user or the configuration given has chosen.

    To set one to what Dask has by itself is no choice: it cannot be told from having set nothing.
    """
    defaults = dask.config.merge(*dask.config.defaults)

    def is_chosen(name: str) -> bool:
        default = dask.config.get(name, None, config=defaults)
        return any(dask.config.get(name, default, config=one) != default for one in (config, dask.config.config))

    return {name: value for name, value in SETTINGS.items() if not is_chosen(name)}


def tick_seldom(server: Any) -> None:
    """Have a nanny look at its event loop as seldom as one that is started with ours."""
    if (interval := upkeep_settings({}).get(TICK)) is not None:
        server.periodic_callbacks["tick"].callback_time = 1000 * parse_timedelta(interval)
