"""The parts of the page that tell of devices: what each does, and where its time goes. As `views` has them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zcinfer.condition import UNAVAILABLE
from zcinfer.telemetry import PHASES

from .charts import POINTS, POINTS_SECONDS, line
from .history import History
from .tracks import MINUTE, Track
from .units import count, format_size, percent, rate, share
from .words import PHASE_NAMES, bottleneck

__all__ = ["device_name", "devices", "in_order", "where_time_goes"]

# What is shown of a cluster of any size
_MOST_DEVICES = 64


def devices(history: History) -> dict[str, Any]:
    """What each device does."""
    now = history.now or 0.0
    rows = []
    for track in in_order(history):
        plain, gone = track.plain, track.plain["gone"]
        computing = track.binned("computing", now, POINTS_SECONDS, POINTS)
        private = track.binned("private", now, POINTS_SECONDS, POINTS)
        used = min(1.0, track.mean("computing", now, MINUTE))
        rows.append(
            {
                "node": plain["host"],
                "name": device_name(track),
                "gone": gone is not None,
                "since": gone,
                "running": count(plain["running"]),
                "busy": plain["running"] > 0,
                "jobs": ", ".join(dict.fromkeys(history.names.get(job, job) for job in plain["jobs"])),
                "model": plain["models"][0] if plain["models"] else "",
                "used": percent(used, 1),
                "used_line": line(computing, 1.0),
                "private": format_size(plain["private"]),
                "shared": format_size(plain["shared"]),
                "private_line": line(private, max([*private, 1.0])),
                "rate": rate(track.mean("rows", now, MINUTE)),
                "gpus": _gpus(plain["gpus"]),
                "gpu_line": line(track.binned("gpu", now, POINTS_SECONDS, POINTS), 100.0),
                "gpu_memory_line": line(track.binned("gpu_memory", now, POINTS_SECONDS, POINTS), _room(plain["gpus"])),
            }
        )
    return {"rows": rows[:_MOST_DEVICES], "more": max(0, len(rows) - _MOST_DEVICES)}


def _gpus(told: Any) -> list[dict[str, Any]]:
    """Cards of a worker, each with what is known in words, and why the rest is not."""
    if isinstance(told, str):
        return [{"name": "Its GPUs", "facts": [], "used": told, "memory": None, "missing": []}]
    rows = []
    for card in told or ():
        known = {name: value for name, value in card.items() if not str(value).startswith(UNAVAILABLE)}
        missing: dict[str, list[str]] = {}
        for name in (*_GPU_WORDS, "throttled"):
            if name not in known:
                missing.setdefault(card[name].removeprefix(UNAVAILABLE), []).append(_GPU_WORDS.get(name, "throttling"))
        facts = [said for say in _GPU_FACTS if (said := say(known))]
        rows.append(
            {
                "name": f"GPU {card['card']}" if card["card"].isdigit() else card["card"],
                "kind": known.get("name", ""),
                "used": percent(known["utilization"], 100) if "utilization" in known else None,
                "memory": _of(known, "memory_used", "memory_total", _size),
                "facts": facts,
                "missing": [f"{', '.join(names)} unavailable: {why}" for why, names in missing.items()],
            }
        )
    return rows


def _of(known: Mapping[str, Any], part: str, whole: str, text: Callable[[float], str]) -> str | None:
    if part not in known:
        return None
    return text(known[part]) + (f" of {text(known[whole])}" if whole in known else "")


def _size(nbytes: float) -> str:
    return format_size(int(nbytes))


def _own(known: Mapping[str, Any]) -> str | None:
    said = [_size(known["own_memory"])] if "own_memory" in known else []
    said += [percent(known["own_utilization"], 100)] if "own_utilization" in known else []
    return f"this worker: {', '.join(said)}" if said else None


# What is missing, as it is called
_GPU_WORDS = {
    "utilization": "utilisation",
    "memory_used": "memory",
    "temperature": "temperature",
    "power": "power",
    "clock": "clocks",
    "own_memory": "share of this worker",
}

# What is said of a card, in this order
_GPU_FACTS: tuple[Callable[[Mapping[str, Any]], str | None], ...] = (
    lambda known: f"{known['temperature']:.0f} °C" if "temperature" in known else None,
    lambda known: _of(known, "power", "power_limit", lambda watts: f"{watts:,.0f} W"),
    lambda known: f"{known['clock']:,.0f} MHz" if "clock" in known else None,
    lambda known: f"slowed by: {known['throttled']}" if known.get("throttled") else None,
    _own,
)


def _room(told: Any) -> float:
    """Memory of a worker's cards, to draw against."""
    sizes = [] if isinstance(told, str) else [card["memory_total"] for card in told or ()]
    return max(1.0, sum(float(size) for size in sizes if not isinstance(size, str)))


def where_time_goes(history: History) -> dict[str, Any]:
    """Where the time of each device goes."""
    now = history.now or 0.0
    rows = []
    used: set[str] = set()
    for track in in_order(history):
        phases, recent = track.phases()
        total = sum(phases.values())
        shares = {phase: share(phases[phase], total) for phase in PHASES if phases[phase] > 0.001 * total}
        used |= shares.keys()
        told = {
            phase: {"phase": phase, "word": PHASE_NAMES[phase][0], "share": share, "text": percent(share, 100)}
            for phase, share in shares.items()
        }
        most = [told[phase] for phase in sorted(shares, key=lambda phase: -shares[phase])[:2]]
        rows.append({"name": device_name(track), "parts": list(told.values()), "most": most, "recent": recent})
    return {
        "rows": [row for row in rows if row["parts"]][:_MOST_DEVICES],
        "bottleneck": bottleneck(history.present, now),
        "legend": [(phase, PHASE_NAMES[phase][0]) for phase in PHASES if phase in used],
    }


def device_name(track: Track) -> str:
    return f"worker {track.plain['name']}"


def in_order(history: History) -> list[Track]:
    """Devices as they are shown: those that are there first, by node and name."""

    def order(track: Track) -> tuple[bool, str, int, str]:
        name = str(track.plain["name"])
        return track.plain["gone"] is not None, track.plain["host"], int(name) if name.isdigit() else 0, name

    return sorted(history.devices.values(), key=order)
