"""Where a job's output lies: what is there, whose it is, and which blocks are done.

While a job runs its output lies in ``TARGET.partial``, a zarr array of whole chunks with, in ``.zcinfer`` inside it, a
manifest (what is computed: inputs, model digest, settings), a mark per finished block, and what there is to say of
blocks (`records`). The last step renames it to ``TARGET``: what has that name is complete. (Marks and not chunk files
say what is done: zarr leaves out chunks that hold nothing but the fill value.)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from . import telemetry
from .config import local_directory
from .errors import BlockError, OutputError
from .files import write_file
from .records import Outcome, Record, join_records, read_records, write_record
from .rows import only


class Target:
    """The place of a job's output, and what lies there."""

    def __init__(self, path: str | Path):
        self.path = local_directory(str(path), "the target")
        if not self.path.name:
            raise OutputError(f"{self.path} cannot be a target: give the path of a new directory")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._old = self.path.with_name(f".{self.path.name}.old")

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
                self.check(manifest, resume)
                self._tidy()
                if not resume:
                    self._clear()
                yield self.path.exists()
            finally:
                lock.unlink(missing_ok=True)

    def refuse_foreign(self) -> None:
        """Refuse a target that exists and is not ours."""
        for place in (self.path, self.partial):
            if os.path.lexists(place) and _manifest_of(place) is None:
                raise OutputError(f"{place} exists and was not written by zcinfer: choose another target, or remove it")

    def refuse_source(self, directory: Path | None, name: str) -> None:
        """Refuse a source that lies in the place of the target, where starting over would remove it."""
        for place in (self.path.resolve(), self.partial.resolve()):
            if directory is not None and (directory.is_relative_to(place) or place.is_relative_to(directory)):
                raise OutputError(
                    f"{name} lies at {directory}, in the place of the target {place}: choose another target"
                )

    def check(self, manifest: dict[str, Any], resume: bool) -> None:
        """Refuse a target that is not ours or, unless it is to be started over, another job's."""
        self.refuse_foreign()
        for place in (self.path, self.partial):
            found = _manifest_of(place)
            if found is None or not resume:
                continue
            differs = [
                key for key in _differences(found, manifest) if key not in ("model", "batch_rows")
            ]  # names change
            if differs:
                raise OutputError(
                    f"{place} is the output of another job (it differs in {', '.join(differs)}): choose another "
                    "target, or start over with resume=False (--start-over)"
                )

    def recorded(self, key: str) -> Any:
        """What an earlier run has kept under ``key``; None if there was none."""
        for place in (self.path, self.partial):
            found = _manifest_of(place)
            if found is not None:
                return found.get(key)
        return None

    def records(self) -> dict[int, Record]:
        """What there is to say of blocks that are done, by an earlier run or this one."""
        return read_records(self.path if self.path.exists() else self.partial)

    def _clear(self) -> None:
        for place in (self.path, self.partial):
            if place.exists():
                with self._told(), _alone(place):
                    if place.is_symlink():
                        raise OSError("it is a symbolic link, and what it leads to is not removed")
                    # Killed while it is being removed, it would not be known as ours any more
                    os.rename(place, self._old)
                    shutil.rmtree(self._old)

    def _tidy(self) -> None:
        """Remove what runs that were killed had not yet removed."""
        with self._told():
            if self._old.exists():
                shutil.rmtree(self._old)
            if self.path.exists():
                _remove_marks(self.path)

    def prepare(self, manifest: dict[str, Any]) -> set[int]:
        """Create the output unless an earlier run has; numbers of the blocks that are done."""
        if not self.partial.exists():
            new = self.path.with_name(f".{self.path.name}.new")
            with self._told():
                shutil.rmtree(new, ignore_errors=True)
                zarr.create_array(
                    str(new),
                    shape=tuple(manifest["shape"]),
                    **_cut(manifest),
                    dtype=manifest["dtype"],
                    attributes={"zcinfer": manifest["identity"]},
                )
                (new / ".zcinfer" / "done").mkdir(parents=True)
                write_file(_manifest(new), json.dumps(manifest, indent=1).encode())
                os.rename(new, self.partial)
        self._clear_halves()
        return self.done()

    def done(self) -> set[int]:
        """Numbers of the blocks that are done."""
        marks = (mark.name for mark in (self.partial / ".zcinfer" / "done").iterdir())
        return {int(name) for name in marks if name.isdecimal()}

    def finish(self, blocks: int) -> None:
        """Give the complete output, which has so many blocks, its name."""
        if missing := set(range(blocks)) - self.done():
            raise BlockError(
                f"{len(missing):,} blocks are not in {self.partial}, the first of them block {min(missing)}, though "
                "none has failed: somebody has removed their marks. Run again: it does what is missing."
            )
        self._clear_halves()
        with self._told():
            with _alone(self.partial):
                join_records(self.partial)
                os.rename(self.partial, self.path)
            _remove_marks(self.path)

    def _clear_halves(self) -> None:
        """Remove what workers that were killed left of the files they wrote."""
        with self._told(), _alone(self.partial):
            for left in self.partial.rglob("*.partial"):
                left.unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error}. Choose another target, or mend that first."
            ) from error


