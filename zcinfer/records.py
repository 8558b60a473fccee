"""What is kept of blocks beside their results: rows that failed, and values that are NaN or infinite.

In ``.zcinfer`` of an output a file of JSON for each block of which there is something to say, and the inputs of rows
that failed as ``.npz``; one file of all when the output is complete. Not for how they are found (`guarded`).
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import local_directory
from .errors import OutputError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Failure:
    """A row that failed, or several that failed only together.

    Attributes
    ----------
    block : int
    first, last : int
        Rows of the whole array; equal where one failed by itself.
    kept : bool
        True: the rows failed only together, while each half of them worked, and the output has them. False: the output
        has NaN.
    error : str
        In a line.
    traceback : str
        Whole.
    model : str
        ``NAME@VERSION``.
    inputs : dict of numpy.ndarray
        The row of each input, with ``on_error="quarantine"``.
    """

    block: int
    first: int
    last: int
    kept: bool
    error: str
    traceback: str = field(repr=False)
    model: str
    inputs: dict[str, Array] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Nonfinite:
    """Values of a block that are NaN or infinite.

    Attributes
    ----------
    block : int
    array : str
        "input", "input NAME" or "output". Rows that failed do not count as output.
    nan, inf : int
    """

    block: int
    array: str
    nan: int
    inf: int


@dataclass(frozen=True)
class Record:
    """What there is to say of a block.

    Attributes
    ----------
    failures : tuple of Failure
    checked : bool
        Whether values were counted.
    nonfinite : tuple of Nonfinite
        Of arrays that have any.
    """

    failures: tuple[Failure, ...]
    checked: bool
    nonfinite: tuple[Nonfinite, ...]


@dataclass(frozen=True)
class Outcome:
    """A block's results, and what is to be kept of it, on the way from who computes it to who writes it.

    Attributes
    ----------
    result : numpy.ndarray
    record : dict
        In JSON types; empty where there is nothing to say.
    inputs : dict of numpy.ndarray
        The rows that failed, ``(failures, ...)`` of each input; empty where they are not to be kept.
    """

    result: Any
    record: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)


def failures(target: str | Path) -> list[Failure]:
    """Rows of a job that failed, with what it has kept of them.

    Parameters
    ----------
    target : path
        Of `run`; the job may be done or not.

    Returns
    -------
    list of Failure
        In the order of rows.

    Raises
    ------
    OutputError
        There is no output of zcinfer.

    Examples
    --------
    >>> import tempfile, torch, zarr, zcinfer as zc
    >>> folder = tempfile.mkdtemp()
    >>> _ = zc.connect("file"), zc.put(torch.nn.Embedding(10, 2).eval(), "doc-failures")
    >>> ids = zarr.create_array(f"{folder}/ids.zarr", shape=(6,), chunks=(3,), dtype="i8")
    >>> ids[:] = [1, 2, 99, 3, 4, 5]
    >>> report = zc.run("doc-failures", ids, f"{folder}/out.zarr", on_error="quarantine", progress=False)
    >>> [(f.first, f.inputs["input"].item(), f.error.rpartition(": ")[2]) for f in failures(f"{folder}/out.zarr")]
    [(2, 99, 'index out of range in self')]
    """
    path = local_directory(str(target), "the target")
    for place in (path, path.with_name(path.name + ".partial")):
        if (place / ".zcinfer" / "manifest.json").exists():
            return [
                failure
                for number, record in sorted(read_records(place).items())
                for failure in _with_inputs(place, number, record.failures)
            ]
    raise OutputError(f"there is no output of zcinfer at {path}, and no unfinished one: give the target of a job")


def write_record(place: Path, number: int, outcome: Outcome) -> None:
    """Keep what there is to say of a block; forget what an earlier attempt at it said."""
    for path, content in (
        (_record(place, number), json.dumps(outcome.record).encode() if outcome.record else None),
        (_quarantine(place, number), _npz(outcome.inputs) if outcome.inputs else None),
    ):
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(exist_ok=True)
            _replace(path, content)


def read_record(place: Path, number: int) -> Record | None:
    """What there is to say of a block."""
    try:
        return _record_of(number, json.loads(_record(place, number).read_bytes()))
    except FileNotFoundError:
        return None


def read_records(place: Path) -> dict[int, Record]:
    """What there is to say of the blocks that are done."""
    if not (place / ".zcinfer").is_dir():
        return {}
    every, done = _read_all(place), None
    # One file of all is made when all blocks are done; who was killed then has perhaps left some of their marks
    if not _joined(place).exists():
        with suppress(FileNotFoundError):
            done = {mark.name for mark in (place / ".zcinfer" / "done").iterdir()}
    return {int(name): _record_of(int(name), found) for name, found in every.items() if done is None or name in done}


def join_records(place: Path) -> None:
    """Make one file of all: for an output whose blocks are all done."""
    every = _read_all(place)
    if every:
        _replace(_joined(place), json.dumps(every).encode())


def in_short(records: Mapping[int, Record]) -> dict[str, Any]:
    """What a report says of it."""
    every = [record for _, record in sorted(records.items())]
    found = [failure for record in every for failure in record.failures]
    return {
        "failed": tuple(f.first for f in found if not f.kept),
        "in_parts": tuple((f.first, f.last) for f in found if f.kept),
        "checked": sum(record.checked for record in every),
        "nonfinite": tuple(counts for record in every for counts in record.nonfinite),
    }


def _record_of(number: int, found: dict[str, Any]) -> Record:
    return Record(
        tuple(Failure(block=number, **failure) for failure in found.get("failures", ())),
        "nonfinite" in found,
        tuple(Nonfinite(number, *counts) for counts in found.get("nonfinite", ())),
    )


def _with_inputs(place: Path, number: int, found: tuple[Failure, ...]) -> list[Failure]:
    path = _quarantine(place, number)
    if not path.exists():
        return [*found]
    with np.load(path) as file:
        names = file["names"].tolist()
        rows = {name: file[str(n)] for n, name in enumerate(names)}
    numbers = iter(range(len(found)))

    def of_row() -> dict[str, Array]:
        n = next(numbers)
        return {name: np.asarray(array[n]) for name, array in rows.items()}

    return [failure if failure.kept else replace(failure, inputs=of_row()) for failure in found]


def _npz(inputs: Mapping[str, Array]) -> bytes:
    # By numbers: a name may be no name of a file.
    arrays = {str(n): _plain(x) for n, x in enumerate(inputs.values())}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, names=np.array([*inputs]), **arrays)
    return file.getvalue()


def _plain(array: Array) -> Array:
    """The array without Python objects, of which ``.npz`` makes pickles: they become text, which most of them are."""
    if not array.dtype.hasobject:
        return array
    return np.array([str(value) for value in array.ravel()], dtype=str).reshape(array.shape)


def _read_all(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        found |= json.loads(_joined(place).read_bytes())
    for path in (place / ".zcinfer" / "records").glob("[0-9]*.json"):
        found[path.stem] = json.loads(path.read_bytes())
    return found


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _joined(place: Path) -> Path:
    return place / ".zcinfer" / "records.json"


def _record(place: Path, number: int) -> Path:
    return place / ".zcinfer" / "records" / f"{number}.json"


def _quarantine(place: Path, number: int) -> Path:
    return place / ".zcinfer" / "quarantine" / f"{number}.npz"
