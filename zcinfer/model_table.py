"""The table that `models` gives: a DataFrame with sizes in bytes, which a notebook shows in words."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .sizes import format_size

_SIZES = ("shared", "private", "own")
_FOR_PROGRAMS = ("nbytes", "tensors", "base", "why")


class ModelTable(pd.DataFrame):
    """What is published. What is made of it (a part, a sum) is a plain DataFrame."""

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        return str(in_words(self).to_html(index=False, border=0, max_rows=pd.get_option("display.max_rows")))


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """The table as a person reads it, without what is for programs."""
    damaged = table["class"].str.startswith("damaged: ")
    return pd.DataFrame(
        {
            **{name: table[name] for name in table.columns if name not in _FOR_PROGRAMS},
            **{name: table[name].map(format_size) for name in _SIZES},
            "class": table["class"].str.split(".").str[-1].mask(damaged, "damaged (zcinfer info says how)"),
            "created": table["created"].str[:16].str.replace("T", " "),
            "digest": table["digest"].str[:12],
        }
    )