def write_block(number: int, block: Any, path: str, token: str, block_rows: int, before: int = 0) -> Any:
    """Runs in a worker: write one block, which is whole chunks, then mark it as done; returns its rows, ``(1,)``.

    ``before`` is for who follows the job: the number of blocks that an earlier run has done.
    """
    block = only(block)
    outcome = block if isinstance(block, Outcome) else Outcome(block)
    block = outcome.result
    try:
        with telemetry.writing(f"block {number}"), _sharing(Path(path), token):
            array = _open_target(path, token)
            rows = slice(number * block_rows, number * block_rows + len(block))
            _refuse_parts(array, rows, number)
            write_record(Path(path), number, outcome)
            array[rows] = block
            (Path(path) / ".zcinfer" / "done" / str(number)).touch()
    except OSError as error:
        raise BlockError(
            f"block {number} could not be written to {path}: {error}. Free space or rights, and run again."
        ) from error
    return np.full(1, len(block))


def _cut(manifest: dict[str, Any]) -> dict[str, Any]:
    """Chunks and shards of an output: a block is one chunk, or one shard of several."""
    rows, chunk_rows = max(1, manifest["block_rows"]), manifest["chunk_rows"]
    rest = tuple(max(1, n) for n in manifest["shape"][1:])
    if chunk_rows is None:
        return {"chunks": (rows, *rest)}
    # Of an output with fewer rows than a block, the last chunk reaches beyond its end.
    return {"chunks": (chunk_rows, *rest), "shards": (-(-rows // chunk_rows) * chunk_rows, *rest)}


def _refuse_parts(array: Any, rows: slice, number: int) -> None:
    """Refuse to write anything but whole chunks or shards: another task's rows in them would be lost."""
    whole, end = (array.shards or array.chunks)[0], array.shape[0]
    if rows.start % whole or rows.stop > end or (rows.stop % whole and rows.stop != end):
        kind = "shards" if array.shards else "chunks"
        raise BlockError(
            f"block {number}, rows {rows.start:,}–{rows.stop - 1:,}, is not whole {kind} of {whole:,} rows: nothing of "
            "it was written"
        )


def _remove_marks(place: Path) -> None:
    """Of an output that is complete: its name says that it is, and one file has all records."""
    for name in ("records", "done"):
        shutil.rmtree(place / ".zcinfer" / name, ignore_errors=True)


def token_of(partial: Path) -> str:
    """Names this very output: another one under the same path has another token."""
    return _token(os.stat(_manifest(partial)))


def _token(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}"


@contextmanager
def _sharing(partial: Path, token: str) -> Iterator[None]:
    """Hold an output while a block is written: nobody can finish it or start it over meanwhile.

    A task may outlive its run (Dask cannot stop a thread), and must then not write into what came after it.
    """
    with open(_manifest(partial)) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if _token(os.fstat(file.fileno())) != token or token_of(partial) != token:
            raise OSError("the run that asked for it has ended, and another one writes there")
        yield


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Hold an output when no block is being written."""
    with open(_manifest(place)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=8)
def _open_target(path: str, token: str) -> Any:
    return zarr.open_array(path, mode="r+")


def _manifest(place: Path) -> Path:
    return place / ".zcinfer" / "manifest.json"


def _manifest_of(place: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads(_manifest(place).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest


def _differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            yield from _differences(found.get(key), expected.get(key), key)
    elif found != expected:
        yield path
