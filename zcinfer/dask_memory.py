"""What Dask keeps of each graph and second, within bounds, so that a cluster of ours may run for weeks.

Dask keeps a span for each graph, and sums of its metrics for each, for good: 20 kB in the scheduler and 6 kB in each
worker. Its logs for developers and its profiles keep the last thousand entries, 50 MB in a worker. Not for schedulers
that others start.
"""

from __future__ import annotations

from typing import Any

import dask.config
from distributed.spans import Span, SpansSchedulerExtension

# Entries of each of Dask's logs, and seconds of its profiles
LOGGED = 100
# Ended spans, for Dask's page of what tasks spend their time on, and sums of metrics that a worker has by span
SPANS, SUMS = 200, 500

LOG_LENGTH = "distributed.admin.low-level-log-length"
_DASKS_LENGTH = 1000


class BoundedSpans(SpansSchedulerExtension):  # type: ignore[misc]
    """Dask's spans, of which the oldest are forgotten once Dask has forgotten their tasks."""

    root_spans: list[Span]

    def observe_tasks(self, *arguments: Any, **keywords: Any) -> Any:
        """As Dask's: take up the tasks of a new graph."""
        found = super().observe_tasks(*arguments, **keywords)
        if len(self.root_spans) > SPANS + SPANS // 4:  # not for each graph: to forget one is to look at all
            self._forget()
        return found

    def heartbeat(self, ws: Any, data: dict[tuple[Any, ...], float]) -> None:
        """As Dask's: add up what a worker tells, but for spans that are forgotten."""
        super().heartbeat(ws, {key: value for key, value in data.items() if key[1] in self.spans})

    def _forget(self) -> None:
        gone = {span for span in self.root_spans[:-SPANS] if not self._is_needed(span)}
        self.root_spans = [span for span in self.root_spans if span not in gone]
        for span in (child for root in gone for child in root.traverse_spans()):
            del self.spans[span.id]
            _remove(self.spans_search_by_name, span.name, span)
            for tag in set(span.name):
                _remove(self.spans_search_by_tag, tag, span)

    def _is_needed(self, span: Span) -> bool:
        groups = self.scheduler.task_groups
        return any(groups.get(group.name) is group for group in span.traverse_groups())


def _remove(found: dict[Any, list[Span]], key: Any, span: Span) -> None:
    found[key] = [other for other in found[key] if other is not span]
    if not found[key]:
        del found[key]


def bound_spans(scheduler: Any) -> None:
    """Keep the spans of a scheduler that has had no graph yet within bounds."""
    scheduler.extensions["spans"] = BoundedSpans(scheduler)


def bound_sums(worker: Any) -> None:
    """Forget the oldest sums by span of a worker, which Dask writes and never reads."""
    for sums in (worker.digests_total, worker.digests_max):
        if len(sums) > 2 * SUMS:
            for key in [key for key in sums if isinstance(key, tuple)][:-SUMS]:
                del sums[key]


def log_length() -> int:
    """How many entries Dask's logs are to keep in processes of ours: few, unless the user has chosen a number."""
    chosen: int = dask.config.get(LOG_LENGTH)
    return LOGGED if chosen == _DASKS_LENGTH else chosen
