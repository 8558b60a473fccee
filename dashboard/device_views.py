"""The parts of the page that tell of devices: what each does, and where its time goes. As `views` has them all."""

from __future__ import annotations

from typing import Any

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
            }
        )
    return {"rows": rows[:_MOST_DEVICES], "more": max(0, len(rows) - _MOST_DEVICES)}


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
