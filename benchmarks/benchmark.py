"""What a benchmark is: a measurement that gives a dict, and tables and plots that are functions of that dict alone.

So a report can be written again, elsewhere and later, from the JSON of a run. Not for running one (`running`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables import Table


@dataclass(frozen=True)
class Options:
    """What a user asks of a run.

    Attributes
    ----------
    quick : bool
        Fewer rounds, and less to measure, to see that it works: figures of such a run say little.
    out : Path
        Directory of what is written.
    only : tuple of str
        Only the parts (models, systems) whose names contain one of these; empty: all.
    """

    quick: bool = False
    out: Path = Path("benchmarks/results")
    only: tuple[str, ...] = ()

    def wants(self, part: str) -> bool:
        """Whether a part is asked for.

        Examples
        --------
        >>> Options(only=("BERT",)).wants("BERT-base"), Options().wants("GPT-2")
        (True, True)
        """
        return not self.only or any(text in part for text in self.only)


@dataclass(frozen=True)
class Benchmark:
    """One question, how it is measured and how the answer is shown.

    Attributes
    ----------
    name : str
        As on the command line, and of the files.
    title : str
    method : str
        How it is measured, and what it does not show: Markdown.
    measure : callable
        Gives the results, in JSON types: seconds, bytes, and `measure.summary`; "on", "quick" and "took" are added to
        them. ``results["bars"]``, if it is there, is made of `bar`; ``results["absent"]`` maps what cannot run here to
        the reason.
    tables, figures : callable
        Give tables, and plots of Bokeh, of the results.
    """

    name: str
    title: str
    method: str
    measure: Callable[[Options], dict[str, Any]]
    tables: Callable[[Mapping[str, Any]], Sequence[Table]]
    figures: Callable[[Mapping[str, Any]], Sequence[Any]]


def bar(asked: float, found: float, *, most: bool = False, unit: str = "") -> dict[str, Any]:
    """What was asked of a figure, and what was found: at least as much, or at ``most``; a ratio, where it has no unit.

    Examples
    --------
    >>> bar(2.5, 3.0)["met"], bar(2.5, 3.0, most=True)["met"]
    (True, False)
    """
    met = found <= asked if most else found >= asked
    return {"asked": asked, "most": most, "found": found, "met": met, "unit": unit}


def say(text: str) -> None:
    """Tell the user what is going on."""
    print(text, file=sys.stderr, flush=True)


def all_tables(benchmark: Benchmark, results: Mapping[str, Any]) -> list[Table]:
    """What was asked, the benchmark's own tables, and what could not run."""
    found: list[Table] = []
    bars = results.get("bars")
    if bars:
        rows = [
            [name, f"{'at most' if one['most'] else 'at least'} {one['asked']:g}", f"{one['found']:.3g}",
             "met" if one["met"] else "NOT MET"]
            for name, one in bars.items()
        ]  # fmt: skip
        found.append(Table("What was asked", {"": "", "asked": "", "found": "", "verdict": ""}, rows))
    found += benchmark.tables(results)
    absent = results.get("absent")
    if absent:
        rows = [[name, why] for name, why in absent.items()]
        found.append(Table("What could not run here", {"": "", "why": ""}, rows))
    return found
