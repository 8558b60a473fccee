"""The batch job: a model, what it reads, its settings and the target, checked together, then done. Restartable.

Not for what is read (`sources`), nor for how blocks are written (`writing`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
from dask import compute

from . import telemetry
from .arrays import predict
from .catalog import ready
from .errors import InputError, SettingsError
from .guarded import PLAIN, Guard, Guarded
from .jobreport import Report
from .outputs import Output
from .predictor import Predictor
from .rows import first_rows, rows_of
from .sources import Source, directory_of, open_source
from .store import ModelRef
from .target import Target
from .windowing import Windows
from .writing import manifest_of, refuse_failures, write

log = logging.getLogger("zcinfer")


def run(
    model: str | ModelRef,
    source: Any,
    target: str | Path,
    *,
    resume: bool = True,
    batch_size: int | str = "auto",
    output: Output = None,
    method: str = "forward",
    training: str = "refuse",
    device: str | None = None,
    block_rows: int | None = None,
    chunk_rows: int | None = None,
    on_error: str = "raise",
    max_errors: int = 100,
    check_finite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Apply a model to arrays on disk and write the result to a new zarr array, restartable.

    Runs on the current Dask client's cluster, or in this process where there is none.

    Parameters
    ----------
    model : str or ModelRef
    source : str, path, zarr.Array, dask.array.Array or Windows of one; or a dict of them by input name
        ``(rows, ...)`` each. Text is a zarr array's path or URL (any that fsspec knows), a ``.npy`` file, or a dataset
        of an HDF5 file as ``FILE.h5::/DATASET``.
    target : path
        Zarr array to be written (format 3). Its chunks, or its shards, are blocks.
    resume : bool
        True: do what an interrupted run of the same job left; nothing if it is complete. False: throw away what
        a run of ours has left there, and start over.
    block_rows : int, optional
        Rows of a block. Default: those of the first input's chunks or shards; of about 8 MiB where it is a ``.npy`` or
        HDF5 file; with ``chunk_rows``, rounded up to whole chunks.
    chunk_rows : int, optional
        Rows of a chunk: a block is then a shard, one file of several chunks that can be read one by one. Default: a
        block is a chunk.
    on_error : {"raise", "nan", "quarantine"}
        What to do with rows that fail. "raise": stop. "nan": find them, write NaN for them (outputs must be floating)
        and compute all others; `failures` tells which they are and why. "quarantine": and keep their inputs.
    max_errors : int
        Failures that the whole job may have, all runs of it together, before it stops.
    check_finite : bool
        Count the NaN and infinite values of inputs and outputs, block by block.
    progress : bool
        Show progress on standard error.
    batch_size, output, method, training, device, **settings
        As for `predict`, with all that it takes but lists of outputs and models.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        A source is not there or no array, or the model refuses its rows.
    OutputError
        The target exists and is not ours, or is another job's.
    BlockError
        A block failed, or too many rows did. What was finished is kept; the same call goes on from there.

    Notes
    -----
    The batch that a failing row is in is computed in parts: its other rows are then of smaller batches, and equal but
    for their last bits. All other batches are what they would have been.

    Examples
    --------
    >>> import tempfile, torch, zarr, zcinfer as zc
    >>> folder = tempfile.mkdtemp()
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(4, 2).eval(), "doc-run")
    >>> x = zarr.create_array(f"{folder}/in.zarr", shape=(100, 4), chunks=(25, 4), dtype="f4")
    >>> report = run("doc-run", f"{folder}/in.zarr", f"{folder}/out.zarr", progress=False)
    >>> report.shape, report.blocks, run("doc-run", f"{folder}/in.zarr", f"{folder}/out.zarr").computed
    ((100, 2), 4, 0)
    """
    job = Job(
        model,
        source,
        target,
        resume=resume,
        batch_size=batch_size,
        output=output,
        method=method,
        training=training,
        device=device,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        guard=Guard(on_error, max_errors, check_finite),
        **settings,
    )
    report = job.run(progress=progress)
    for said in report.findings():
        log.warning("%s: %s", report.target, said)
    return report


