"""The batch job: a lazy array written to zarr block by block, restartable. The output is the checkpoint.

While a job runs its output lies in ``TARGET.partial``, a zarr array of whole chunks with, in ``.zcinfer`` inside it, a
manifest (what is computed: inputs, model digest, settings) and a mark per finished block. The last step renames it
to ``TARGET``: what has that name is complete. (Marks and not chunk files say what is done: zarr leaves out chunks
that hold nothing but the fill value.)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from socket import gethostname
from time import perf_counter
from typing import Any

import dask.array as da
import numpy as np
import zarr
from zarr.storage import LocalStore

from .archive import write_file
from .arrays import predict
from .config import local_directory
from .errors import BlockError, InputError, OutputError, SettingsError, ZcinferError
from .predictor import Output, Predictor
from .progress import Progress
from .store import ModelRef

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
    progress: bool = True,
    **constants: Any,
) -> Report:
    """Apply a model to zarr arrays on disk and write the result to a new zarr array, restartable.

    Runs on the current Dask client's cluster, or in this process where there is none.

    Parameters
    ----------
    model : str or ModelRef
    source : str, path, zarr.Array or dask.array.Array; or a dict of them by input name
        ``(rows, ...)`` each.
    target : path
        Zarr array to be written (format 3). Its chunks are whole blocks.
    resume : bool
        True: do what an interrupted run of the same job left; nothing if it is complete. False: throw away what
        a run of ours has left there, and start over.
    block_rows : int, optional
        Rows of a block; default: those of the first input's chunks.
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
        A source is no zarr array, or the model refuses its rows.
    OutputError
        The target exists and is not ours, or is another job's.
    BlockError
        A block failed. What was finished is kept; the same call goes on from there.

    Examples
    --------
    >>> import tempfile, torch, zcinfer as zc
    >>> folder = tempfile.mkdtemp()
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(4, 2).eval(), "doc-run")
    >>> x = zarr.create_array(f"{folder}/in.zarr", shape=(100, 4), chunks=(25, 4), dtype="f4")
    >>> report = run("doc-run", f"{folder}/in.zarr", f"{folder}/out.zarr", progress=False)
    >>> report.shape, report.blocks, run("doc-run", f"{folder}/in.zarr", f"{folder}/out.zarr").computed
    ((100, 2), 4, 0)
    """
    if block_rows is not None and block_rows < 1:
        raise SettingsError(f"block_rows is {block_rows}: a block has one row at least")
    place = _Target(target)
    named = isinstance(source, Mapping)
    sources = _by_name(source)
    opened = _open_all(sources, place)
    rows = block_rows or max(next(iter(opened.values())).chunks[0])
    arrays = {name: array.rechunk({0: rows}) for name, array in opened.items()}
    predictor = Predictor(
        model,
        batch_size=batch_size,
        output=output,
        method=method,
        training=training,
        device=device,
        keywords=tuple(arrays) if named else (),
        **constants,
    )
    result = predict(predictor, **arrays) if named else predict(predictor, arrays["input"])
    identity = {
        "model": str(predictor.ref),
        "digest": predictor.ref.digest,
        "settings": predictor.fingerprint(),
        "inputs": {name: _stamp(value, opened[name]) for name, value in sources.items()},
    }
    return write(result, place, identity, resume=resume, label=str(predictor.ref), progress=progress)


def check_paths(source: Any, target: str | Path) -> None:
    """Refuse the paths that `run` would refuse, before anything is started."""
    _open_all(_by_name(source), _Target(target))


def check_target(target: str | Path) -> None:
    """Refuse a target that exists and was not written by zcinfer, before anything is started."""
    _Target(target).refuse_foreign()


def write(
    array: da.Array,
    target: str | Path | _Target,
    identity: dict[str, Any],
    *,
    resume: bool = True,
    label: str = "writing",
    progress: bool = True,
) -> Report:
    """Compute a lazy array block by block into a zarr array that appears, complete, under the name ``target``.

    Parameters
    ----------
    array : dask.array.Array
        ``(rows, ...)``; row chunks of one length (the last may be short), other axes in one chunk.
    target : path
    identity : dict
        What is computed, in JSON types; a restart goes on only with the same.
    resume, progress
        As for `run`.
    label : str
        What to call the job.

    Returns
    -------
    Report
    """
    begin = perf_counter()
    place = target if isinstance(target, _Target) else _Target(target)
    lengths = array.chunks[0]
    if any(length != lengths[0] for length in lengths[:-1]) or not lengths[-1] <= lengths[0]:
        raise OutputError(
            f"the row chunks {lengths[:4]}... have different or unknown lengths: rechunk the input, x.rechunk({{0: n}})"
        )
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "block_rows": lengths[0],
    }

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
                token = _token(place.partial)
                written = array.map_blocks(
                    _write_block,
                    str(place.partial),
                    token,
                    lengths[0],
                    dtype=np.int64,
                    chunks=((1,) * len(lengths),),
                    drop_axis=list(range(1, array.ndim)),
                    meta=np.empty(0, np.int64),
                    name="write-" + token,
                )
                for number in _compute(written.blocks[missing], missing):
                    bar.add(lengths[number])
        place.finish()
        return report(len(missing))


class _Target:
    """The place of a job's output, and what lies there."""

    def __init__(self, path: str | Path):
        self.path = local_directory(str(path), "the target")
        if not self.path.name:
            raise OutputError(f"{self.path} cannot be a target: give the path of a new directory")
        self.partial = self.path.with_name(self.path.name + ".partial")

    @contextmanager
    def claim(self, manifest: dict[str, Any], resume: bool) -> Iterator[bool]:
        """Hold the target for this run; yields whether it is complete already."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        with ExitStack() as stack:
            with self._told():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(lock, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run before may have removed the file between our opening and our locking it.
                held = lock.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except OSError:
                held = False
            if not held:
                raise OutputError(f"another run is writing to {self.path}: wait for it, or choose another target")
            try:
                yield self._check(manifest, resume)
            finally:
                lock.unlink(missing_ok=True)

    def refuse_foreign(self) -> None:
        """Refuse a target that exists and is not ours."""
        for place in (self.path, self.partial):
            if os.path.lexists(place) and _manifest_of(place) is None:
                raise OutputError(f"{place} exists and was not written by zcinfer: choose another target, or remove it")

    def refuse_source(self, source: Any, name: str) -> None:
        """Refuse a source in the place of the target, where starting over would remove it."""
        directory = _directory_of(source)
        for place in (self.path.resolve(), self.partial.resolve()):
            if directory is not None and (directory.is_relative_to(place) or place.is_relative_to(directory)):
                raise OutputError(
                    f"{name} lies at {directory}, in the place of the target {place}: choose another target"
                )

    def _check(self, manifest: dict[str, Any], resume: bool) -> bool:
        self.refuse_foreign()
        for place in (self.path, self.partial):
            found = _manifest_of(place)
            if found is None:
                continue
            if not resume:
                with self._told():
                    shutil.rmtree(place)
            elif differs := [key for key in _differences(found, manifest) if key != "model"]:  # names change
                raise OutputError(
                    f"{place} is the output of another job (it differs in {', '.join(differs)}): choose another "
                    "target, or start over with resume=False (--start-over)"
                )
        return self.path.exists()

    def prepare(self, manifest: dict[str, Any]) -> set[int]:
        """Create the output unless an earlier run has; numbers of the blocks that are done."""
        if not self.partial.exists():
            new = self.path.with_name(f".{self.path.name}.new")
            with self._told():
                shutil.rmtree(new, ignore_errors=True)
                zarr.create_array(
                    str(new),
                    shape=tuple(manifest["shape"]),
                    chunks=(max(1, manifest["block_rows"]), *(max(1, n) for n in manifest["shape"][1:])),
                    dtype=manifest["dtype"],
                    attributes={"zcinfer": manifest["identity"]},
                )
                (new / ".zcinfer" / "done").mkdir(parents=True)
                write_file(new / ".zcinfer" / "manifest.json", json.dumps(manifest, indent=1).encode())
                os.rename(new, self.partial)
        return {int(mark.name) for mark in (self.partial / ".zcinfer" / "done").iterdir()}

    def finish(self) -> None:
        """Give the complete output its name."""
        with self._told():
            for left in self.partial.rglob("*.partial"):
                left.unlink(missing_ok=True)  # of a worker that was killed while it wrote
            os.rename(self.partial, self.path)
            shutil.rmtree(self.path / ".zcinfer" / "done")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error}. Choose another target, or mend that first."
            ) from error


def _write_block(block: Any, path: str, token: str, block_rows: int, block_id: tuple[int, ...]) -> Any:
    number = block_id[0]
    try:
        if _token(Path(path)) != token:
            # This task was running when its run stopped; what lies there now belongs to one that started over.
            raise BlockError(f"block {number} was not written: {path} is another run's by now")
        _open_target(path, token)[number * block_rows : number * block_rows + len(block)] = block
        (Path(path) / ".zcinfer" / "done" / str(number)).touch()
    except OSError as error:
        raise BlockError(
            f"block {number} could not be written to {path}: {error}. Free space or rights, and run again."
        ) from error
    return np.full(1, len(block))


def _token(partial: Path) -> str:
    """Names this very output: another one under the same path has another token."""
    status = os.stat(partial / ".zcinfer" / "manifest.json")
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}"


@lru_cache(maxsize=8)
def _open_target(path: str, token: str) -> Any:
    return zarr.open_array(path, mode="r+")


def _compute(written: da.Array, numbers: Sequence[int]) -> Iterator[int]:
    """Compute an array of one element a block, yielding each block's number when it is done."""
    client = _client()
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
        # After an error or Ctrl-C the others need not be computed.
        client.cancel(list(waiting))


