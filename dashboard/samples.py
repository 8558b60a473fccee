"""The samples as lines of JSON, for programs: one line of what is known now, then one for each second.

Not for people: see the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["lines"]

_SERIES = ("seconds", "columns", "history")


def lines(snapshot: Mapping[str, Any]) -> Iterator[str]:
    """Lines of JSON, each with its end.

    Parameters
    ----------
    snapshot : mapping
        As `zcinfer.observer.Observer.snapshot` gives it.

    Yields
    ------
    str
        First ``{"type": "state", ...}`` with jobs, devices and models; then ``{"type": "second", "time": ...}`` with
        what was counted in each second, and ``"devices"`` by address.
    """
    yield _line({"type": "state", **{name: value for name, value in snapshot.items() if name not in _SERIES}})
    by_device = {
        address: {
            second: {name: values[place] for name, values in history.items() if name != "seconds"}
            for place, second in enumerate(history["seconds"])
        }
        for address, history in snapshot["history"].items()
    }
    for place, second in enumerate(snapshot["seconds"]):
        devices = {address: found[second] for address, found in by_device.items() if second in found}
        counted = {name: values[place] for name, values in snapshot["columns"].items()}
        yield _line({"type": "second", "time": second, **counted, "devices": devices})


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"
