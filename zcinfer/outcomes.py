"""Blocks computed one by one: on the current Dask client's cluster, or in this process where there is none."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from typing import Any

import dask.array as da

from .catalog import dask_client
from .errors import BlockError, ZcinferError

# Called with an array before its blocks are computed here, each as a graph of its own; and with None when that is over.
followers: list[Callable[[da.Array | None], object]] = []


def compute_each(written: da.Array, numbers: Sequence[int]) -> Iterator[int]:
    """Compute an array of one element a block, yielding each block's number when it is done."""
    client = dask_client()
    with closing(_outcomes_here(written) if client is None else _outcomes_on(client, written)) as outcomes:
        for place, error in outcomes:
            if isinstance(error, ZcinferError):
                raise error
            if error is not None:
                raise BlockError(
                    f"block {numbers[place]}: {type(error).__name__}: {error}. What is finished is kept; the same call "
                    "goes on from there."
                ) from error
            yield numbers[place]


_Outcomes = Generator[tuple[int, BaseException | None], None, None]


def _outcomes_on(client: Any, written: da.Array) -> _Outcomes:
    from distributed import as_completed, futures_of

    waiting = set(futures_of(client.persist(written)))
    try:
        for future in as_completed(waiting):
            # Let go of, so that it is not computed again when the worker that has its result dies.
            waiting.discard(future)
            yield future.key[1], None if future.status == "finished" else _error_of(future)
    finally:
        # After an error or Ctrl-C the others need not be computed. Who has lost the scheduler would wait for it here
        if client.status == "running":
            client.cancel(list(waiting))


def _error_of(future: Any) -> BaseException | None:
    try:
        error: BaseException | None = future.exception()
    except CancelledError as cancelled:
        error = cancelled
    if error is None and future.status != "finished":
        # All futures of a client that has lost its scheduler are cancelled, and have no exception
        return CancelledError("the connection to Dask's scheduler was lost, or somebody has cancelled the job")
    return error


def _outcomes_here(written: da.Array) -> _Outcomes:
    for follow in followers:
        follow(written)
    try:
        # One block after the other; torch uses all cores for each.
        for place in range(written.numblocks[0]):
            try:
                written.blocks[place].compute(scheduler="sync")
            except Exception as error:
                yield place, error
            else:
                yield place, None
    finally:
        for follow in followers:
            follow(None)
