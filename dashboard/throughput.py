"""The chart of rows a second: of all, and of the first devices; made once, and fed a row a second.

Not for words: those are in `views`. Colours of text and grid are set by the page, which knows whether it is dark.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from bokeh.models import ColumnDataSource, CustomJSTickFormatter, DataRange1d, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

from zcinfer.devicestate import COLUMNS, DEVICE_COLUMNS, HOUR

from .history import History
from .tracks import Row

__all__ = ["Throughput", "columns"]

# Devices that have a line of their own, and what tells them apart without colours
_LINES = 8
_DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot", [8, 2], [2, 6], [12, 4])
_COLOURS = ("#2b9a9a", "#c98a1b", "#8457c9", "#5f9e4a", "#c2527f", "#7d8aa0", "#a8743a", "#4d7fd1")

# Seconds that each point is the mean of: blocks end in bursts
SMOOTH = 5

# In the viewer's zone; seconds only where there are any
_CLOCK = """
const seconds = tick % 60000 ? {second: "2-digit"} : {}
return new Date(tick).toLocaleTimeString([], {hour: "numeric", minute: "2-digit", ...seconds})
"""

_NAN = float("nan")


def columns(history: History, since: int = 0) -> dict[str, list[float]]:
    """Points of the chart for the seconds after ``since``.

    Returns
    -------
    dict of str to list of float
        "time" in milliseconds, "all", and "d0" to "d7" for the first devices; rows a second, the mean of five
        seconds. A second that nothing is known of is NaN, so that no line crosses it.
    """
    tracks = list(history.devices.values())[:_LINES]
    series = [_means(history.seconds, history.rows, COLUMNS.index("rows"), since)]
    series += [_means(track.seconds, track.rows, DEVICE_COLUMNS.index("rows"), since) for track in tracks]
    found: dict[str, list[float]] = {"time": [], "all": [], **{f"d{number}": [] for number in range(_LINES)}}
    last = None
    for second in series[0]:
        if last is not None and second - last > 3:
            _add(found, last + 1, [])
        _add(found, second, [means.get(second, _NAN) for means in series])
        last = second
    return found


def _add(found: dict[str, list[float]], second: int, values: list[float]) -> None:
    found["time"].append(1000.0 * second)
    names = ("all", *(f"d{number}" for number in range(_LINES)))
    for number, name in enumerate(names):
        found[name].append(values[number] if number < len(values) else _NAN)


def _means(seconds: deque[int], rows: deque[Row], column: int, since: int) -> dict[int, float]:
    # From the end: a page asks for one second of an hour
    points: list[tuple[int, float]] = []
    for second, row in zip(reversed(seconds), reversed(rows), strict=True):
        if second <= since - SMOOTH:
            break
        points.append((second, row[column] or 0.0))
    points.reverse()
    means = {}
    window: deque[tuple[int, float]] = deque()
    total = 0.0
    for second, value in points:
        window.append((second, value))
        total += value
        while window[0][0] <= second - SMOOTH:
            total -= window.popleft()[1]
        if second > since:
            means[second] = max(0.0, total) / SMOOTH
    return means


class Throughput:
    """The chart of one page.

    Attributes
    ----------
    figure : bokeh.plotting.figure
    """

    def __init__(self, history: History):
        points = columns(history)
        if not points["time"]:  # without a point there are no ranges, of which Bokeh complains
            _add(points, int(history.now or time.time()), [0.0])
        self.source = ColumnDataSource(points)
        self._last = history.last_second
        self._names = 0
        plot = figure(
            name="throughput",
            height=190,
            sizing_mode="stretch_width",
            toolbar_location=None,
            tools="",
            x_range=DataRange1d(follow="end", follow_interval=600_000, range_padding=0),
            y_range=DataRange1d(start=0, range_padding=0.15, min_interval=1),
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
            min_border_left=46,
        )
        plot.varea("time", 0, "all", source=self.source, fill_color="#2a63c9", fill_alpha=0.12, name="all")
        all_rows = plot.line("time", "all", source=self.source, line_color="#2a63c9", line_width=2, name="all")
        self._lines = [
            plot.line(
                "time",
                f"d{number}",
                source=self.source,
                line_color=_COLOURS[number],
                line_dash=_DASHES[number],
                line_width=1.25,
                visible=False,
            )
            for number in range(_LINES)
        ]
        plot.add_tools(
            HoverTool(
                renderers=[all_rows],
                mode="vline",
                tooltips=[("rows/s", "@all{0,0}")],
            )
        )
        plot.xaxis.formatter = CustomJSTickFormatter(code=_CLOCK)
        plot.xaxis.ticker.desired_num_ticks = 3
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[0]a")
        plot.yaxis.ticker.desired_num_ticks = 4
        plot.xgrid.grid_line_color = None
        for axis in (*plot.xaxis, *plot.yaxis):
            axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = None
            axis.major_label_text_font_size = "12px"
            axis.major_label_text_font = "Inter, system-ui, sans-serif"
        self.figure: Any = plot
        self._show(history)

    def update(self, history: History) -> None:
        """Add what came after the last update."""
        self._show(history)
        if history.last_second > self._last:
            self.source.stream(columns(history, self._last), HOUR)
            self._last = history.last_second

    def _show(self, history: History) -> None:
        # One device is all there is
        many = min(len(history.devices), _LINES) if len(history.devices) > 1 else 0
        for line in self._lines[self._names : many]:
            line.visible = True
        self._names = max(self._names, many)