def _error_of(future: Any) -> BaseException:
    try:
        error: BaseException = future.exception()
    except CancelledError as cancelled:
        error = cancelled
    return error


def _outcomes_here(written: da.Array) -> _Outcomes:
    # One block after the other; torch uses all cores for each.
    for place in range(written.numblocks[0]):
        try:
            written.blocks[place].compute(scheduler="sync")
        except Exception as error:
            yield place, error
        else:
            yield place, None


def _client() -> Any:
    from distributed import default_client

    try:
        return default_client()
    except ValueError:
        return None


def _by_name(source: Any) -> dict[str, Any]:
    return {
        str(name): value for name, value in (source.items() if isinstance(source, Mapping) else [("input", source)])
    }


def _open_all(sources: dict[str, Any], place: _Target) -> dict[str, da.Array]:
    place.refuse_foreign()
    if not sources:
        raise InputError("no input given: name one array or more, with rows along axis 0")
    for name, value in sources.items():
        place.refuse_source(value, name)
    return {name: _open(value, name) for name, value in sources.items()}


class _Source:
    """A zarr array that is opened where it is read. One that is not there is an error, and not all fill values."""

    def __init__(self, url: str, array: Any):
        self.url = url
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype

    def __getitem__(self, index: Any) -> Any:
        try:
            array: Any = zarr.open_array(self.url, mode="r")
        except Exception as error:
            raise InputError(
                f"there is no zarr array at {self.url} on {gethostname()} ({_first_line(error)}): all workers must "
                "see it, until the job is done"
            ) from error
        return array[index]


