"""A process whose GPU answers nothing more: after some errors CUDA gives the same one to every call, to the end.

A Dask worker then ends, so that its nanny starts a clean one; what it has computed is moved to others, and the block is
tried again elsewhere. Not for rows that are merely wrong (`bisection`), nor for want of memory (`batches`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from time import monotonic
from typing import Any

import torch

from .device import gone
from .errors import BlockError, DeviceLost
from .probing import explain

log = logging.getLogger("zcinfer")

# CUDA: "the process must be terminated and relaunched"; of 214 and 220 (memory and link errors) it is assumed
STICKY = frozenset({214, 220, 226, 700, 702, 710, *range(714, 720), 721, 810, 911})
# Seconds for the scheduler's answers, and for what else the worker is at
PATIENCE, ENDING = 10.0, 30.0
# Of the scheduler's metadata, with the workers that ended by each block
ENDED = "zcinfer-ended-by"
# Exit status of a worker that ends for this, which its nanny tells
STATUS = 77


def code_of(error: BaseException | None) -> int | None:
    """CUDA's number of an error or of what caused it; 0: it has none; None: it does not come from the device."""
    while error is not None and not isinstance(error, torch.AcceleratorError):
        error = error.__cause__ or error.__context__
    return None if error is None else int(getattr(error, "error_code", 0))


def is_lost(error: BaseException) -> bool:
    """Whether the device answers nothing more after that, or may not: where its error has no number."""
    return isinstance(error, DeviceLost) or code_of(error) == 0


def has_ended(error: BaseException) -> bool:
    """As `is_lost`; and it is asked where the error does not tell."""
    return is_lost(error) or code_of(error) in STICKY or _found_by_asking() in STICKY or bool(_card_gone(error))


def _card_gone(error: BaseException) -> str:
    """Why the card of this process is gone, where an error comes from it: any number may stand for that."""
    return gone(os.environ) if code_of(error) is not None else ""


def failed(what: str, error: Exception) -> Exception:
    """The exception for a block that failed with ``error``.

    Parameters
    ----------
    what : str
        Block, rows and model.
    error : Exception

    Returns
    -------
    BlockError
        Or `DeviceLost`, if the device is. In a Dask worker that is one which has Dask try the block elsewhere, and the
        worker ends; but not for ever: when the block has ended more workers than
        ``distributed.scheduler.allowed-failures``, the last of these errors goes to the user.
    """
    code = code_of(error)
    if code not in STICKY:
        code = _found_by_asking() or code
    told = f"{what}: {explain(error)}"
    lost = "" if code in STICKY else _card_gone(error)
    if code not in STICKY and not lost:
        return BlockError(told)
    told += f" ({lost or f'CUDA error {code}, after which the device answers nothing more in this process'})"
    here = _task_here()
    if here is None:
        return DeviceLost(f"{told}. Start the process anew; find the rows with device='cpu'")
    worker, key = here
    from dask import config
    from distributed import Reschedule

    most = int(config.get("distributed.scheduler.allowed-failures"))
    ended = _end(worker, key, most)  # 0: another block has ended this one
    if ended > most:
        return DeviceLost(
            f"{told}. That is the end of {ended} workers by this block, so it is not tried again. Find its rows with "
            "device='cpu'. To allow more: distributed.scheduler.allowed-failures"
        )
    counted = f" ({ended} of {most} times)" if ended else ", since another one had ended this worker before"
    log.warning("%s. This worker ends, and the block is tried elsewhere%s.", told, counted)
    # Dask tries again what raises its Reschedule, and our own code takes it for what it is.
    elsewhere: type[DeviceLost] = type("TriedElsewhere", (DeviceLost, Reschedule), {})
    return elsewhere(f"{told}: it is tried elsewhere")


def _found_by_asking() -> int | None:
    """CUDA's number of an error that only the next call tells: libraries have errors of their own for it."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return code_of(error)
    return None


def _task_here() -> tuple[Any, Any] | None:
    """Dask's worker and the key of the task that this thread is at; None where there is no nanny to start it anew."""
    module = sys.modules.get("distributed.worker")
    key = getattr(module.thread_state, "key", None) if module is not None else None
    if module is None or key is None:
        return None
    worker = module.get_worker()
    return (worker, key) if worker.nanny is not None else None


# Keys of the blocks that failed since the device is lost; the first is taken for the cause
_failed: set[Any] = set()


def _end(worker: Any, key: Any, most: int) -> int:
    """Have the worker end, once nothing runs in it; the number of workers that the block has ended, this one included.

    Who comes later has not ended this worker: what ran beside the block that did must not be blamed for it, as it is
    sent to the same next worker often enough.
    """
    counted = asyncio.run_coroutine_threadsafe(_announce(worker, key, most), worker.loop.asyncio_loop)
    try:
        return counted.result(2 * PATIENCE)
    except (Late, OSError) as error:
        log.warning("the scheduler cannot be told that this worker ends: %s: %s", type(error).__name__, error)
        return 1


async def _announce(worker: Any, key: Any, most: int) -> int:
    from distributed import Status

    if _failed:
        _failed.add(key)
        return 0
    _failed.add(key)
    # Sent before anything that a task sends later: no task comes here any more, this one neither.
    worker.status = Status.closing_gracefully
    worker.zcinfer_ending = asyncio.ensure_future(_leave(worker))
    place = [ENDED, str(key)]
    ended = 1 + int(await asyncio.wait_for(worker.scheduler.get_metadata(keys=place, default=0), PATIENCE))
    # Who asks for a block again that has failed for good means it anew.
    kept = ended if ended <= most else 0
    await asyncio.wait_for(worker.scheduler.set_metadata(keys=place, value=kept), PATIENCE)
    return ended


async def _leave(worker: Any) -> None:
    """Wait until the tasks here have said what became of them, hand over results, and end the process."""
    try:
        await asyncio.wait_for(_hand_over(worker), ENDING)
    except Exception as error:
        log.warning("results may have been lost with this worker: %s: %s", type(error).__name__, error)
    finally:
        # Without destructors, which would ask a dead device.
        os._exit(STATUS)


async def _hand_over(worker: Any) -> None:
    address, began = worker.address, monotonic()
    while monotonic() - began < ENDING / 2:
        known = await worker.scheduler.processing(workers=[address])
        if not worker.state.executing and not _failed & set(known.get(address, ())):
            break
        await asyncio.sleep(0.02)
    stimulus = f"zcinfer-device-lost-{address}"
    await worker.scheduler.retire_workers(workers=[address], close_workers=False, remove=False, stimulus_id=stimulus)
    # A worker that finds itself forgotten ends, and has its nanny end with it, which is to start it anew.
    worker.nanny = None
    # Expected: tasks that wait here are not suspected of having ended it.
    with suppress(OSError):
        await worker.scheduler.unregister(address=address, expected=True, close=False, stimulus_id=stimulus)
