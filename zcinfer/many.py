"""Several models over one array: all of them on each block, or for each row the one that its label names.

Both stand where a `Predictor` stands: bound to inputs they know their outputs, and they run blocks. Not for graphs
(`arrays`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import BlockError, InputError, OutputError, SettingsError
from .predictor import Predictor
from .rows import Array, Rows, as_block

# Labels told in an error.
_TOLD = 5


class Ensemble:
    """Several models that run on each block while it is in memory.

    Parameters
    ----------
    predictors : sequence of Predictor
    """

    def __init__(self, predictors: Sequence[Predictor]):
        if not predictors:
            raise SettingsError("no model given: name one or more")
        self.predictors = list(predictors)

    def __dask_tokenize__(self) -> tuple[str, list[str]]:
        return ("zcinfer.Ensemble", [predictor.fingerprint() for predictor in self.predictors])

    def bind(self, inputs: Sequence[Rows], sample: Callable[[], Sequence[Array]] | None = None) -> Ensemble:
        """The ensemble for inputs of these row shapes and dtypes."""
        return Ensemble([predictor.bind(inputs, sample) for predictor in self.predictors])

    def of_job(self, key: str) -> Ensemble:
        """The ensemble whose blocks are counted for the job of that key."""
        return Ensemble([predictor.of_job(key) for predictor in self.predictors])

    @property
    def outputs(self) -> tuple[Rows, ...]:
        """Of all models, one after the other."""
        return tuple(rows for predictor in self.predictors for rows in predictor.outputs)

    several = True

    def planned(self, lengths: Sequence[float]) -> Any:
        """Rows of a batch for each model, as `Predictor.planned`."""
        return [predictor.planned(lengths) for predictor in self.predictors]

    def run_block(
        self,
        blocks: Sequence[Array],
        where: str,
        first_row: int | None = 0,
        batch_rows: Sequence[int | None] | None = None,
    ) -> tuple[Array, ...]:
        """Outputs of all models on one block."""
        results: list[Array] = []
        for predictor, rows in zip(self.predictors, batch_rows or [None] * len(self.predictors), strict=True):
            made = predictor.run_block(blocks, where, first_row, rows)
            results += made if predictor.several else [made]
        return tuple(results)

    def grouped(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """What all outputs make for each model: an array, or a tuple of them. For a bound ensemble."""
        waiting = iter(arrays)
        return tuple(
            tuple(next(waiting) for _ in predictor.outputs) if predictor.several else next(waiting)
            for predictor in self.predictors
        )


class Switch:
    """For each row the model that its label names; the labels are the last input.

    Parameters
    ----------
    predictors : dict of label to Predictor
    """

    def __init__(self, predictors: Mapping[Any, Predictor]):
        if not predictors:
            raise SettingsError("no model given: name one or more, by label")
        self.predictors: dict[Any, Predictor] = dict(predictors)

    def __dask_tokenize__(self) -> tuple[str, list[Any]]:
        return ("zcinfer.Switch", [(label, p.fingerprint()) for label, p in self.predictors.items()])

    def bind(self, inputs: Sequence[Rows], sample: Callable[[], Sequence[Array]] | None = None) -> Switch:
        """The switch for inputs of these row shapes and dtypes, whose models give outputs of one kind."""
        if inputs[-1].shape:
            raise InputError(f"the labels are {inputs[-1]}: give one for each row, of shape (rows,)")
        several = (lambda: sample()[:-1]) if sample else None
        bound = Switch({label: p.bind(inputs[:-1], several) for label, p in self.predictors.items()})
        first, *others = bound.predictors.items()
        for label, predictor in others:
            if predictor.outputs != first[1].outputs or predictor.several != first[1].several:
                raise OutputError(
                    f"{first[1].ref} ({first[0]!r}) gives {_listed(first[1])} and {predictor.ref} ({label!r}) "
                    f"{_listed(predictor)}: rows of one array have one shape and dtype. Choose with output=, or shape "
                    "them with postprocess="
                )
        return bound

    def of_job(self, key: str) -> Switch:
        """The switch whose blocks are counted for the job of that key."""
        return Switch({label: predictor.of_job(key) for label, predictor in self.predictors.items()})

    @property
    def outputs(self) -> tuple[Rows, ...]:
        """Of each of the models."""
        return self._first.outputs

    @property
    def several(self) -> bool:
        """Whether each of them gives several."""
        return self._first.several

    @property
    def _first(self) -> Predictor:
        (first, *_) = self.predictors.values()
        return first

    def planned(self, lengths: Sequence[float]) -> Any:
        """Rows of a batch for each model, as `Predictor.planned`."""
        return [predictor.planned(lengths) for predictor in self.predictors.values()]

    def run_block(
        self,
        blocks: Sequence[Array],
        where: str,
        first_row: int | None = 0,
        batch_rows: Sequence[int | None] | None = None,
    ) -> Any:
        """Outputs on one block, in the order of its rows. Batches are of the rows of one model."""
        *inputs, labels = blocks
        labels = as_block(labels, "the labels")
        results = [np.empty((len(labels), *rows.shape), rows.dtype) for rows in self.outputs]
        done = np.zeros(len(labels), bool)
        for (label, predictor), rows in zip(
            self.predictors.items(), batch_rows or [None] * len(self.predictors), strict=True
        ):
            mine = np.flatnonzero(labels == label)
            if len(mine) == 0:
                continue
            done[mine] = True
            made = predictor.run_block([block[mine] for block in inputs], where, first_row, rows, mine)
            for result, output in zip(results, made if predictor.several else [made], strict=True):
                result[mine] = output
        if not done.all():
            unknown = np.flatnonzero(~done)
            found = ", ".join(map(repr, dict.fromkeys(labels[unknown].tolist()[: _TOLD * 10])))
            told = ", ".join(f"{(first_row or 0) + row:,}" for row in unknown[:_TOLD].tolist())
            raise BlockError(
                f"{where}: {len(unknown)} rows have labels without a model ({found}; rows {told}"
                f"{', ...' if len(unknown) > _TOLD else ''}{' of the block' if first_row is None else ''}); there are "
                f"models for {', '.join(map(repr, self.predictors))}. Add one, or leave those rows out"
            )
        return tuple(results) if self.several else results[0]


def _listed(predictor: Predictor) -> str:
    return " and ".join(map(str, predictor.outputs))


BlockModel = Predictor | Ensemble | Switch
