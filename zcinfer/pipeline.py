"""A block through a model on a GPU: rows go in and results come back while it computes, and nothing waits for a batch.

Batches are those of the CPU (`forward`). What goes over the bus goes in chunks of whole batches, one copy each way
for all inputs and all outputs; the host waits where a slot is used again, and at the end. Not for streams (`lanes`),
nor for what lies in a slot (`staging`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from .batches import Index, Lengths, cut
from .binding import Binding
from .calling import Call, Function, put_in_place
from .device_memory import empty_cache
from .forward import refuse_others
from .lanes import SLOTS, Lane, Slot, lanes
from .lost import code_of
from .rows import Array
from .staging import Piece, dtype_of, lay_out, stage
from .telemetry import PHASES, Clock
from .tuning import is_out_of_memory

_PREPARING, _TO_DEVICE, _WAITING, _COMPUTING, _FROM_DEVICE = map(
    PHASES.index, ("preparing", "to_device", "waiting", "computing", "from_device")
)

# Bytes of a chunk, one batch at least: so few that a block is some chunks, which overlap; so many that the some ten
# steps which each takes in Python are shared by many batches.
LEAST, MOST, PARTS = 1 << 21, 1 << 24, 4
# Slots in use where a batch is more than that: what overlaps is as much, and pinned memory is not cheap.
FEW = 2


class BatchFailed(Exception):
    """A batch failed. Not for users: who knows the block says so in words of its own.

    Attributes
    ----------
    rows : slice or numpy.ndarray
        The block's that it is of.
    error : Exception
    on_host : bool
        Whether it failed before the model or after it, in one piece: halves of it have not been tried.
    """

    def __init__(self, rows: Index, error: Exception, on_host: bool = False):
        super().__init__(rows)
        self.rows, self.error, self.on_host = rows, error, on_host


class Unplaced(Exception):
    """Something failed, and not at the batch that was to blame: a device tells of its errors later.

    Attributes
    ----------
    error : Exception
    """

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


def suits(device: torch.device) -> bool:
    """Whether blocks go this way. On the CPU there is nothing to overlap with."""
    return device.type == "cuda"


class Pipeline:
    """A model as a function of one block.

    Parameters
    ----------
    function : callable
        The model's call on one batch: chosen outputs of tensors, the last by name (`Call.on`).
    call : Call
    binding : Binding
        What was found for its inputs.
    keywords : sequence of str
        Names of the last inputs.
    device : torch.device
        That the model is on.
    clock : Clock
        Told of every phase. "computing" is the time in which the host asks for work of the device, or waits for it.
    door : context manager
        Entered for each chunk, while the host asks for its work.
    most : callable
        More rows than it gives are known to be too many for the memory.
    told : callable
        Called with the number of rows that were too many; `most` knows from then on.
    """

    def __init__(
        self,
        function: Function,
        call: Call,
        binding: Binding,
        keywords: tuple[str, ...],
        device: torch.device,
        clock: Clock,
        door: AbstractContextManager[object],
        most: Callable[[], int | None],
        told: Callable[[int], None],
    ):
        self._function, self._call, self._binding, self._keywords = function, call, binding, keywords
        self._device, self._clock, self._door, self._most, self._told = device, clock, door, most, told
        self._dtypes = [getattr(torch, cast) for cast in binding.casts]
        self._made = [dtype_of(rows) for rows in binding.raw]

    def __call__(
        self, results: Sequence[Array], blocks: Sequence[Array], batch_rows: int, lengths: Lengths | None = None
    ) -> None:
        """Fill the results of a block.

        Parameters
        ----------
        results, blocks : sequence of numpy.ndarray
            ``(rows, ...)`` each, with equal numbers of rows.
        batch_rows : int
        lengths : Lengths, optional
            By which rows are sorted into batches.

        Raises
        ------
        BatchFailed
        Unplaced
            By the device, which may live or not; or there was no memory for a chunk. Some results may be there.
        """
        with lanes.lend(self._device) as lane:
            try:
                self._flow(lane, results, blocks, batch_rows, lengths)
            except Exception as error:
                told = _told_of(lane, error)
                if told is error:
                    raise
                try:
                    raise told from error
                finally:
                    del told  # which would keep itself, and the lane's memory, until Python looks for such circles
            except BaseException:
                _what_came_later(lane)
                raise

    def _flow(
        self,
        lane: Lane,
        results: Sequence[Array],
        blocks: Sequence[Array],
        batch_rows: int,
        lengths: Lengths | None,
    ) -> None:
        under_way: deque[tuple[Slot, list[Piece]]] = deque()
        slots = SLOTS if self._row_bytes() * batch_rows <= MOST else FEW
        # Weights may have been copied to the device by the stream that is this thread's.
        lane.compute.wait_stream(lane.streams.current_stream(self._device))
        for number, pieces in enumerate(self._chunks(blocks, batch_rows, lengths)):
            if len(under_way) == slots:
                self._take(*under_way.popleft(), results, batch_rows)
            slot = lane.slots[number % slots]
            self._send(lane, slot, pieces)
            self._compute(lane, slot, pieces, batch_rows)
            self._return(lane, slot, pieces)
            under_way.append((slot, pieces))
        while under_way:
            self._take(*under_way.popleft(), results, batch_rows)

    def _chunks(self, blocks: Sequence[Array], batch_rows: int, lengths: Lengths | None) -> Iterator[list[Piece]]:
        """What goes over the bus together: some batches."""
        rows, batches = len(blocks[0]), self._batches(len(blocks[0]), batch_rows)
        if self._call.preprocess is None and lengths is None:
            for index in cut(rows, batches * batch_rows):
                yield [Piece(index, [block[index] for block in blocks], self._keywords)]
            return
        pieces = []
        for index in cut(rows, batch_rows, lengths.order if lengths is not None else None):
            try:
                pieces.append(self._prepared(index, blocks, lengths))
            except Exception as error:
                raise BatchFailed(index, error, on_host=True) from error
            if len(pieces) == batches:
                yield pieces
                pieces = []
        if pieces:
            yield pieces

    def _batches(self, rows: int, batch_rows: int) -> int:
        """Batches of a chunk."""
        of_row = self._row_bytes()
        chunk = min(MOST, max(LEAST, of_row * rows // PARTS))
        return max(1, chunk // (of_row * batch_rows))

    def _row_bytes(self) -> int:
        """Bytes of a row of all inputs, or of all outputs where those are more."""
        kinds = zip(self._binding.prepared, self._dtypes, strict=True)
        inward = sum(torch.Size(found.shape).numel() * dtype.itemsize for found, dtype in kinds)
        return int(max(1, inward, sum(found.nbytes for found in self._binding.raw)))

    def _prepared(self, index: Index, blocks: Sequence[Array], lengths: Lengths | None) -> Piece:
        """One batch, as the model gets it."""
        batch: Sequence[Array] = [block[index] for block in blocks]
        names, trimmed = self._keywords, None
        if lengths is not None:
            batch, trimmed = lengths.trimmed(batch, index)
        if self._call.preprocess is not None:
            batch, names = self._call.prepare(batch, names)
            self._clock.lap(_PREPARING)
        return Piece(index, batch, names, trimmed)

    def _send(self, lane: Lane, slot: Slot, pieces: Sequence[Piece]) -> None:
        """Ask for the copy of a chunk to the device. Nothing uses the slot."""
        try:
            inward, outward = lay_out(pieces, self._binding.casts, self._binding.raw)
            slot.rows.reserve(inward)
            slot.results.reserve(outward)
            for piece in pieces:
                stage(slot.rows, piece, self._binding.casts)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            every = [piece.rows for piece in pieces]
            whole = every[0] if len(every) == 1 else np.concatenate([np.r_[rows] for rows in every])
            raise BatchFailed(whole, error) from error
        with lane.streams.stream(lane.copy_in):
            slot.rows.there[:inward].copy_(slot.rows.host[:inward], non_blocking=True)
            slot.arrived.record(lane.copy_in)
        self._clock.lap(_TO_DEVICE)

    def _compute(self, lane: Lane, slot: Slot, pieces: Sequence[Piece], batch_rows: int) -> None:
        """Ask for the forwards of a chunk, and have their outputs in the slot."""
        with self._door:
            self._clock.lap(_WAITING)
            with lane.streams.stream(lane.compute):
                lane.compute.wait_event(slot.arrived)
                for piece in pieces:
                    inputs = [
                        slot.rows.at(offset, array.shape, dtype, there=True)
                        for array, dtype, offset in zip(piece.arrays, self._dtypes, piece.inputs, strict=True)
                    ]
                    outputs = self._outputs(slot, piece, there=True)
                    batches = zip(_split(inputs, batch_rows), _split(outputs, batch_rows), strict=True)
                    for number, (batch, places) in enumerate(batches):
                        self._clock.batches += 1
                        try:
                            self._in_halves(slot, batch, piece.names, places, piece.trimmed)
                        except Exception as error:
                            start = number * batch_rows
                            raise BatchFailed(piece.part(start, start + len(batch[0])), error) from error
                slot.computed.record(lane.compute)
            self._clock.lap(_COMPUTING)

    def _outputs(self, slot: Slot, piece: Piece, there: bool) -> list[torch.Tensor]:
        return [
            slot.results.at(offset, (len(piece), *rows.shape), dtype, there)
            for rows, dtype, offset in zip(self._binding.raw, self._made, piece.outputs, strict=True)
        ]

    def _in_halves(
        self,
        slot: Slot,
        batch: Sequence[torch.Tensor],
        names: tuple[str, ...],
        places: Sequence[torch.Tensor],
        trimmed: tuple[int, int] | None,
    ) -> None:
        """Run a batch; in halves where it is too large for the memory, as `batches.in_halves` cuts them."""
        rows, known = len(batch[0]), self._most()
        if known is None or rows <= known:
            try:
                outputs = self._function(batch, names)
                for output, place, raw in zip(outputs, places, self._binding.raw, strict=True):
                    put_in_place(output, place, raw, trimmed)
                return
            except Exception as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # it holds the tensors that did not fit
            empty_cache(self._device)
            self._told(rows)
            for tensor in batch:  # the model may have written to them
                tensor.copy_(slot.rows.twin(tensor), non_blocking=True)
        half = (rows + 1) // 2
        for part in (slice(half), slice(half, rows)):
            self._in_halves(slot, [t[part] for t in batch], names, [place[part] for place in places], trimmed)

    def _return(self, lane: Lane, slot: Slot, pieces: Sequence[Piece]) -> None:
        """Ask for the copy of the results of a chunk to the host."""
        with lane.streams.stream(lane.copy_out):
            lane.copy_out.wait_event(slot.computed)
            last = pieces[-1]
            used = last.outputs[-1] + len(last) * self._binding.raw[-1].nbytes
            slot.results.host[:used].copy_(slot.results.there[:used], non_blocking=True)
            slot.returned.record(lane.copy_out)

    def _take(self, slot: Slot, pieces: Sequence[Piece], results: Sequence[Array], batch_rows: int) -> None:
        """Wait for the results of a chunk, and put them where they go. From then on nothing uses the slot."""
        slot.returned.synchronize()
        self._clock.lap(_COMPUTING)
        for piece in pieces:
            arrays = [tensor.numpy() for tensor in self._outputs(slot, piece, there=False)]
            if self._call.postprocess is None:
                for result, array in zip(results, arrays, strict=True):
                    result[piece.rows] = array
                continue
            for start in range(0, len(piece), batch_rows):
                rows = piece.part(start, min(start + batch_rows, len(piece)))
                try:
                    # Copies: the function may keep what it gets, and the slot is used again.
                    made = self._call.finish([array[start : start + batch_rows].copy() for array in arrays])
                    every = list(made) if isinstance(made, tuple) else [made]
                    refuse_others(every, self._binding.outputs, len(arrays[0][start : start + batch_rows]))
                except Exception as error:
                    raise BatchFailed(rows, error, on_host=True) from error
                for result, array in zip(results, every, strict=True):
                    result[rows] = array
        self._clock.lap(_FROM_DEVICE)


def _split(tensors: Sequence[torch.Tensor], rows: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors of one batch after the other."""
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _told_of(lane: Lane, error: Exception) -> Exception:
    """What to raise for an error: one of the device's may be of any batch before, and comes when it likes."""
    cause = error.error if isinstance(error, BatchFailed) else error
    late = _what_came_later(lane) or cause
    if code_of(late) is not None and not is_out_of_memory(late):
        return Unplaced(late)
    if isinstance(error, BatchFailed) or not is_out_of_memory(error):
        return error
    return Unplaced(error)


def _what_came_later(lane: Lane) -> Exception | None:
    """Wait until nothing uses the slots and the module any more, and tell how that failed."""
    try:
        lane.finish()
    except Exception as error:
        return error
    return None
