"""The parts of the page, each a function of a history: figures as text, in the order in which a template shows them.

Needs no server: a report is made of the same. What users have named is text here; the templates escape it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from zcinfer.telemetry import KINDS, LOAD_PHASES, PHASES

from .charts import POINTS, POINTS_SECONDS, bars, line
from .history import MINUTE, History, Run, Track
from .units import about, count, duration, format_size, load_time, percent, plural, rate
from .words import PHASE_NAMES, bottleneck, errors, loading, middle, sentence, stalled

__all__ = ["PARTS", "parts", "template"]

_FOLDER = Path(__file__).parent / "templates"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)

# What is shown of a cluster of any size
_MOST_DEVICES, _MOST_RUNS, _MOST_ERRORS, _MOST_MODELS = 64, 30, 30, 50

_STATE_WORDS = {
    "connecting": "Connecting",
    "disconnected": "Disconnected",
    "idle": "Ready",
    "waiting": "Waiting",
    "running": "Running",
    "stalled": "Stalled",
    "finished": "Finished",
    "failed": "Failed",
    "cancelled": "Stopped",
    "lost": "Lost",
}


def state(history: History) -> dict[str, Any]:
    """The sentence."""
    said = sentence(history)
    return {"state": said.state, "word": _STATE_WORDS[said.state], "lead": said.lead, "facts": said.facts}


def about_cluster(history: History) -> dict[str, Any]:
    """Where this is."""
    return {
        "address": history.address,
        "workers": plural(history.workers, "worker"),
        "threads": plural(history.threads, "thread"),
        "links": history.links,
        "known": history.now is not None,
    }


def progress(history: History) -> dict[str, Any]:
    """Blocks of what runs, or of what ran last, by what became of them."""
    shown = history.active or history.runs[-1:]
    total = sum(run.total for run in shown)
    segments = []
    for name, word in (
        ("done", "done"),
        ("failed", "failed"),
        ("running", "running"),
        ("queued", "queued"),
        ("cancelled", "not run"),
    ):
        blocks = sum(getattr(run, name) for run in shown)
        if blocks or name in ("done", "running", "queued", "failed"):
            segments.append({"name": name, "word": word, "blocks": count(blocks), "share": _share(blocks, total)})
    done = sum(run.done for run in shown)
    return {
        "total": total,
        "segments": segments,
        "done": percent(done, total),
        "retried": count(sum(run.retried for run in shown)),
        "before": count(sum(run.before for run in shown)) if any(run.before for run in shown) else None,
        "text": f"{count(done)} of {plural(total, 'block')} done",
        "active": bool(history.active),
    }


def tiles(history: History) -> dict[str, Any]:
    """Answers to be had at a glance."""
    now = history.now or 0.0
    times = [left for run in history.active if (left := history.left(run)) is not None]
    failed, kinds = errors(history)
    return {
        "left": about(max(times)) if times else None,
        "until": now + max(times) if times else None,
        "ended": history.runs[-1].ended if history.runs and not history.active else None,
        "bottleneck": bottleneck(history.present, now),
        "loading": loading(history),
        "failed": failed,
        "failed_text": plural(failed, "block"),
        "kinds": plural(kinds, "message"),
        "last": max((error["last"] or 0.0 for run in history.runs for error in run.errors), default=None),
    }


def rates(history: History) -> dict[str, Any]:
    """Rows a second, in words."""
    rows = sum(run.sums["rows"] for run in history.active or history.runs[-1:])
    now = history.now or 0.0
    return {
        "now": rate(history.rate(5)),
        "spans": [
            (name, rate(history.rate(60 * minutes))) for name, minutes in (("1 min", 1), ("10 min", 10), ("1 h", 60))
        ],
        "rows": count(rows),
        "devices": [(_name(track), rate(track.mean("rows", now, MINUTE))) for track in _tracks(history)[:8]],
    }


def devices(history: History) -> dict[str, Any]:
    """What each device does."""
    now = history.now or 0.0
    rows = []
    for track in _tracks(history):
        plain, gone = track.plain, track.plain["gone"]
        computing = track.binned("computing", now, POINTS_SECONDS, POINTS)
        private = track.binned("private", now, POINTS_SECONDS, POINTS)
        used = min(1.0, track.mean("computing", now, MINUTE))
        rows.append(
            {
                "node": plain["host"],
                "name": _name(track),
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
    for track in _tracks(history):
        phases, recent = track.phases()
        total = sum(phases.values())
        shares = {phase: _share(phases[phase], total) for phase in PHASES if phases[phase] > 0.001 * total}
        used |= shares.keys()
        told = {
            phase: {"phase": phase, "word": PHASE_NAMES[phase][0], "share": share, "text": percent(share, 100)}
            for phase, share in shares.items()
        }
        most = [told[phase] for phase in sorted(shares, key=lambda phase: -shares[phase])[:2]]
        rows.append({"name": _name(track), "parts": list(told.values()), "most": most, "recent": recent})
    return {
        "rows": [row for row in rows if row["parts"]][:_MOST_DEVICES],
        "bottleneck": bottleneck(history.present, now),
        "legend": [(phase, PHASE_NAMES[phase][0]) for phase in PHASES if phase in used],
    }


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


def failures(history: History) -> dict[str, Any]:
    """Errors, by message; the newest first."""
    found = [(error, run) for run in history.runs for error in run.errors]
    found.sort(key=lambda pair: -(pair[0]["last"] or 0.0))
    rows = [
        {
            "message": error["message"],
            "count": count(error["count"]),
            "run": run.name,
            "last": error["last"],
            "places": "; ".join(error["places"]),
            "more": max(0, error["count"] - len(error["places"])),
            "traceback": error["traceback"],
            "key": f"{run.key[1]}-{number}",
        }
        for number, (error, run) in enumerate(found[:_MOST_ERRORS])
    ]
    return {"rows": rows, "more": max(0, len(found) - _MOST_ERRORS), "failed": errors(history)[0]}


def jobs(history: History) -> dict[str, Any]:
    """All jobs, the newest first."""
    now = history.now or 0.0
    rows = []
    for run in reversed(history.runs[-_MOST_RUNS:]):
        said = "stalled" if stalled(run, now) else run.state
        left = history.left(run)
        rows.append(
            {
                "name": run.name,
                "state": said,
                "word": _STATE_WORDS[said],
                "active": run.active,
                "models": ", ".join(run.models),
                "done": count(run.done),
                "total": count(run.total),
                "share": _share(run.done, run.total),
                "failed": run.failed,
                "rows": count(run.sums["rows"]),
                "begun": run.begun,
                "took": duration((run.ended or now) - run.begun),
                "left": f"{about(left)} left" if left is not None and run.active else "",
                "rate": _rate_of(run, now),
            }
        )
    return {"rows": rows, "more": max(0, len(history.runs) - _MOST_RUNS), "now": now}


# Each part of the page: its name, which is that of its template, and its view.
PARTS: dict[str, Callable[[History], dict[str, Any]]] = {
    "cluster": about_cluster,
    "state": state,
    "progress": progress,
    "tiles": tiles,
    "rates": rates,
    "devices": devices,
    "time": where_time_goes,
    "models": models,
    "errors": failures,
    "jobs": jobs,
}


def parts(history: History) -> dict[str, Markup]:
    """HTML of each part of the page."""
    return {name: Markup(template(name).render(**view(history))) for name, view in PARTS.items()}


def template(name: str) -> Template:
    """The template of a part, or of the whole page; it escapes what it is given."""
    return _ENVIRONMENT.get_template(f"{name}.html")


def _rate_of(run: Run, now: float) -> str:
    return rate(run.sums["rows"] / max(0.001, (run.ended or now) - run.begun))


def _share(part: float, whole: float) -> float:
    return round(100 * part / whole, 3) if whole else 0.0


def _name(track: Track) -> str:
    return f"worker {track.plain['name']}"


def _tracks(history: History) -> list[Track]:
    """Devices as they are shown: those that are there first, by node and name."""

    def order(track: Track) -> tuple[bool, str, int, str]:
        name = str(track.plain["name"])
        return track.plain["gone"] is not None, track.plain["host"], int(name) if name.isdigit() else 0, name

    return sorted(history.devices.values(), key=order)
