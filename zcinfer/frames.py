"""``predict`` on a pandas or dask DataFrame: chosen columns into a model, its outputs as new columns.

Not for labelled arrays (`labelled`). pandas and dask.dataframe are used only where such a frame is given.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .columns import Choice, is_a
from .errors import InputError, OutputError, SettingsError, ZcinferError
from .many import Ensemble
from .predictor import Predictor
from .rows import Array, Rows


@dataclass(frozen=True)
class Table:
    """A DataFrame given to ``predict``.

    Attributes
    ----------
    frame : pandas.DataFrame or dask.dataframe.DataFrame
    choices : tuple of Choice
        The inputs.
    keywords : tuple of str
        Names of the inputs; empty if there is one, and it goes by position.
    into : object
        Labels of the new columns, as for ``predict``.
    """

    frame: Any
    choices: tuple[Choice, ...]
    keywords: tuple[str, ...]
    into: Any

    @classmethod
    def of(cls, arrays: Sequence[Any], inputs: Mapping[str, Any], columns: Any, into: Any) -> Table | None:
        """The frame among the arguments of ``predict``; None if there is none.

        Raises
        ------
        InputError, SettingsError
        """
        every = [*arrays, *inputs.values()]
        for value in every:
            if is_a(value, "pandas", "Series") or is_a(value, "dask", "Series"):
                raise InputError(
                    "an input is a Series: give the DataFrame and name the column, columns='name'; or its values, "
                    "series.to_numpy() (to_dask_array() of a dask one)"
                )
        if not any(map(_is_frame, every)):
            if columns is not None:
                raise SettingsError("columns chooses from a DataFrame, and none is given: leave it out")
            return None
        if len(arrays) != 1 or any(len(getattr(value, "shape", ())) > 0 for value in inputs.values()):
            raise InputError(
                "give one DataFrame, alone and by position; inputs by name are chosen from its columns: "
                "columns={'ids': 'a', 'x': ['b', 'c']}"
            )
        frame = arrays[0]
        labels = list(frame.columns)
        if getattr(frame.columns, "nlevels", 1) > 1:
            raise InputError("the frame's columns have several levels: give them names of one level first")
        if columns is None:
            raise SettingsError(f"which columns are the model's input? Give columns=[...]; there are {_few(labels)}")
        named = isinstance(columns, Mapping)
        if named and not columns:
            raise SettingsError("columns is an empty dict: name one input or more")
        keywords = tuple(map(str, columns)) if named else ()
        if twice := [name for name in keywords if name in inputs]:
            raise SettingsError(f"{twice[0]!r} is given twice, in columns and by keyword: leave one out")
        choices = tuple(map(Choice.of, columns.values() if named else [columns]))
        for label in (label for choice in choices for label in choice.labels):
            if labels.count(label) != 1:
                found = f"{labels.count(label)} columns" if label in labels else "no column"
                raise SettingsError(f"there is {found} {label!r} in the frame, which has {_few(labels)}: name one")
        return cls(frame, choices, keywords, into)

    def through(self, model: Predictor | Ensemble) -> Any:
        """The frame with the model's outputs as new columns: computed, or lazy if the frame is dask's."""
        lazy = is_a(self.frame, "dask", "DataFrame")
        meta = self.frame._meta if lazy else self.frame
        every = [model] if isinstance(model, Predictor) else model.predictors
        converted = all(predictor.call.preprocess is not None for predictor in every)
        rows = tuple(choice.rows(meta, converted) for choice in self.choices)

        def sample() -> list[Array]:
            if lazy:
                labels = list(dict.fromkeys(label for choice in self.choices for label in choice.labels))
                some = self.frame[labels].head(2, compute=False).compute()
            else:
                some = self.frame.iloc[:2]
            return [choice.block(some, r) for choice, r in zip(self.choices, rows, strict=True)]

        bound = model.bind(rows, sample)
        outputs = bound.outputs
        names = labels_of(outputs, bound.several, self.into, list(meta.columns))
        if not lazy:
            return predict_partition(self.frame, bound, self.choices, rows, names, None, "the rows given")
        batch_rows = bound.planned((float("nan"),) * self.frame.npartitions)
        if isinstance(batch_rows, list):  # lazy ones within a list would not be found
            from dask import delayed

            batch_rows = delayed(batch_rows, pure=True)
        empty = [np.empty((0, *output.shape), output.dtype) for output in outputs]
        return self.frame.map_partitions(
            predict_partition,
            bound,
            self.choices,
            rows,
            names,
            batch_rows,
            meta=_widened(meta, empty, names),
            align_dataframes=False,
        )


def labels_of(
    outputs: Sequence[Rows], several: bool, into: Any, existing: Sequence[Hashable]
) -> tuple[tuple[Hashable, ...], ...]:
    """The new columns' labels, output by output.

    Examples
    --------
    >>> labels_of([Rows((2,), np.dtype("float32"))], False, None, ["a", "b"])
    (('prediction_0', 'prediction_1'),)

    Raises
    ------
    OutputError
        An output is not a number or a row of numbers.
    SettingsError
        ``into`` does not fit the outputs, or the frame has such a column.
    """
    for output in outputs:
        if len(output.shape) > 1:
            raise OutputError(
                f"the output is {output}, which columns of a frame do not hold: flatten it, with "
                "postprocess=lambda y: y.reshape(len(y), -1), or give arrays instead of a frame"
            )
    if not several:
        wanted = [into if into is not None else "prediction"]
    elif into is None:
        wanted = [f"prediction_{number}" for number in range(len(outputs))]
    elif isinstance(into, list) and len(into) == len(outputs):
        wanted = into
    else:
        raise SettingsError(
            f"into is {into!r}, and there are {len(outputs)} outputs: give a list with a label for each"
        )
    found = []
    for output, labels in zip(outputs, wanted, strict=True):
        width = int(np.prod(output.shape))
        if isinstance(labels, list):
            if len(labels) != width:
                raise SettingsError(f"into names {len(labels)} columns, and the output is {output}: name {width}")
            found.append(tuple(labels))
        elif width == 1:
            found.append((labels,))
        elif isinstance(labels, str):
            found.append(tuple(f"{labels}_{number}" for number in range(width)))
        else:
            raise SettingsError(f"into is {labels!r}, and the output is {output}: give a list of {width} labels")
    every = [label for labels in found for label in labels]
    for label in every:
        if label in existing:
            raise SettingsError(f"the frame has a column {label!r}: name the new ones with into=, or drop that one")
        if every.count(label) > 1:
            raise SettingsError(f"into names {label!r} twice: give each new column its own label")
    return tuple(found)


def predict_partition(
    frame: Any,
    bound: Predictor | Ensemble,
    choices: Sequence[Choice],
    inputs: Sequence[Rows],
    names: Sequence[Sequence[Hashable]],
    batch_rows: Any,
    where: str | None = None,
) -> Any:
    """A pandas frame with the outputs of a bound model as new columns."""
    first_row = 0 if where else None
    where = where or (f"the partition that begins at index {frame.index[0]}" if len(frame) else "an empty partition")
    try:
        blocks = [choice.block(frame, rows) for choice, rows in zip(choices, inputs, strict=True)]
    except ZcinferError as error:
        raise type(error)(f"{where}: {error}") from error
    made: Any = bound.run_block(blocks, where, first_row, batch_rows)
    return _widened(frame, made if bound.several else [made], names)


def _widened(frame: Any, outputs: Sequence[Array], names: Sequence[Sequence[Hashable]]) -> Any:
    import pandas as pd

    new = []
    for output, labels in zip(outputs, names, strict=True):
        columns: Any = pd.Index([*labels], tupleize_cols=False)
        new.append(pd.DataFrame(output if output.ndim == 2 else output[:, None], index=frame.index, columns=columns))
    # All at once: a frame grows slow by columns that come one by one.
    widened = pd.concat([frame, *new], axis=1)
    widened.attrs = dict(frame.attrs)
    return widened


def _is_frame(value: Any) -> bool:
    return is_a(value, "pandas", "DataFrame") or is_a(value, "dask", "DataFrame")


def _few(labels: Sequence[Hashable]) -> str:
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    return ", ".join(map(repr, labels[:8])) + more
