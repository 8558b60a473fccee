"""Jobs as a person calls them: what a snapshot tells of parts that were submitted together, as one. Knows no HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zcinfer.telemetry import PHASES

__all__ = ["Run", "runs"]

_COUNTS = ("total", "before", "done", "running", "queued", "failed", "cancelled", "retried", "done_again")
ACTIVE = ("waiting", "running")


@dataclass(frozen=True)
class Run:
    """What a person calls a job: the predictions of one name that were submitted together.

    Attributes
    ----------
    key : tuple
        The same in every snapshot.
    name : str
    models : tuple of str
    state : str
        "waiting", "running", "finished", "failed", "cancelled"; or "lost", with a scheduler that was.
    total, before, done, running, queued, failed, cancelled : int
        Blocks.
    retried, done_again : int
        Blocks that went to a worker more than once; and those of them that are done.
    begun : float
    ended, last : float or None
        Seconds since 1970, on the scheduler's clock; ``last``: of the last block.
    usual : float or None
        Seconds from one block to the next; not under what a block takes.
    sums : dict of str to float
        What was counted for it, by `zcinfer.devicestate.COLUMNS`.
    errors : tuple of dict
    """

    key: tuple[Any, ...]
    name: str
    models: tuple[str, ...]
    state: str
    total: int
    before: int
    done: int
    running: int
    queued: int
    failed: int
    cancelled: int
    retried: int
    done_again: int
    begun: float
    ended: float | None
    last: float | None
    usual: float | None
    sums: dict[str, float] = field(hash=False)
    errors: tuple[dict[str, Any], ...] = field(hash=False)

    @property
    def active(self) -> bool:
        """Whether anything of it is still to be run."""
        return self.state in ACTIVE


def runs(jobs: Iterable[Mapping[str, Any]], begun: float) -> list[Run]:
    """Jobs of a snapshot, those put together that a person calls one; oldest first."""
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for job in jobs:
        together.setdefault((begun, job["submission"], job["name"]), []).append(job)
    return sorted((_one(key, parts) for key, parts in together.items()), key=lambda run: run.begun)


def _one(key: tuple[Any, ...], parts: list[Mapping[str, Any]]) -> Run:
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    seen = set()
    for part in parts:
        counts.update({name: part[name] for name in _COUNTS})
        if part["job"] not in seen:  # arrays that are in the graph twice are counted together
            sums.update(part["sums"])
            seen.add(part["job"])
    ended = [part["ended"] for part in parts]
    last = [part["last"] for part in parts if part["last"] is not None]
    between = [part["seconds_a_block"] for part in parts if part["seconds_a_block"] is not None]
    if sums["blocks"]:
        between.append(sum(sums[phase] for phase in PHASES) / sums["blocks"])
    states = {part["state"] for part in parts}
    if None in ended:
        state = "running" if states - {"waiting"} else "waiting"
    else:
        state = next(state for state in ("failed", "cancelled", "finished") if state in states)
    return Run(
        key=key,
        name=parts[0]["name"],
        models=tuple(dict.fromkeys(model for part in parts for model in part["models"])),
        state=state,
        **{name: counts[name] for name in _COUNTS},
        begun=min(part["begun"] for part in parts),
        ended=None if None in ended else max(ended),
        last=max(last, default=None),
        usual=max(between, default=None),
        sums=dict(sums),
        errors=tuple(error for part in parts for error in part["errors"]),
    )
