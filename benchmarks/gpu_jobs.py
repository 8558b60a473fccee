"""Processes on one device that wait for work, so that many settings are measured without starting each time anew.

Each is a fresh process with rows of its own in memory. All begin at once, and say when they began and ended. Not for
what is asked of them (`gpu`), nor for models other than the talk's (`gpu_parts`).
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import zcinfer as zc
from zcinfer.rows import rows_of

Array = np.ndarray[Any, np.dtype[Any]]

LOOP, THREADS, OURS = "a loop", "four threads", "zcinfer"
# Rows of a block, of ours; and of what the others do between two looks at the clock
BLOCK, BETWEEN = 65_536, 4096
PATIENCE = 300


class Job:
    """What one of the processes holds.

    Parameters
    ----------
    device : str
    directory : path
        Of the registry, the model and the rows.
    """

    def __init__(self, device: str, directory: Path):
        self.device, self.directory = torch.device(device), directory
        self.x: Array = np.empty((0, 64), np.float32)
        self.work: Callable[[Array], Array] = lambda x: x
        self.block = BLOCK
        self.kept: list[Any] = []
        zc.connect(f"file:{directory / 'registry'}")

    def rows(self, number: int, of: int, rows: int) -> None:
        """Have a share of the rows in memory."""
        x = np.load(self.directory / "x.npy", mmap_mode="r")[:rows]
        self.x = np.array(np.array_split(x, of)[number])

    def prepare(self, way: str, batch: int | str, engine: str) -> int:
        """Have all that is made once: the model, the batch size, memory, graphs; and compare. Rows of a batch."""
        sample = self.x[:BLOCK]
        if way == OURS:
            predictor = zc.Predictor("mlp", batch_size=batch, engine=engine, device=str(self.device))
            self.work = predictor
            found = predictor.bind([rows_of(self.x)]).measured() if batch == "auto" else int(batch)
            self.block = max(BLOCK, 8 * found)
            sample = self.x[: self.block]
            predictor(sample)  # a shape is captured when it comes again
        else:
            found = int(batch)
            model = torch.load(self.directory / "model.pt", weights_only=False).to(self.device)
            self.work = {LOOP: loop, THREADS: threads}[way](model, found, self.device)
            self.block = BETWEEN
            sample = self.x[:BETWEEN]
        expected = np.load(self.directory / "expected.npy", mmap_mode="r")[: len(sample)] if len(sample) else sample
        if self.is_first and not np.allclose(self.work(sample)[: len(expected)], expected, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{way}, batch {batch}, {engine}: another result than torch's on the CPU")
        return found

    @property
    def is_first(self) -> bool:
        """Whether its rows are the first ones, of which the results are known."""
        first = np.load(self.directory / "x.npy", mmap_mode="r")[:1]
        return len(self.x) > 0 and bool((self.x[:1] == first).all())

    def go(self, seconds: float) -> dict[str, float]:
        """Do the rows, block by block; as many as there is time for."""
        begin, rows = monotonic(), 0
        while rows < len(self.x) and (rows == 0 or monotonic() - begin < seconds):
            rows += len(self.work(self.x[rows : rows + self.block]))
        return {"rows": rows, "begin": begin, "end": monotonic()}

    def part(self, part: str, **options: Any) -> Any:
        """A part of the benchmark that one process does."""
        from . import gpu_parts

        return getattr(gpu_parts, part)(self, **options)


def loop(model: nn.Module, batch: int, device: torch.device) -> Callable[[Array], Array]:
    """The talk's loop: what anybody writes first."""

    def work(x: Array) -> Array:
        with torch.inference_mode():
            parts = [
                model(torch.from_numpy(x[start : start + batch]).to(device)).cpu().numpy()
                for start in range(0, len(x), batch)
            ]
        return np.concatenate(parts)

    return work


def threads(model: nn.Module, batch: int, device: torch.device, number: int = 4) -> Callable[[Array], Array]:
    """The talk's four threads."""
    pool, one = ThreadPoolExecutor(number), loop(model, batch, device)
    return lambda x: np.concatenate(list(pool.map(one, np.array_split(x, number))))


def serve(pipe: Any, device: str, directory: str) -> None:
    """Do what is asked for, until nobody asks any more."""
    try:
        job = Job(device, Path(directory))
        while True:
            name, options = pipe.recv()
            try:
                pipe.send((True, getattr(job, name)(**options)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    except (EOFError, KeyboardInterrupt):
        return


class Processes:
    """The processes, by number; a context manager that ends them.

    Parameters
    ----------
    number : int
    device : str
    directory : path
    **environment : str
        Of theirs, beside that of this process.
    """

    def __init__(self, number: int, device: str, directory: Path, **environment: str):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, device, str(directory)), daemon=True)
            with patch.dict(os.environ, environment):
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()

    def ask(
        self, numbers: Sequence[int], method: str, each: Sequence[dict[str, Any]] = (), /, **options: Any
    ) -> list[Any]:
        """Ask some of them for the same, at once; their answers.

        Raises
        ------
        RuntimeError
            One failed; says how.
        """
        for place, number in enumerate(numbers):
            self._pipes[number].send((method, options | (each[place] if each else {})))
        answers = []
        for number in numbers:
            if not self._pipes[number].poll(PATIENCE):
                raise RuntimeError(f"job {number} has not answered for {PATIENCE} seconds ({method})")
            answers.append(self._pipes[number].recv())
        for good, answer in answers:
            if not good:
                raise RuntimeError(answer)
        return [answer for _, answer in answers]

    def rate(self, jobs: int, way: str, batch: int | str, engine: str, seconds: float) -> dict[str, Any]:
        """Rows/s of so many jobs together, from the first that begins to the last that ends."""
        numbers = range(jobs)
        batches = self.ask(numbers[:1], "prepare", way=way, batch=batch, engine=engine)  # it measures, for all
        self.ask(numbers[1:], "prepare", way=way, batch=batch, engine=engine)
        done = self.ask(numbers, "go", seconds=seconds)
        took = max(one["end"] for one in done) - min(one["begin"] for one in done)
        return {"rate": sum(one["rows"] for one in done) / took, "seconds": took, "batch": batches[0]}