class Job:
    """A job that was checked, and nothing of it done: paths, inputs, model, settings and target go together.

    Made before anything slow is started, so that what is refused is refused at once. Parameters as for `run`.
    """

    def __init__(
        self,
        model: str | ModelRef,
        source: Any,
        target: str | Path,
        *,
        resume: bool = True,
        block_rows: int | None = None,
        chunk_rows: int | None = None,
        guard: Guard = PLAIN,
        **settings: Any,
    ):
        _check_rows(block_rows, chunk_rows)
        self.guard = guard
        self.place = Target(target)
        self.resume = resume
        self.named = isinstance(source, Mapping)
        sources = _by_name(source)
        opened = _open_all(sources, self.place)
        rows = block_rows or max(1, *next(iter(opened.values())).chunks[0])
        if chunk_rows is not None:
            rows = -(-rows // chunk_rows) * chunk_rows
        self.chunk_rows = chunk_rows if chunk_rows != rows else None
        self.arrays: dict[str, Any] = {name: source.in_blocks(rows) for name, source in opened.items()}
        settings["keywords"] = tuple(opened) if self.named else ()
        predictor = Guarded(guard, [*opened], model, **settings) if guard.watches else Predictor(model, **settings)
        inputs = list(self.arrays.values())
        predictor.job = telemetry.Job("", f"{predictor.ref} into {self.place.path.name}")
        self.predictor = predictor.bind([rows_of(a) for a in inputs], lambda: [first_rows(a) for a in inputs])
        if self.predictor.several:
            raise SettingsError("a job writes one array, and several outputs were asked for: run one job for each")
        binding = self.predictor.binding
        assert binding is not None
        guard.refuse_integers(binding.outputs, str(predictor.ref))
        self.identity = {
            "model": str(predictor.ref),
            "digest": predictor.ref.digest,
            "settings": predictor.fingerprint(),
            "inputs": {name: source.stamp() for name, source in opened.items()},
        }
        self.place.check(manifest_of(self._lazy(), self.identity, self.chunk_rows), resume)
        if resume:
            refuse_failures(self.place.records(), self.place, guard)
        # An earlier run's, if there was one: other batches would change last bits.
        self.batch_rows = self.place.recorded("batch_rows") if resume else None

    def run(self, progress: bool = True) -> Report:
        """Do it, on the current Dask client's cluster and with the current store."""
        self.predictor.ref = ready(self.predictor.ref)
        if self.batch_rows is None:
            (self.batch_rows,) = compute(self.predictor.planned(next(iter(self.arrays.values())).chunks[0]))
        self.predictor.batch_size = self.batch_rows
        return write(
            self._lazy(),
            self.place,
            self.identity,
            resume=self.resume,
            chunk_rows=self.chunk_rows,
            label=str(self.predictor.ref),
            progress=progress,
            batch_rows=self.batch_rows,
            guard=self.guard,
        )

    def _lazy(self) -> da.Array:
        if self.named:
            return predict(self.predictor, **self.arrays)
        return predict(self.predictor, *self.arrays.values())


def _check_rows(block_rows: int | None, chunk_rows: int | None) -> None:
    for name, rows in (("block", block_rows), ("chunk", chunk_rows)):
        if rows is not None and rows < 1:
            raise SettingsError(f"{name}_rows is {rows}: a {name} has one row at least")
    if block_rows is not None and chunk_rows is not None and block_rows % chunk_rows:
        raise SettingsError(
            f"block_rows is {block_rows} and chunk_rows {chunk_rows}: a block is whole chunks, so give a multiple, "
            f"for example block_rows={-(-block_rows // chunk_rows) * chunk_rows}"
        )


def _by_name(source: Any) -> dict[str, Any]:
    return {
        str(name): value for name, value in (source.items() if isinstance(source, Mapping) else [("input", source)])
    }


def _open_all(sources: dict[str, Any], place: Target) -> dict[str, Source | Windows]:
    place.refuse_foreign()
    if not sources:
        raise InputError("no input given: name one array or more, with rows along axis 0")
    for name, value in sources.items():
        place.refuse_source(directory_of(value.x if isinstance(value, Windows) else value), name)
    return {name: _open(value, name) for name, value in sources.items()}


def _open(source: Any, name: str) -> Source | Windows:
    if not isinstance(source, Windows):
        return open_source(source, name)
    if not source.is_lazy:
        raise InputError(
            f"{name} is windows of a NumPy array: give windows of the path or URL of an array, or of a dask array"
        )
    return source
