"""One block through a model: batch after batch, or through a pipeline; and what is told of rows that fail.

Not for what a predictor is told and finds before (`predictor`), nor for which rows a batch has (`batches`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from . import engines, pipeline
from .batches import Index, Lengths, cut, in_halves, name_of
from .computing import computing
from .errors import OutputError, ZcinferError
from .forward import Forward
from .loading import residents
from .lost import failed, has_ended
from .probing import explain
from .rows import Array
from .sizes import format_size
from .store import ModelRef
from .telemetry import PHASES, Clock
from .tuning import is_out_of_memory

if TYPE_CHECKING:
    from .predictor import Predictor

log = logging.getLogger("zcinfer")

_MODEL, _WAITING, _FROM_DEVICE = map(PHASES.index, ("model", "waiting", "from_device"))


class Span:
    """What a block is called in errors, and some rows of it.

    Parameters
    ----------
    ref : ModelRef
        That it goes through.
    where : str
        What to call the block.
    first_row : int, optional
        Number of the block's first row in the whole array; None: not known.
    numbers : numpy.ndarray, optional
        Which rows of the block these are, where they are some of it.
    """

    def __init__(self, ref: ModelRef, where: str, first_row: int | None, numbers: Array | None):
        self._ref, self._where, self._first_row, self._numbers = ref, where, first_row, numbers

    def __str__(self) -> str:
        return f"{self._where}, of {self._ref}"

    def of(self, rows: Index) -> str:
        """What to call some rows."""
        numbers = rows if self._numbers is None else self._numbers[rows]
        return f"{self._where}, rows {name_of(numbers, self._first_row)}, of {self._ref}"


class BlockRun:
    """A bound predictor at work on one block.

    Parameters
    ----------
    predictor : Predictor
    blocks : sequence of numpy.ndarray
        ``(rows, ...)`` each, with equal numbers of rows.
    span : Span
    clock : Clock
        Told of every phase.
    """

    def __init__(self, predictor: Predictor, blocks: Sequence[Array], span: Span, clock: Clock):
        assert predictor.binding is not None
        self._predictor, self._call, self._binding = predictor, predictor.call, predictor.binding
        self._blocks, self._span, self._clock = blocks, span, clock
        self._device = predictor.device_here()
        self._place = predictor.place(self._device)
        sort_by = predictor.sort_by
        self._lengths = Lengths(blocks, predictor.keywords, sort_by) if sort_by is not None else None

    def fill(self, results: Sequence[Array], batch_rows: int) -> None:
        """Run the model on all rows, so many at a time.

        Parameters
        ----------
        results : sequence of numpy.ndarray
            ``(rows, ...)`` each.
        batch_rows : int

        Raises
        ------
        ZcinferError
            Names the rows.
        """
        predictor, device, clock = self._predictor, self._device, self._clock
        engines.check_device(predictor.engine, device)
        self._place.ask()
        try:
            # Threads that take turns batch by batch find each other's data in the caches, and wait for each other every
            # time. That pays only where there is other work between batches.
            turns = self._call.preprocess is not None or self._call.postprocess is not None or device.type != "cpu"
            for_batch = computing() if turns else None
            with residents.lend(predictor.ref, str(device), predictor.training) as model, torch.inference_mode():
                called = engines.module_of(predictor.engine, model, self._call.method, device)
                clock.lap(_MODEL)
                if pipeline.suits(device) and self._has_flowed(model, results, batch_rows):
                    return
                with nullcontext() if turns else computing():
                    clock.lap(_WAITING)
                    forward = Forward(called, self._call, self._binding, predictor.keywords, device, clock, for_batch)
                    self._in_batches(forward, results, batch_rows)
        except ZcinferError:
            raise
        except Exception as error:
            raise failed(f"{self._span}: it cannot be used on {device}", error) from error

    def _in_batches(self, forward: Forward, results: Sequence[Array], batch_rows: int) -> None:
        order = self._lengths.order if self._lengths is not None else None
        run = partial(self._run_rows, forward, results)
        for rows in cut(len(self._blocks[0]), batch_rows, order):
            try:
                in_halves(partial(run, rows), rows, self._place.ceiling, is_out_of_memory, self._too_many)
            except Exception as error:
                cause = self._cause(error)
                raise failed(self._span.of(rows), cause) from cause

    def _run_rows(self, forward: Forward, results: Sequence[Array], batch: Index, rows: Index) -> None:
        """Run a batch, or some of its rows, which are as long as the batch's longest; fill their results."""
        inputs, trimmed = [block[rows] for block in self._blocks], None
        if self._lengths is not None:
            inputs, trimmed = self._lengths.trimmed(inputs, batch)
        for result, output in zip(results, forward(inputs, trimmed), strict=True):
            result[rows] = output
        self._clock.lap(_FROM_DEVICE)

    def _too_many(self, rows: int) -> None:
        log.warning("%s: %d rows do not fit into memory, halves of them are tried", self._span, rows)
        self._place.lower(rows // 2)
        self._clock.halved += 1

    def _has_flowed(self, model: torch.nn.Module, results: Sequence[Array], batch_rows: int) -> bool:
        """Whether the block is done, by a pipeline; if not, batch by batch it can be, or shows the rows that fail."""
        predictor, device, batches = self._predictor, self._device, self._clock.batches
        function = engines.function_of(predictor.engine, model, self._call, predictor.ref, device)
        flow = pipeline.Pipeline(
            function,
            self._call,
            self._binding,
            predictor.keywords,
            device,
            self._clock,
            computing(),
            self._place.ceiling,
            self._too_many,
        )
        try:
            flow(results, self._blocks, batch_rows, self._lengths)
            return True
        except pipeline.BatchFailed as batch:
            if not (batch.on_host and is_out_of_memory(batch.error)):
                cause = self._cause(batch.error)
                raise failed(self._span.of(batch.rows), cause) from cause
            why = explain(batch.error)
        except pipeline.Unplaced as late:
            if has_ended(late.error):
                raise failed(f"{self._span}, in some of its rows", late.error) from late.error
            why = explain(late.error)
        # Here, where no error holds a lane's memory any more
        log.warning("%s: %s. It is done again, batch by batch", self._span, why)
        self._clock.batches = batches
        return False

    def _cause(self, error: Exception) -> Exception:
        """The error of a batch; where its last row has run out of memory, one that says what to do."""
        if not is_out_of_memory(error):
            return error
        row = sum(r.nbytes for r in self._binding.inputs)
        told = OutputError(
            f"one row ({format_size(row)}) does not fit into the memory of {self._device}: {explain(error)}. Use "
            "rows of less data, fewer workers on this device, or one with more memory"
        )
        told.__cause__ = error
        return told
