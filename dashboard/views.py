"""The parts of the page, each a function of a history: figures as text, in the order in which a template shows them.

Needs no server: a report is made of the same. What users have named is text here; the templates escape it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from .device_views import devices, where_time_goes
from .history import History
from .model_views import ailing, models
from .runs import Run
from .units import about, count, duration, percent, plural, rate, share
from .words import bottleneck, errors, loading, sentence, stalled

__all__ = ["PARTS", "parts", "template"]

_FOLDER = Path(__file__).parent / "templates"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)

# What is shown of a cluster of any size
_MOST_RUNS, _MOST_ERRORS = 30, 30

# Of the bar, and what each is called
_SEGMENTS = (
    ("done", "done"),
    ("retried", "retried"),
    ("failed", "failed"),
    ("running", "running"),
    ("queued", "queued"),
    ("cancelled", "not run"),
)

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
    """Blocks of what runs, or of what ran last, by what became of them; together they are all blocks."""
    shown = history.active or history.runs[-1:]
    total, done, retried, again = (
        sum(getattr(run, name) for run in shown) for name in ("total", "done", "retried", "done_again")
    )
    segments = []
    for name, word in _SEGMENTS:
        blocks = again if name == "retried" else sum(getattr(run, name) for run in shown)
        blocks -= again if name == "done" else 0
        if blocks or name != "cancelled":
            segments.append({"name": name, "word": word, "blocks": count(blocks), "share": share(blocks, total)})
    said = f"{count(done)} of {plural(total, 'block')} done"
    return {
        "total": total,
        "segments": segments,
        "done": percent(done, total),
        "retrying": count(retried - again) if retried > again else None,
        "before": count(sum(run.before for run in shown)) if any(run.before for run in shown) else None,
        "text": f"{said}, {count(again)} of them when retried" if again else said,
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
        "ailing": ailing(history),
        "failed": failed,
        "failed_text": plural(failed, "block"),
        "kinds": plural(kinds, "message"),
        "last": max((error["last"] or 0.0 for run in history.runs for error in run.errors), default=None),
    }


def rates(history: History) -> dict[str, Any]:
    """Rows a second, in words."""
    rows = sum(run.sums["rows"] for run in history.active or history.runs[-1:])
    return {
        "now": rate(history.rate(5)),
        "spans": [
            (name, rate(history.rate(60 * minutes))) for name, minutes in (("1 min", 1), ("10 min", 10), ("1 h", 60))
        ],
        "rows": count(rows),
    }


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
                "share": share(run.done, run.total),
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
