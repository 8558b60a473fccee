"""Small charts as figures for a template: lines of a few points, bars of a histogram.

Not for the big one (`throughput`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zcinfer.telemetry import BOUNDS

from .units import load_time

__all__ = ["POINTS", "POINTS_SECONDS", "bars", "line"]

# Points of a line, and the time that they are of
POINTS, POINTS_SECONDS = 60, 600.0

# The box that the templates draw a line in
_WIDTH, _HEIGHT = 120, 24


def line(values: list[float], top: float) -> str:
    """Points of a small chart, from the bottom left of a box of 120 by 24.

    Examples
    --------
    >>> line([0.0, 1.0], 1.0)
    '0,23 120,1'
    """
    step = _WIDTH / max(1, len(values) - 1)
    high = _HEIGHT - 2
    return " ".join(
        f"{round(number * step, 1):g},{round(_HEIGHT - 1 - high * min(1.0, value / top), 1):g}"
        for number, value in enumerate(values)
    )


def bars(histograms: Mapping[str, list[int]]) -> dict[str, Any]:
    """Bars of a histogram of load times, a group for each bound that has any, and its neighbours between them."""
    used = [place for histogram in histograms.values() for place, many in enumerate(histogram) if many]
    if not used:
        return {"groups": [], "text": ""}
    low, high = max(0, min(used) - 1), min(len(BOUNDS), max(used) + 1)
    top = max(max(histogram) for histogram in histograms.values())
    groups: list[dict[str, Any]] = []
    for place in range(low, high + 1):
        bound = BOUNDS[place] if place < len(BOUNDS) else math.inf
        groups.append(
            {
                "bound": f"≤ {load_time(bound)}" if bound < math.inf else f"> {load_time(BOUNDS[-1])}",
                "bars": [
                    {"kind": kind, "count": histogram[place], "share": round(100 * histogram[place] / top)}
                    for kind, histogram in histograms.items()
                    if histogram[place]
                ],
            }
        )
    text = "; ".join(
        f"{group['bound']}: " + ", ".join(f"{bar['count']} {bar['kind']}" for bar in group["bars"])
        for group in groups
        if group["bars"]
    )
    return {"groups": groups, "text": text}
