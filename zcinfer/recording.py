"""What snapshots of an `Observer` tell of one stretch of time: its jobs, and what was counted from its begin on.

Knows no scheduler, no page and no file. For what is made of it see `reporting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .devicestate import HOUR

# By second, figures by name; None where one is not known
Series = dict[int, dict[str, Any]]
# Figures of a second that are no counts
_LEVELS = ("private", "gpu", "gpu_memory")


class Recording:
    """A stretch of time that begins with a snapshot.

    Parameters
    ----------
    first : mapping
        As `Observer.snapshot` gives it with ``whole``.
    is_ours : callable
        Whether a job of a snapshot, which has begun since, is part of it.

    Attributes
    ----------
    last : mapping
        The last snapshot that was taken up.
    """

    def __init__(self, first: Mapping[str, Any], is_ours: Callable[[Mapping[str, Any]], bool] = lambda _: True):
        self.first = self.last = first
        self._is_ours = is_ours
        self._before = max((job["number"] for job in first["jobs"]), default=0)
        self._begin = int(first["seconds"][-1])  # the second that was not over
        self._series: Series = {}
        self._devices: dict[str, Series] = {}

    @property
    def since(self) -> int:
        """What to ask for: seconds after that one, of which the first may be told again, as it was not over."""
        return max(self._series, default=self._begin) - 1

    def take(self, snapshot: Mapping[str, Any]) -> None:
        """Take up a snapshot.

        Raises
        ------
        OSError
            Another scheduler has told it, which knows nothing of what was before.
        """
        if snapshot["begun"] != self.first["begun"]:
            raise OSError("it was started anew, and knows nothing of what was before")
        self.last = snapshot
        self._append(self._series, snapshot["seconds"], snapshot["columns"])
        for address, history in snapshot["history"].items():
            columns = {name: values for name, values in history.items() if name != "seconds"}
            self._append(self._devices.setdefault(address, {}), history["seconds"], columns)

    def _append(self, series: Series, seconds: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> None:
        for second, *row in zip(seconds, *columns.values(), strict=True):
            if second >= self._begin:
                series[second] = dict(zip(columns, row, strict=True))
        while len(series) > HOUR:
            del series[next(iter(series))]

    @property
    def jobs(self) -> list[Mapping[str, Any]]:
        """Jobs that began in it."""
        return [job for job in self.last["jobs"] if job["number"] > self._before and self._is_ours(job)]

    @property
    def is_counted(self) -> bool:
        """Whether workers have told of any block."""
        return any(job["sums"]["blocks"] or job["sums"]["errors"] for job in self.jobs)

    def snapshot(self) -> dict[str, Any]:
        """As of an observer that knew nothing else: its own jobs, and counters that began with it."""
        keys = {job["job"] for job in self.jobs}
        totals = {device["address"]: device["totals"] for device in self.first["devices"]}
        return {
            **self.last,
            "jobs": self.jobs,
            "devices": [
                {
                    **device,
                    "jobs": [key for key in device["jobs"] if key in keys],
                    "totals": _beyond(device["totals"], totals.get(device["address"], {})),
                }
                for device in self.last["devices"]
            ],
            "models": self._models(),
            "seconds": [*self._series],
            "columns": {**dict.fromkeys(self.first["columns"], ()), **_columns(self._series, self.first["columns"])},
            "history": {
                address: {"seconds": [*series], **_columns(series, self.first["history"].get(address, {}))}
                for address, series in self._devices.items()
                if series
            },
        }

    def _models(self) -> list[dict[str, Any]]:
        before = {(loads["device"], loads["model"]): loads for loads in self.first["models"]}
        found = []
        for loads in self.last["models"]:
            was = before.get((loads["device"], loads["model"]))
            # Fewer than there were: of another process, under the same address
            if was is None or any(now < then for now, then in zip(loads["counts"], was["counts"], strict=True)):
                found.append(dict(loads))
            elif loads["counts"] != was["counts"] or loads["evicted"] != was["evicted"]:
                found.append(
                    {
                        **loads,
                        "counts": _less(loads["counts"], was["counts"]),
                        "seconds": _less(loads["seconds"], was["seconds"]),
                        "evicted": loads["evicted"] - was["evicted"],
                        "histograms": {
                            kind: _less(histogram, was["histograms"].get(kind, [0] * len(histogram)))
                            for kind, histogram in loads["histograms"].items()
                        },
                    }
                )
        return found


def _columns(series: Series, before: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Columns of a series, without what of its first second was counted before it began."""
    names = dict.fromkeys(name for row in series.values() for name in row)
    found = {name: [row.get(name) for row in series.values()] for name in names}
    for name, column in found.items():
        if name in before and name not in _LEVELS:
            column[0] = max(0.0, column[0] - before[name][-1])
    return found


def _beyond(now: Mapping[str, float], then: Mapping[str, float]) -> dict[str, float]:
    return {name: value - then.get(name, 0.0) for name, value in now.items()}


def _less(now: list[Any], then: list[Any]) -> list[Any]:
    return [a - b for a, b in zip(now, then, strict=True)]
