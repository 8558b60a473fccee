"""A predictor that outlives rows that fail, and counts values that are no numbers. Not for what is kept (`records`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bisection import Failed, Salvage, TooManyFailed, salvage
from .errors import BlockError, SettingsError
from .lost import is_lost
from .predictor import Predictor
from .records import Outcome
from .rows import Array


@dataclass(frozen=True)
class Guard:
    """What a job does about rows that fail, and about values that are NaN or infinite.

    Attributes
    ----------
    on_error : {"raise", "nan", "quarantine"}
    max_errors : int
        Failures that the whole job may have.
    check_finite : bool
    """

    on_error: str = "raise"
    max_errors: int = 100
    check_finite: bool = False

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "nan", "quarantine"):
            raise SettingsError(f"on_error is {self.on_error!r}: choose 'raise', 'nan' or 'quarantine'")
        if self.max_errors < 1:
            raise SettingsError(f"max_errors is {self.max_errors}: give 1 or more, or on_error='raise'")

    @property
    def most(self) -> int:
        """Failures that the whole job may have."""
        return 0 if self.on_error == "raise" else self.max_errors

    @property
    def watches(self) -> bool:
        """Whether there is anything to do."""
        return self.on_error != "raise" or self.check_finite

    def refuse_integers(self, outputs: Sequence[Any], model: str) -> None:
        """Refuse outputs that cannot say that a row failed."""
        for rows in outputs:
            if self.on_error != "raise" and rows.dtype.kind not in "fc":
                raise SettingsError(
                    f"on_error={self.on_error!r} writes NaN for rows that fail, and the output of {model} is "
                    f"{rows.dtype}, which has none: make it floating (postprocess=lambda y: y.astype('float64')), or "
                    "choose on_error='raise'"
                )


PLAIN = Guard()


class Guarded(Predictor):
    """A predictor whose blocks are `Outcome`s.

    Parameters
    ----------
    guard : Guard
    names : sequence of str
        Of all inputs, in order.
    *arguments, **settings
        As for `Predictor`.
    """

    def __init__(self, guard: Guard, names: Sequence[str], *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.guard = guard
        self.names = tuple(names)

    def __dask_tokenize__(self) -> Any:
        # Its blocks must not be taken for those of a plain predictor.
        return ("zcinfer.Guarded", self.fingerprint(), self.guard, self.names)

    def run_block(
        self,
        blocks: Sequence[Array],
        where: str,
        first_row: int | None = 0,
        batch_rows: int | None = None,
        numbers: Array | None = None,
    ) -> Any:
        """As for `Predictor`; rows that fail are found, and all others computed."""
        plain, rows, first = super().run_block, len(blocks[0]), first_row or 0

        def compute(start: int, stop: int) -> Any:
            some = None if numbers is None else numbers[start:stop]
            begin = first + start if numbers is None else first
            return plain([block[start:stop] for block in blocks], where, begin, batch_rows, some)

        # One block, however many parts it is computed in
        with self.counted(blocks, where):
            if self.guard.on_error == "raise":
                found: Salvage[Any] = Salvage([(0, rows, compute(0, rows))], [])
            else:
                found = self._salvage(compute, rows, batch_rows or rows, where, first)
        bad = [failed.start for failed in found.failed if not failed.together]
        record: dict[str, Any] = {}
        if found.failed:
            record["failures"] = [self._told(failed, first) for failed in found.failed]
        if self.guard.check_finite:
            record["nonfinite"] = [*self._counted(blocks, found)]
        keep = bad and self.guard.on_error == "quarantine"
        inputs = {name: block[bad] for name, block in zip(self.names, blocks, strict=True)} if keep else {}
        return Outcome(self._joined(found, rows), record, inputs)

    def _salvage(
        self, compute: Callable[[int, int], Any], rows: int, batch_rows: int, where: str, first: int
    ) -> Salvage[Any]:
        most = self.guard.max_errors
        try:
            return salvage(compute, rows, batch_rows, most, is_lost)
        except TooManyFailed as many:
            listed = ", ".join(f"{first + failed.start:,}" for failed in many.failed[:5])
            raise BlockError(
                f"{where}: more than max_errors={most} rows failed (rows {listed}...), the first with: "
                f"{many.failed[0].error}. What is finished is kept: mend the model or the input, or allow more"
            ) from None

    def _told(self, failed: Failed, first: int) -> dict[str, Any]:
        return {
            "first": first + failed.start,
            "last": first + failed.stop - 1,
            "kept": failed.together,
            "error": failed.error,
            "traceback": failed.traceback,
            "model": str(self.ref),
        }

    def _joined(self, found: Salvage[Any], rows: int) -> Any:
        """Results of all rows; NaN where there are none."""
        if len(found.parts) == 1 and found.parts[0][:2] == (0, rows):
            return found.parts[0][2]
        binding = self._bound()
        results = [np.full((rows, *output.shape), np.nan, output.dtype) for output in binding.outputs]
        for start, stop, part in found.parts:
            for result, some in zip(results, part if binding.several else [part], strict=True):
                result[start:stop] = some
        return tuple(results) if binding.several else results[0]

    def _counted(self, blocks: Sequence[Array], found: Salvage[Any]) -> Iterator[list[Any]]:
        """Name, NaN and infinite values of each input and output that has any; of outputs where rows did not fail."""
        binding = self._bound()
        for name, block in zip(self.names, blocks, strict=True):
            counts = _count(block)
            if any(counts):
                yield ["input" if name == "input" else f"input {name}", *counts]
        for number in range(len(binding.outputs)):
            each = [_count(part[number] if binding.several else part) for _, _, part in found.parts]
            counts = sum(nan for nan, _ in each), sum(infinite for _, infinite in each)
            if any(counts):
                yield [f"output {number}" if binding.several else "output", *counts]


def _count(array: Array) -> tuple[int, int]:
    """Values that are NaN, and infinite."""
    if array.dtype.kind not in "fc":
        return 0, 0
    finite = int(np.count_nonzero(np.isfinite(array)))
    if finite == array.size:
        return 0, 0
    nan = int(np.count_nonzero(np.isnan(array)))
    return nan, array.size - finite - nan