def _open(source: Any, name: str) -> da.Array:
    if isinstance(source, da.Array):
        if source.ndim and source.shape[0] != source.shape[0]:
            raise InputError(f"{name} is a dask array of an unknown number of rows: call compute_chunk_sizes() on it")
        return source
    directory = _directory_of(source)
    if isinstance(source, zarr.Array):
        found: Any = source
    elif isinstance(source, str | Path):
        try:
            found = zarr.open(str(source), mode="r")
        except Exception as error:
            raise InputError(f"{name}: there is no zarr array at {source} ({_first_line(error)})") from error
    else:
        raise InputError(f"{name} is a {type(source).__name__}: give the path or URL of a zarr array, or a dask array")
    if isinstance(found, zarr.Group):
        inside = ", ".join(f"{source}/{key}" for key, _ in list(found.arrays())[:5]) or "it has no arrays"
        raise InputError(f"{name}: {source} is a zarr group; give one of its arrays: {inside}")
    if found.ndim == 0:
        raise InputError(f"{name}: {source} is a single number: the rows are along axis 0")
    if directory is None and isinstance(source, zarr.Array):
        return da.from_zarr(found)  # of a store that has no path
    return da.from_array(
        _Source(str(directory or source), found),
        chunks=(found.chunks[0], *found.shape[1:]),
        name=False,
        meta=np.empty((0,) * found.ndim, found.dtype),
    )


def _stamp(source: Any, array: Any) -> dict[str, Any]:
    """What tells this input from another, in JSON types."""
    if isinstance(source, da.Array):
        return {"dask": source.name}
    stamp: dict[str, Any] = {"url": str(source), "shape": list(array.shape), "dtype": str(array.dtype)}
    directory = _directory_of(source)
    if directory is not None:
        # zarr replaces files, so that a directory changes with each chunk written into it.
        changed = max(os.stat(place).st_mtime_ns for place, _, _ in os.walk(directory))
        stamp |= {"url": str(directory), "modified": changed}
    return stamp


def _directory_of(source: Any) -> Path | None:
    """Directory of this machine that a source lies in."""
    if isinstance(source, zarr.Array):
        return Path(source.store.root, source.path).resolve() if isinstance(source.store, LocalStore) else None
    try:
        return local_directory(str(source), "").resolve() if isinstance(source, str | Path) else None
    except SettingsError:
        return None  # a URL of another kind


def _manifest_of(place: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((place / ".zcinfer" / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return None
    return manifest


def _differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            yield from _differences(found.get(key), expected.get(key), key)
    elif found != expected:
        yield path


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
