"""The part of the page that tells how models were loaded, on each node. As `views` has them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zcinfer.telemetry import KINDS, LOAD_PHASES

from .charts import bars
from .history import History
from .units import count, format_size, load_time, plural
from .words import loading, middle

__all__ = ["models"]

_MOST_MODELS = 50


def models(history: History) -> dict[str, Any]:
    """How each model was loaded, on each node."""
    hosts = {address: track.plain["host"] for address, track in history.devices.items()}
    together: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for loads in history.models:
        together.setdefault((loads["model"], hosts.get(loads["device"], "?")), []).append(loads)
    rows = []
    for (model, node), parts in sorted(together.items())[:_MOST_MODELS]:
        counts = [sum(part["counts"][kind] for part in parts) for kind in range(len(KINDS))]
        loaded = sum(counts[:-1])
        seconds = [sum(part["seconds"][phase] for part in parts) for phase in range(len(LOAD_PHASES))]
        histograms = {
            kind: [sum(column) for column in zip(*found, strict=True)]
            for kind in KINDS[:-1]
            if (found := [part["histograms"][kind] for part in parts if kind in part["histograms"]])
        }
        rows.append(
            {
                "model": model,
                "node": node,
                "kinds": [(kind, count(many)) for kind, many in zip(KINDS[:-1], counts, strict=False) if many],
                "middle": load_time(middle(histograms.values())) if loaded else "",
                "phases": [
                    (phase, load_time(spent / max(1, loaded)))
                    for phase, spent in zip(LOAD_PHASES, seconds, strict=True)
                    if spent
                ],
                "bars": bars(histograms),
                "shared": format_size(max(part["shared"] for part in parts)),
                "private": format_size(max(part["private"] for part in parts)),
                "hits": count(counts[-1]),
                "evicted": count(sum(part["evicted"] for part in parts)),
                "workers": plural(len(parts), "worker"),
            }
        )
    return {"rows": rows, "loading": loading(history)}
