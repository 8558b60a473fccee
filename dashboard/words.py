"""What a history means, in words: the state of the work, what it waits for, and how its models were loaded.

Not for figures as text (`units`), nor for HTML (`views`). Nothing here is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zcinfer.telemetry import BOUNDS, KINDS, PHASES

from .history import History
from .runs import Run
from .tracks import MINUTE, Track
from .units import about, count, duration, load_time, percent, plural

__all__ = ["Bottleneck", "Loading", "Sentence", "bottleneck", "errors", "loading", "sentence", "stalled"]

# Nothing finished for this many times the usual, and these seconds at least, is a stall
_STALL, _STALL_SECONDS = 3.0, 3.0

# Seconds that a device is called busy for after it counted something
_BUSY_SECONDS = 2.0


@dataclass(frozen=True)
class Sentence:
    """The state of the work.

    Attributes
    ----------
    state : str
        "connecting", "disconnected", "idle", "waiting", "running", "stalled", "finished", "failed" or "cancelled".
    lead : str
        "Running embed-topics".
    facts : tuple of str
        What follows, with commas between.
    """

    state: str
    lead: str
    facts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.lead + (": " + ", ".join(self.facts) if self.facts else "")


def sentence(history: History) -> Sentence:
    """Say how the work goes.

    Examples
    --------
    >>> str(sentence(History("tcp://127.0.0.1:8786")))
    'Connecting to tcp://127.0.0.1:8786'
    """
    if history.now is None:
        problem = (history.problem, "trying again") if history.problem else ()
        return Sentence("connecting", f"Connecting to {history.address}", problem)
    if history.problem is not None:
        facts = [history.problem, "trying again"]
        if history.active:
            done, total = _blocks(history.active)
            facts.append(f"{_names(history.active)} had {count(done)} of {plural(total, 'block')} when last seen")
        return Sentence("disconnected", f"Disconnected from {history.address}", tuple(facts))
    if history.active:
        return _at_work(history, history.active, history.now)
    if not history.runs:
        return Sentence("idle", "No jobs yet", (_ready(history),))
    return _ended(history.runs[-1])


def _at_work(history: History, runs: list[Run], now: float) -> Sentence:
    done, total = _blocks(runs)
    facts = [f"{count(done)} of {plural(total, 'block')}"]
    failed = sum(run.failed for run in runs)
    none_failed = f"{count(failed)} failed" if failed else "none failed"
    if not history.workers:
        return Sentence("waiting", f"Waiting for workers to run {_names(runs)}", (*facts, none_failed))
    if all(run.done + run.failed == 0 and not _loaded(history, run) for run in runs):
        facts.append(f"for {duration(now - min(run.begun for run in runs))}")
        facts.append(plural(history.workers, "worker"))
        return Sentence("waiting", f"Waiting for a model to run {_names(runs)}", (*facts, none_failed))
    facts.append(percent(done, total))
    quiet = [run for run in runs if stalled(run, now)]
    if len(quiet) == len(runs):
        since = max(run.last or run.begun for run in runs)
        usual = max(run.usual or 0.0 for run in runs)
        before = duration(usual) if usual >= 1 else load_time(usual)
        facts.append(f"nothing finished for {duration(now - since)} (usual: {before})")
    else:
        times = [left for run in runs if (left := history.left(run)) is not None]
        facts.append(f"{about(max(times))} left" if times else "no block done yet" if not done else "pace unknown")
    busy = sum(is_busy(track, now) for track in history.present)
    facts.append(f"{count(busy)} of {plural(len(history.present), 'device')} busy")
    facts.append(none_failed)
    if len(quiet) == len(runs):
        return Sentence("stalled", f"Stalled: {_names(runs)}", tuple(facts))
    return Sentence("running", f"Running {_names(runs)}", tuple(facts))


def _ended(run: Run) -> Sentence:
    assert run.ended is not None
    took = f"in {duration(run.ended - run.begun)}"
    if run.state == "finished":
        # Rows come with the workers' next heartbeat
        rows = [plural(run.sums["rows"], "row")] if run.sums["blocks"] >= run.done else []
        facts = [plural(run.done, "block"), *rows, took, "none failed"]
        return Sentence("finished", f"Finished {run.name}", tuple(facts))
    facts = [f"{count(run.done)} of {plural(run.total, 'block')} done"]
    if run.state == "failed":
        return Sentence("failed", f"Failed {run.name}", (f"{plural(run.failed, 'block')} failed", *facts, took))
    if run.state == "lost":
        return Sentence("cancelled", f"Lost {run.name}", (*facts, "its scheduler has ended"))
    return Sentence("cancelled", f"Stopped {run.name}", (*facts, took))


def stalled(run: Run, now: float) -> bool:
    """Whether nothing of a run was finished for three times the usual."""
    if run.state != "running" or run.last is None or run.usual is None:
        return False
    return now - run.last > max(_STALL * run.usual, _STALL_SECONDS)


def is_busy(track: Track, now: float) -> bool:
    """Whether a device has a block, or has just had one."""
    return bool(track.plain["running"]) or track.mean("busy", now, _BUSY_SECONDS) > 0


def _loaded(history: History, run: Run) -> bool:
    return any(loads["model"] in run.models and sum(loads["counts"]) for loads in history.models)


def _blocks(runs: list[Run]) -> tuple[int, int]:
    return sum(run.done for run in runs), sum(run.total for run in runs)


def _names(runs: list[Run]) -> str:
    names = list(dict.fromkeys(run.name for run in runs))
    if len(runs) == 1:
        return names[0]
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(runs)} jobs ({told})"


def _ready(history: History) -> str:
    return f"{plural(history.workers, 'worker')} ready" if history.workers else "no workers yet"


# What each phase is called, and what a person makes of it where it takes the most time
PHASE_NAMES = {
    "reading": ("reading", "blocks wait for their input: it is read, or made by the tasks before"),
    "model": ("waiting for the model", "blocks wait for a module: it is loaded, or in use by another thread"),
    "preparing": ("preparing", "rows are made ready: preprocessing, sorting, cutting into batches"),
    "to_device": ("copying in", "batches are made into tensors and copied to the device"),
    "waiting": ("waiting for a core", "more blocks are ready than cores can compute"),
    "computing": ("computing", "the model itself is the limit: devices are used as they should be"),
    "from_device": ("copying out", "outputs are copied back from the device"),
    "writing": ("writing", "outputs are written to their target"),
}


@dataclass(frozen=True)
class Bottleneck:
    """What takes the most time.

    Attributes
    ----------
    name : str
        "Computing", "Reading" ...; or "Nothing to wait for".
    share : str
        Of what: "71 % of the time in blocks".
    why : str
    """

    name: str
    share: str
    why: str


def bottleneck(tracks: list[Track], now: float) -> Bottleneck:
    """Name what the devices spend their time on.

    Notes
    -----
    Threads of one worker read while another computes, so that shares of time alone would blame reading that costs
    nothing: devices that compute for four fifths of the last minute, or wait for a core more than for anything else,
    are limited by computing.
    """
    spent: Counter[str] = Counter()
    lately = False
    for track in tracks:
        phases, recent = track.phases()
        if recent and not lately:
            spent.clear()
            lately = True
        if recent or not lately:
            spent.update(phases)
    total = sum(spent.values())
    if not total:
        return Bottleneck("Nothing yet", "", "no block has been done")
    working = [track for track in tracks if track.mean("busy", now, MINUTE) > 0]
    used = sum(min(1.0, track.mean("computing", now, MINUTE)) for track in working) / len(working) if working else 0.0
    most = max(PHASES, key=lambda phase: spent[phase])
    if used >= 0.8 or most == "waiting":
        most = "computing"
    name, why = PHASE_NAMES[most]
    when = "" if lately else ", all work so far"
    return Bottleneck(name[0].upper() + name[1:], f"{percent(spent[most], total)} of the time in blocks{when}", why)


@dataclass(frozen=True)
class Loading:
    """How models were loaded.

    Attributes
    ----------
    verdict : str
        "All zero-copy", "2 of 12 zero-copy", "No loads yet".
    time : str
        "median 2.7 ms".
    good : bool
        Whether all loads were zero-copy.
    """

    verdict: str
    time: str
    good: bool


def loading(history: History) -> Loading:
    """Say whether models were loaded zero-copy, and how long it took."""
    counts = [sum(loads["counts"][kind] for loads in history.models) for kind in range(len(KINDS) - 1)]
    counted = sum(counts)
    if not counted:
        return Loading("No loads yet", "", True)
    good = counts[0] == counted
    verdict = "All zero-copy" if good else f"{count(counts[0])} of {count(counted)} zero-copy"
    histograms = [histogram for loads in history.models for histogram in loads["histograms"].values()]
    return Loading(verdict, f"{plural(counted, 'load')}, half within {load_time(middle(histograms))}", good)


def middle(histograms: Iterable[Sequence[int]]) -> float:
    """Bound, in seconds, that half of all loads are within.

    Examples
    --------
    >>> middle([[0, 3, *[0] * 23], [0, 0, 0, 1, *[0] * 21]])
    0.0002
    """
    summed: list[int] = [sum(column) for column in zip(*histograms, strict=True)]
    half, reached = sum(summed) / 2, 0
    for bound, many in zip(BOUNDS, summed, strict=False):
        reached += many
        if reached >= half:
            return float(bound)
    return float(2 * BOUNDS[-1])


def errors(history: History) -> tuple[int, int]:
    """Blocks that failed in all runs that are shown, and kinds of errors."""
    kinds = {error["message"] for run in history.runs for error in run.errors}
    return sum(run.failed for run in history.runs), len(kinds)
