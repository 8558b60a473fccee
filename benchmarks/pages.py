"""The files of a run: JSON, CSV, Markdown, and a page with its tables and plots that opens without a network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from zcinfer.dashboard.offline import alone
from zcinfer.errors import SettingsError

from .benchmark import Benchmark, all_tables

Run = tuple[Benchmark, Mapping[str, Any]]
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #1c2429; }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .9em .2em 0; text-align: left; border-bottom: 1px solid #dde3e6; }
.noisy { color: #b3541e; } .facts, .method { color: #55636b; white-space: pre-line; }
"""


def write(directory: Path, benchmark: Benchmark, results: Mapping[str, Any]) -> None:
    """Write ``NAME.json``, ``.csv``, ``.md`` and ``.html``."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / benchmark.name
    path.with_suffix(".json").write_text(json.dumps(results, indent=1))
    frames = [table.frame() for table in all_tables(benchmark, results)]
    kept = [frame.dropna(axis=1, how="all") for frame in frames if len(frame)]
    pd.concat(kept, ignore_index=True).to_csv(path.with_suffix(".csv"), index=False)
    path.with_suffix(".md").write_text(f"# {benchmark.title}\n\n{markdown(benchmark, results)}\n")
    path.with_suffix(".html").write_text(page("zcinfer: a benchmark", [(benchmark, results)]))


def facts(results: Mapping[str, Any]) -> str:
    """Where, when and with what it was measured, in one sentence."""
    on = results["on"]
    packages = ", ".join(f"{name} {version}" for name, version in on["packages"].items())
    return (
        f"{on['when']}, commit {on['commit']}; {on['machine']}, {on['memory'] / 2**30:,.0f} GiB, "
        f"load average {on['load']:.2f} before; Python {on['python']}, {packages}. "
        f"{'A quick run: its figures say little. ' if results['quick'] else ''}"
        "In brackets: the spread; noisy: quartiles further apart than 30 % of the median."
    )


def markdown(benchmark: Benchmark, results: Mapping[str, Any]) -> str:
    """All tables of a run, without a title."""
    lines = [facts(results)]
    for table in all_tables(benchmark, results):
        lines += ["", f"### {table.title}", "", table.markdown()]
        lines += ["", table.note] if table.note else []
    return "\n".join(lines)


def page(title: str, runs: Sequence[Run]) -> str:
    """A page of HTML with everything in it, scripts too."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    sections: list[str] = []
    plots: list[Any] = []
    for benchmark, results in runs:
        parts = [f"<h2>{html.escape(benchmark.title)}</h2>", f'<p class="facts">{html.escape(facts(results))}</p>']
        for table in all_tables(benchmark, results):
            parts += [f"<h3>{html.escape(table.title)}</h3>", table.html()]
            parts += [f'<p class="method">{html.escape(table.note)}</p>'] if table.note else []
        first = len(plots)
        plots += benchmark.figures(results)
        parts += [f"@@{number}@@" for number in range(first, len(plots))]
        parts += [f'<h3>How it is measured</h3><p class="method">{html.escape(benchmark.method)}</p>']
        sections.append("\n".join(parts))
    body = "\n".join(sections)
    script, divisions = components(plots) if plots else ("", ())
    for number, division in enumerate(divisions):
        body = body.replace(f"@@{number}@@", division)
    scripts = alone(Resources(mode="inline", components=["bokeh"]).render())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n{scripts}\n</head><body><h1>{html.escape(title)}</h1>\n{body}\n{script}\n"
        "</body></html>\n"
    )


def into_docs(path: Path, benchmark: Benchmark, results: Mapping[str, Any], picture: str = "") -> None:
    """Put a run's tables between the benchmark's two marks in a Markdown file.

    Parameters
    ----------
    picture : str, optional
        Of its plots, relative to the file.

    Raises
    ------
    SettingsError
        The file is not there, or has no such marks.
    """
    begin, end = f"<!-- {benchmark.name} -->", f"<!-- /{benchmark.name} -->"
    text = path.read_text() if path.exists() else ""
    if begin not in text or end not in text:
        raise SettingsError(
            f"{path} has no {begin} ... {end}, where the tables would go: --docs is for a checkout of the source"
        )
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    said = markdown(benchmark, results)
    if picture:
        said += f"\n\n![{benchmark.title}: plots of the figures above]({picture})\n"
    path.write_text(between.sub(lambda _: f"{begin}\n{said}\n{end}", text))
