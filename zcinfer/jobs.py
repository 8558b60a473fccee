"""The batch job: a lazy array written to zarr block by block, restartable. The output is the checkpoint.

Not for where the output lies (`target`), nor for what is read (`sources`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import dask.array as da
import numpy as np
from dask import compute

from .arrays import predict
from .catalog import ready
from .errors import InputError, OutputError, SettingsError
from .outcomes import compute_each
from .outputs import Output
from .predictor import Predictor
from .progress import Progress
from .rows import first_rows, rows_of
from .sources import Source, open_source
from .store import ModelRef
from .target import Target, token_of, write_block
from .windowing import Windows

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """What a job did.

    Attributes
    ----------
    target : str
        Path of the zarr array.
    shape : tuple of int
    rows, blocks : int
        In all.
    computed : int
        Blocks computed by this run; the others were there.
    seconds : float
        Of this run.
    """

    target: str
    shape: tuple[int, ...]
    rows: int
    blocks: int
    computed: int
    seconds: float


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
    progress: bool = True,
    **constants: Any,
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
    progress : bool
        Show progress on standard error.
    batch_size, output, method, training, device, **constants
        As for `predict`.

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
        A block failed. What was finished is kept; the same call goes on from there.

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
        **constants,
    )
    return job.run(progress=progress)


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
        **settings: Any,
    ):
        _check_rows(block_rows, chunk_rows)
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
        predictor = Predictor(model, keywords=tuple(opened) if self.named else (), **settings)
        inputs = list(self.arrays.values())
        self.predictor = predictor.bind([rows_of(a) for a in inputs], lambda: [first_rows(a) for a in inputs])
        if self.predictor.several:
            raise SettingsError("a job writes one array, and several outputs were asked for: run one job for each")
        self.identity = {
            "model": str(predictor.ref),
            "digest": predictor.ref.digest,
            "settings": predictor.fingerprint(),
            "inputs": {name: source.stamp() for name, source in opened.items()},
        }
        self.place.check(_manifest(self._lazy(), self.identity, self.chunk_rows), resume)
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
        )

    def _lazy(self) -> da.Array:
        if self.named:
            return predict(self.predictor, **self.arrays)
        return predict(self.predictor, *self.arrays.values())


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
    manifest = _manifest(array, identity, chunk_rows) | {"batch_rows": batch_rows}

    def report(computed: int) -> Report:
        shape = tuple(array.shape)
        return Report(str(place.path), shape, shape[0], len(lengths), computed, perf_counter() - begin)

    with place.claim(manifest, resume) as complete:
        if complete:
            return report(0)
        done = place.prepare(manifest)
        missing = [number for number in range(len(lengths)) if number not in done]
        rows_done = sum(lengths[number] for number in done)
        with Progress(label, array.shape[0], rows_done, quiet=not progress) as bar:
            if missing:
                token = token_of(place.partial)
                written = array.map_blocks(
                    write_block,
                    str(place.partial),
                    token,
                    lengths[0],
                    dtype=np.int64,
                    chunks=((1,) * len(lengths),),
                    drop_axis=list(range(1, array.ndim)),
                    meta=np.empty(0, np.int64),
                    name="write-" + token,
                )
                for number in compute_each(written.blocks[missing], missing):
                    bar.add(lengths[number])
        place.finish()
        return report(len(missing))


def _manifest(array: da.Array, identity: dict[str, Any], chunk_rows: int | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "identity": identity,
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "block_rows": array.chunks[0][0],
        "chunk_rows": chunk_rows,
    }


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
        place.refuse_source(value.x if isinstance(value, Windows) else value, name)
    return {name: _open(value, name) for name, value in sources.items()}


def _open(source: Any, name: str) -> Source | Windows:
    if not isinstance(source, Windows):
        return open_source(source, name)
    if not source.is_lazy:
        raise InputError(
            f"{name} is windows of a NumPy array: give windows of the path or URL of an array, or of a dask array"
        )
    return source
