"""A lazy array written block by block into a target that appears when it is complete.

Not for what is computed (`jobs`), nor for how the target looks (`target`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import dask.array as da
import numpy as np
from dask.layers import ArrayValuesDep

from .errors import BlockError, OutputError
from .guarded import PLAIN, Guard
from .jobreport import Report
from .outcomes import compute_each
from .progress import Progress
from .records import Record, in_short, read_record
from .target import Target, token_of, write_block

FORMAT = 1


def check_target(target: str | Path) -> None:
    """Refuse a target that exists and was not written by zcinfer, before anything is started."""
    Target(target).refuse_foreign()


def write(
    array: da.Array,
    target: str | Path | Target,
    identity: dict[str, Any],
    *,
    resume: bool = True,
    chunk_rows: int | None = None,
    label: str = "writing",
    progress: bool = True,
    batch_rows: int | None = None,
    guard: Guard = PLAIN,
) -> Report:
    """Compute a lazy array block by block into a zarr array that appears, complete, under the name ``target``.

    Parameters
    ----------
    array : dask.array.Array
        ``(rows, ...)``; row chunks of one length (the last may be short), other axes in one chunk.
    target : path
    identity : dict
        What is computed, in JSON types; a restart goes on only with the same.
    resume, chunk_rows, progress
        As for `run`; of ``chunk_rows`` a block is a multiple.
    label : str
        What to call the job.
    batch_rows : int, optional
        Rows of a batch, kept for a restart.
    guard : Guard, optional
        Where it watches, blocks of ``array`` are `Outcome`s.

    Returns
    -------
    Report
    """
    begin = perf_counter()
    place = target if isinstance(target, Target) else Target(target)
    lengths = array.chunks[0]
    if any(length != lengths[0] for length in lengths[:-1]) or not lengths[-1] <= lengths[0]:
        raise OutputError(
            f"the row chunks {lengths[:4]}... have different or unknown lengths: rechunk the input, x.rechunk({{0: n}})"
        )
    manifest = manifest_of(array, identity, chunk_rows) | {"batch_rows": batch_rows}

    def report(computed: int) -> Report:
        shape = tuple(array.shape)
        seconds = perf_counter() - begin
        return Report(str(place.path), shape, shape[0], len(lengths), computed, seconds, **in_short(records))

    with place.claim(manifest, resume) as complete:
        records = place.records()
        refuse_failures(records, place, guard)
        if complete:
            return report(0)
        done = place.prepare(manifest)
        failed = sum(len(record.failures) for record in records.values())
        missing = [number for number in range(len(lengths)) if number not in done]
        rows_done = sum(lengths[number] for number in done)
        with Progress(label, array.shape[0], rows_done, quiet=not progress) as bar:
            if missing:
                written = _written(array, place, len(done))
                for number in compute_each(written.blocks[missing], missing):
                    bar.add(lengths[number])
                    record = read_record(place.partial, number) if guard.watches else None
                    if record is not None:
                        records[number] = record
                        failed += len(record.failures)
                    if failed > guard.most:
                        raise BlockError(_too_many(records, place, f"more than max_errors={guard.most}"))
        place.finish(len(lengths))
        return report(len(missing))


def _written(array: da.Array, place: Target, before: int) -> da.Array:
    """An array of one element a block: its rows, when they are written."""
    lengths, token = array.chunks[0], token_of(place.partial)
    # No map_blocks: for axes that it drops it joins the chunks, and a block may be an `Outcome`.
    return da.blockwise(
        partial(write_block, path=str(place.partial), token=token, block_rows=lengths[0], before=before),
        (0,),
        ArrayValuesDep((lengths,), {(number,): number for number in range(len(lengths))}),
        (0,),
        array,
        tuple(range(array.ndim)),
        adjust_chunks={0: (1,) * len(lengths)},
        align_arrays=False,
        dtype=np.int64,
        meta=np.empty(0, np.int64),
        name="write-" + token,
    )


def manifest_of(array: da.Array, identity: dict[str, Any], chunk_rows: int | None) -> dict[str, Any]:
    """What a target says of itself; a restart goes on only with the same."""
    return {
        "format": FORMAT,
        "identity": identity,
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "block_rows": array.chunks[0][0],
        "chunk_rows": chunk_rows,
    }


def refuse_failures(records: Mapping[int, Record], place: Target, guard: Guard) -> None:
    """Refuse to go on where more has failed than may."""
    if sum(len(record.failures) for record in records.values()) > guard.most:
        allowed = f"more than max_errors={guard.most}" if guard.most else "and on_error='raise' allows none"
        raise OutputError(
            _too_many(records, place, allowed)
            + " Allow them (on_error, max_errors), or start over with resume=False (--start-over)"
        )


def _too_many(records: Mapping[int, Record], place: Target, allowed: str) -> str:
    failures = [failure for record in records.values() for failure in record.failures]
    first = min(failures, key=lambda failure: failure.first)
    count = f"{len(failures):,} failure" + "s" * (len(failures) > 1)
    return (
        f"{count}, {allowed}; the first: row {first.first:,}: {first.error}. "
        f"zcinfer.failures({str(place.path)!r}) tells of all."
    )
