"""What all benchmarks share: interleaved timing, forked children, tables, JSON and plots."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each function a round: what slows the machine slows all of them.

    In another order each round, since each finds the caches as the one before has left them. What a call returns is
    dropped outside the clock.
    """
    shuffled, order = random.Random(0), list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            function = functions[name]
            begin = perf_counter()
            result = function()
            seconds[name].append(perf_counter() - begin)
            del result
    return seconds


def forked(function: Callable[[], Any]) -> Any:
    """What ``function`` returns, in JSON types, from a forked child: imports done, and nothing else.

    The caller must have started no threads: neither Ray's nor OpenMP's.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            gc.collect()
            text = json.dumps(function())
            with os.fdopen(writer, "w") as file:
                file.write(text)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"a measuring process failed with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(text)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, number."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high), "n": len(seconds)}


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    packages = ("torch", "ray", "numpy", "dask", "transformers", "safetensors", "zcinfer")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": {name: version(name) for name in packages},
    }


def milliseconds(found: Mapping[str, float] | None) -> str:
    """Median and quartiles, for a table."""
    if found is None:
        return "–"
    scale = [found[key] * 1e3 for key in ("median", "low", "high")]
    digits = 2 if scale[0] < 10 else 0
    return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*scale, d=digits)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write(directory: Path, name: str, results: dict[str, Any], text: str, figures: Sequence[Any]) -> None:
    """Write ``name.json``, ``name.md`` and, with the figures in it, ``name.html``."""
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.resources import INLINE

    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(results, indent=1))
    (directory / f"{name}.md").write_text(text)
    (directory / f"{name}.html").write_text(file_html(column(*figures), INLINE, title=name))


def bars(title: str, unit: str, values: Mapping[str, Mapping[str, float]]) -> Any:
    """Horizontal bars with quartiles, on a logarithmic axis, the shortest on top."""
    from bokeh.models import ColumnDataSource, Whisker
    from bokeh.plotting import figure

    names = sorted(values, key=lambda name: values[name]["median"], reverse=True)
    data: dict[str, list[Any]] = {key: [values[name][key] for name in names] for key in ("median", "low", "high")}
    data["name"] = names
    data["text"] = [f"{value:.3g}" for value in data["median"]]
    source = ColumnDataSource(data)
    bottom = min(found["low"] for found in values.values()) / 2
    top = max(found["high"] for found in values.values()) * 4
    plot = figure(
        title=title, y_range=names, x_axis_type="log", x_range=(bottom, top),
        width=900, height=60 + 30 * len(names), x_axis_label=unit, toolbar_location=None,
    )  # fmt: skip
    colours = ["#1f6f8b" if name.startswith("zcinfer") else "#b9c2c7" for name in names]
    source.add(colours, "colour")
    plot.hbar(y="name", left=bottom, right="median", height=0.7, source=source, color="colour")
    plot.text(x="high", y="name", text="text", source=source, x_offset=8, text_baseline="middle", text_font_size="12px")
    plot.add_layout(Whisker(base="name", lower="low", upper="high", source=source, dimension="width", level="overlay"))
    plot.ygrid.grid_line_color = None
    return plot
