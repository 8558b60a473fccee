"""Plots of what was measured, with Bokeh. Not for pages (`pages`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .tables import SCALES, centre, is_noisy, text

OURS, THEIRS, PUBLISHED = "#1f6f8b", "#b9c2c7", "#b3541e"
# Of an axis that has room for powers of ten alone
MANY_DECADES = 4


def bars(
    title: str,
    unit: str,
    values: Mapping[str, Mapping[str, float] | float],
    *,
    published: Mapping[str, float] | None = None,
    most: bool = False,
) -> Any:
    """Horizontal bars with their spreads, on a logarithmic axis, the best on top.

    Parameters
    ----------
    unit : str
        Of the axis; values come in seconds, bytes or as they are, like those of a `tables.Table`.
    values : dict
        Figures with their spread (`measure.summary`), or without.
    published : dict, optional
        What others have published of some of them, as diamonds.
    most : bool
        Whether more is better.
    """
    from bokeh.models import ColumnDataSource, NumeralTickFormatter, Whisker
    from bokeh.plotting import figure

    scale = SCALES.get(unit, 1.0)
    spreads = {
        name: tuple(scale * v for v in ((centre(found), found["low"], found["high"])
                                        if isinstance(found, Mapping) else (found, found, found)))
        for name, found in values.items()
    }  # fmt: skip
    names = sorted(spreads, key=lambda name: spreads[name][0], reverse=not most)
    marks = {name: value * scale for name, value in (published or {}).items() if name in spreads}
    positive = [v for found in spreads.values() for v in found if v > 0] + list(marks.values())
    if not positive:
        return figure(title=f"{title}: all are 0", width=900, height=60, toolbar_location=None)
    bottom, top = min(positive) / 2, max(positive) * 4
    plot = figure(
        title=title, y_range=names, x_axis_type="log", x_range=(bottom, top),
        width=900, height=80 + 30 * len(names) + (40 if marks else 0), x_axis_label=unit, toolbar_location=None,
    )  # fmt: skip
    plot.xaxis.ticker = _ticks(bottom, top)
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0.[000000]")
    source = ColumnDataSource({
        "name": names,
        "middle": [max(spreads[name][0], bottom) for name in names],
        "low": [max(spreads[name][1], bottom) for name in names],
        "high": [max(spreads[name][2], bottom) for name in names],
        "text": [_text(values[name], unit) for name in names],
        "colour": [OURS if name.startswith("zcinfer") else THEIRS for name in names],
    })  # fmt: skip
    plot.hbar(y="name", left=bottom, right="middle", height=0.7, source=source, color="colour")
    plot.text(x="high", y="name", text="text", source=source, x_offset=8, text_baseline="middle", text_font_size="12px")
    plot.add_layout(Whisker(base="name", lower="low", upper="high", source=source, dimension="width", level="overlay"))
    if marks:
        plot.scatter(
            x=list(marks.values()), y=list(marks), marker="diamond", size=12, line_color=PUBLISHED, fill_color="white",
            line_width=2, legend_label="published, on another machine",
        )  # fmt: skip
        plot.add_layout(plot.legend[0], "below")  # beside the bars it would lie on them
    plot.ygrid.grid_line_color = None
    return plot


def _text(value: Mapping[str, float] | float, unit: str) -> str:
    """A figure without its spread, which is drawn."""
    middle = centre(value) if isinstance(value, Mapping) else value
    return text(middle, unit) + (" noisy" if is_noisy(value) else "")


def _ticks(bottom: float, top: float) -> list[float]:
    """Powers of ten, and also 2 and 5 times them where there are few; Bokeh's own are linear over a decade or two."""
    first, last = math.floor(math.log10(bottom)), math.ceil(math.log10(top))
    mantissas = (1, 2, 5) if last - first <= MANY_DECADES else (1,)
    return [mantissa * 10.0**power for power in range(first, last) for mantissa in mantissas]
