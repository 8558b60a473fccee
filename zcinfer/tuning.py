"""How many rows a batch has: measured once for a model, rows of a kind, and a device, and remembered.

Doubling the batch pays until it fills the caches or the device; where that is differs by a factor of a thousand between
models. So sizes are tried, from one row on, until two doublings in a row have gained nothing, within a budget of
memory that is observed. What was found lies beside the registry, so that all workers and restarts use the same.

Not for cutting blocks (`batches`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import inf
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

from . import config
from .cuda_driver import OUT_OF_MEMORY
from .files import parse_json, read_whole, write_file
from .memory import available, give_back_freed, peak_resident, resident
from .store import ModelRef, registry_of

log = logging.getLogger("zcinfer")

# A size is better from this factor on; differences below come and go with the machine's mood.
GAIN = 1.03
# Sizes tried; seconds for all of them, and for one of them where it is short and so uncertain.
MOST, LONGEST, SURE = 1 << 16, 3.0, 0.05
# Of the memory that a process may use, the share that batches may.
SHARE = 0.5
# Of the CPU's allocator, and of libraries on a GPU (cuBLAS, cuDNN, cuFFT), which ask for memory beside torch's
_NO_MEMORY = re.compile(r"can't allocate memory|\bCU[A-Z]+_(STATUS_)?(\w+_)?ALLOC(ATION)?_FAILED\b")


@dataclass(frozen=True)
class Size:
    """What was found of batches: rows, bytes of memory that one row takes, and the largest that has not failed."""

    rows: int
    row_bytes: float = 0.0
    ceiling: int = MOST


@dataclass(frozen=True)
class Place:
    """Where a batch size holds: a file named by all that it depends on."""

    path: Path

    @classmethod
    def of(cls, ref: ModelRef, *facts: Any) -> Place:
        """The place for this content and these facts, which are told by their ``repr``."""
        key = hashlib.sha256(repr((ref.digest, torch.__version__, *facts)).encode()).hexdigest()
        return cls(registry_of(ref.store) / "batch-sizes" / f"{key}.json")

    def known(self) -> Size | None:
        """What was found here, by this process or another."""
        try:
            return _known[self.path]
        except KeyError:
            pass
        try:
            found = Size(**parse_json(read_whole(self.path, 4096)))
            if not (type(found.rows) is type(found.ceiling) is int and found.rows > 0 < found.ceiling):
                raise ValueError("no numbers of rows")
            float(found.row_bytes)
        except (OSError, ValueError, TypeError):
            return None
        return _known.setdefault(self.path, found)

    def ask(self) -> None:
        """Learn what other processes have found, if none was asked in the last second."""
        now = monotonic()
        if self.path not in _known and now > _asked.get(self.path, -inf) + _AGAIN:
            _asked[self.path] = now
            self.known()

    def ceiling(self) -> int | None:
        """Rows that are known not to be too many, as far as this process has been told; no file is asked."""
        found = _known.get(self.path)
        return found.ceiling if found is not None else None

    def remember(self, size: Size) -> Size:
        """Keep it, unless another process was first: then that is returned, so that all use the same."""
        with _lock:
            try:
                self.path.parent.mkdir(mode=0o700, exist_ok=True)  # in the registry, if it can be seen from here
                with open(self.path.parent / f".{os.getpid()}-{threading.get_ident()}", "x") as file:
                    json.dump(asdict(size), file)
                try:
                    os.link(file.name, self.path)
                except FileExistsError:
                    pass
                finally:
                    os.unlink(file.name)
            except OSError as error:
                log.info("the batch size is not kept: %s", error)
            _known.pop(self.path, None)
            return self.known() or _known.setdefault(self.path, size)

    def lower(self, ceiling: int) -> None:
        """Remember that more rows than these ran out of memory."""
        with _lock:
            found = self.known() or Size(ceiling)
            size = replace(found, rows=min(found.rows, ceiling), ceiling=min(found.ceiling, ceiling))
            _known[self.path] = size
            try:
                self.path.parent.mkdir(mode=0o700, exist_ok=True)  # in the registry, if it can be seen from here
                write_file(self.path, json.dumps(asdict(size)).encode())
            except OSError as error:
                log.info("the batch size is not kept: %s", error)


# What is known here; when files that were not there were asked for last, and seconds until they are again.
_known: dict[Path, Size] = {}
_asked: dict[Path, float] = {}
_AGAIN = 1.0
_lock = threading.RLock()


def measure(run: Callable[[int], object], device: torch.device) -> Size:
    """Find the batch size by trying.

    Parameters
    ----------
    run : callable
        Runs the model on so many rows.
    device : torch.device

    Returns
    -------
    Size
    """
    run(1)  # the first forward pays for pages and kernels that all others have
    if device.type == "cuda":
        return choose_size(lambda rows: _observed_on_gpu(run, rows, device), memory_budget(device))
    # Once and not for every size: a batch in pages that are zeroed anew is slower than those of a job.
    give_back_freed()
    before = resident()

    def observe(rows: int) -> tuple[float, int]:
        begin = perf_counter()
        peak = peak_resident(lambda: run(rows))
        return perf_counter() - begin, max(0, peak - before)

    return choose_size(observe, memory_budget(device))


def choose_size(observe: Callable[[int], tuple[float, int]], budget: float) -> Size:
    """Find the batch size from what is observed of batches.

    Parameters
    ----------
    observe : callable
        Seconds and bytes that a batch of so many rows takes.
    budget : float
        Bytes that a batch may take.
    """
    rates: dict[int, float] = {}
    row_bytes, spent, size = 0.0, 0.0, 1
    while size <= MOST and row_bytes * size <= budget and spent < LONGEST:
        seen = [observe(size)]
        while sum(seconds for seconds, _ in seen) < SURE and len(seen) < 20:
            seen.append(observe(size))
        rates[size] = size / min(seconds for seconds, _ in seen)
        row_bytes = max(nbytes for _, nbytes in seen) / size
        spent += sum(seconds for seconds, _ in seen)
        *before, last, latest = 0.0, 0.0, *rates.values()
        if max(before, default=0.0) * GAIN > max(last, latest):
            break
        size *= 2
    best = max(rates.values())
    return Size(min(size for size, rate in rates.items() if rate * GAIN >= best), row_bytes)


def _observed_on_gpu(run: Callable[[int], object], rows: int, device: torch.device) -> tuple[float, int]:
    """Seconds that a batch takes, and bytes that it takes at most."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    begin = perf_counter()
    run(rows)
    torch.cuda.synchronize(device)
    return perf_counter() - begin, torch.cuda.max_memory_allocated(device) - before


def memory_budget(device: torch.device) -> int:
    """Bytes that batches of this process may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(SHARE * free / jobs_here())
    return int(SHARE * min(available() / jobs_here(), _worker_memory()))


def jobs_here() -> int:
    """Processes that share this one's device."""
    return max(1, int(config.get("jobs")))


def _worker_memory() -> float:
    """Bytes that this process may use, where it is a Dask worker with a limit."""
    module = sys.modules.get("distributed.worker")
    if module is not None:
        try:
            limit = module.get_worker().memory_manager.memory_limit
        except ValueError:
            limit = None
        if limit:
            return float(limit)
    return float("inf")


@cache
def device_name(device: torch.device) -> str:
    """What a batch size depends on of a device."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a batch failed for want of memory, on the CPU or on a GPU."""
    if isinstance(error, torch.AcceleratorError):  # of CUDA itself, as for pinned memory
        return getattr(error, "error_code", None) == OUT_OF_MEMORY
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )
