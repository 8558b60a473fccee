"""Tables of figures, as Markdown, as HTML, on a terminal, and as a data frame: one description, four ways to show it.

Figures come in seconds, bytes and ratios, and are scaled to the unit of their column. Not for measuring (`measure`).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Figures whose quartiles lie further apart than this part of their median are called noisy.
NOISY = 0.3
SCALES = {"ms": 1e3, "µs": 1e6, "MB": 1e-6}
# A figure with its spread (`measure.summary`), one without, a text, or nothing.
Value = Mapping[str, float] | float | str | None


@dataclass(frozen=True)
class Table:
    """Rows of figures.

    Attributes
    ----------
    title : str
    columns : dict of str to str
        Unit of each: "ms" and "µs" of seconds, "MB" of bytes, "x" of ratios, "rows/s" and so on as they are; "" of
        texts.
    rows : sequence of sequences
        The first value of each names it.
    note : str
        What a reader must know of it.

    Examples
    --------
    >>> print(Table("Loads", {"way": "", "time": "ms"}, [["ours", 0.0021], ["theirs", None]]).markdown())
    | way    | time, ms |
    |--------|----------|
    | ours   | 2.10     |
    | theirs | –        |
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[Value]]
    note: str = ""

    def head(self) -> list[str]:
        """Names of the columns with their units; a ratio's unit is in its values."""
        return [f"{name}, {unit}" if unit not in ("", "x") else name for name, unit in self.columns.items()]

    def texts(self) -> list[list[str]]:
        """All values as texts, without the head."""
        units = list(self.columns.values())
        return [[text(value, unit) for value, unit in zip(row, units, strict=True)] for row in self.rows]

    def markdown(self) -> str:
        """The table itself, without title and note."""
        return markdown([self.head(), *self.texts()])

    def html(self) -> str:
        """The table itself, without title and note."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.head())
        rows = [
            "".join(
                f'<td class="noisy">{html.escape(cell)}</td>' if is_noisy(value) else f"<td>{html.escape(cell)}</td>"
                for cell, value in zip(cells, row, strict=True)
            )
            for cells, row in zip(self.texts(), self.rows, strict=True)
        ]
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"

    def rich(self) -> Any:
        """The table for a terminal, as a ``rich.table.Table``."""
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(title=self.title, title_justify="left", title_style="bold", caption=self.note or None,
                          caption_justify="left")  # fmt: skip
        for name, unit in zip(self.head(), self.columns.values(), strict=True):
            shown.add_column(name, justify="right" if unit else "left")
        for cells, row in zip(self.texts(), self.rows, strict=True):
            styles = ["yellow" if is_noisy(v) else "red" if v == "NOT MET" else "" for v in row]
            shown.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
        return shown

    def frame(self) -> pd.DataFrame:
        """A row for each figure: what it is of, unit, value, and its spread where it has one."""
        import pandas as pd  # which a machine that only measures need not have

        records = []
        for row in self.rows:
            for (column, unit), value in list(zip(self.columns.items(), row, strict=True))[1:]:
                record: dict[str, Any] = {"table": self.title, "row": row[0], "column": column, "unit": unit}
                scale = SCALES.get(unit, 1.0)
                if isinstance(value, Mapping):
                    record |= {"value": centre(value) * scale, "low": value["low"] * scale}
                    record |= {"high": value["high"] * scale, "n": value["n"], "spread": value["spread"]}
                    record["noisy"] = is_noisy(value)
                elif isinstance(value, str):
                    record["text"] = value
                elif value is not None:
                    record["value"] = value * scale
                else:
                    continue
                records.append(record)
        names = ["table", "row", "column", "unit", "value", "low", "high", "n", "spread", "noisy", "text"]
        return pd.DataFrame(records, columns=names)


def centre(found: Mapping[str, float]) -> float:
    """The mean where there is one, else the median."""
    return found["mean"] if "mean" in found else found["median"]


def is_noisy(value: Value) -> bool:
    """Whether a figure's quartiles lie so far apart that it says little.

    Examples
    --------
    >>> is_noisy({"median": 1.0, "low": 0.8, "high": 1.2, "n": 30, "spread": 0.4})
    True
    """
    return isinstance(value, Mapping) and value["spread"] > NOISY


def text(value: Value, unit: str) -> str:
    """A value as text, a figure with its spread in brackets.

    Examples
    --------
    >>> text({"median": 0.0123, "low": 0.012, "high": 0.013, "n": 30, "spread": 0.08}, "ms")
    '12.3 (12.0–13.0)'
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    scale = SCALES.get(unit, 1.0)
    if not isinstance(value, Mapping):
        return _number(value * scale, unit, value * scale) + ("x" if unit == "x" else "")
    middle = centre(value) * scale
    shown, low, high = (_number(v * scale, unit, middle) for v in (centre(value), value["low"], value["high"]))
    return f"{shown} ({low}–{high})" + (" noisy" if is_noisy(value) else "")


def _number(value: float, unit: str, like: float) -> str:
    """A number with as many digits as one of the size of ``like`` deserves."""
    if unit in ("", "n") and float(value).is_integer():
        return f"{value:,.0f}"
    size = abs(like)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{value:,.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts in Markdown; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
