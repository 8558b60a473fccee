"""The part of the page that tells of models: how they were loaded, and how stores are. As `views` has them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zcinfer.telemetry import KINDS, LOAD_PHASES

from .charts import bars
from .history import History
from .units import count, format_size, load_time, plural, share
from .words import loading, middle

__all__ = ["ailing", "models"]

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
    return {"rows": rows, "loading": loading(history), "stores": stores(history)}


def stores(history: History) -> list[dict[str, Any]]:
    """How the stores are, on each node."""
    told = {(store["host"], store["store"]): store for store in history.stores}
    rows = []
    for (node, name), store in sorted(told.items()):
        sizes = {kind: _size(size) for kind, size in store["sizes"].items()}
        figures = [(_SIZE_WORDS.get(kind, kind), text) for kind, text in sorted(sizes.items(), key=_place)]
        rows.append(
            {
                "name": name,
                "node": node,
                "figures": figures,
                "holder": store["holder"],
                "healthy": store["healthy"],
                "full": _full(store["sizes"]),
            }
        )
    return rows


def ailing(history: History) -> str | None:
    """What is wrong with a store, in words; None where nothing is."""
    for store in stores(history):
        if not store["healthy"]:
            return f"holder on {store['node']}: {store['holder'] or 'unavailable'}"
    return None


# Of `zcinfer.condition.Condition.sizes`
_SIZE_WORDS = {
    "spilled": "spilled, in all",
    "fallback": "fallback (files)",
    "cached": "in the page cache",
    "free": "free on disk",
}


def _place(pair: tuple[str, str]) -> int:
    order = ("used", "capacity", "spilled", "fallback", "mapped", "cached", "free")
    return order.index(pair[0]) if pair[0] in order else len(order)


def _size(size: Any) -> str:
    return size if isinstance(size, str) else format_size(size)


def _full(sizes: Mapping[str, Any]) -> float | None:
    used, capacity = sizes.get("used"), sizes.get("capacity")
    return share(used, capacity) if isinstance(used, int) and isinstance(capacity, int) else None
