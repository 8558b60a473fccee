"""What tells one input from another: place, shape, and what its file system says of when it was changed.

Not for reading (`readers`). A stamp is in JSON types, lies in a job's manifest, and is equal as long as the input is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

log = logging.getLogger("zcinfer")

# What file systems call it: S3, GCS, Azure, HTTP, SFTP, memory.
_TELLING = (
    "size", "Size", "ETag", "etag", "md5Hash", "Content-MD5", "generation",
    "LastModified", "Last-Modified", "last_modified", "updated", "modified", "mtime", "created",
)  # fmt: skip
# Web servers do not list. A question for each of a million chunks would take hours.
_CHUNKS_ASKED = 256


def unknown_stamp() -> dict[str, Any]:
    """Of an input of which nothing can be told: no two are the same."""
    return {"content": f"unknown, {uuid.uuid4().hex}"}


def file_stamp(path: Path, inside: str, array: Any) -> dict[str, Any]:
    """Of an array in a file of this machine; ``inside`` is its name in there."""
    status = os.stat(path)
    return _stamp(f"{path}{inside}", array) | {"size": status.st_size, "modified": status.st_mtime_ns}


def directory_stamp(directory: Path, array: zarr.Array[Any]) -> dict[str, Any]:
    """Of a zarr array in a directory of this machine."""
    # zarr replaces files, so that a directory changes with each chunk written into it.
    changed = max(os.stat(place).st_mtime_ns for place, _, _ in os.walk(directory))
    return _stamp(str(directory), array) | {"metadata": _metadata(array), "modified": changed}


def remote_stamp(array: Any) -> dict[str, Any]:
    """Of a zarr array in a `zarr.storage.FsspecStore`."""
    fs, root = array.store.fs, "/".join(filter(None, [array.store.path.rstrip("/"), array.path]))
    getattr(fs, "sync_fs", fs).invalidate_cache()  # of listings
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    silent = protocols & {"http", "https"}
    files = sync(_ask(fs, root, _names(array)) if silent else fs._find(root, detail=True))
    told = {name.removeprefix(root): _telling(info) for name, info in files.items()}
    if not any(set(facts) - {"size", "Size"} for facts in told.values()):
        log.warning("%s does not say when it was changed: a restart will not notice if it was", without_password(root))
    changed = _digest([told, len(files)])
    url = without_password(fs.unstrip_protocol(root))
    return _stamp(url, array) | {"metadata": _metadata(array), "modified": changed}


def without_password(url: str) -> str:
    """The URL as it may be kept and shown.

    Examples
    --------
    >>> without_password("https://me:secret@host/in.zarr")
    'https://host/in.zarr'
    """
    return re.sub(r"//[^/@:]*:[^/@]*@", "//", url)


def _stamp(url: str, array: Any) -> dict[str, Any]:
    return {"url": url, "shape": list(array.shape), "dtype": str(array.dtype)}


def _metadata(array: Any) -> str:
    return _digest(array.metadata.to_dict())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _telling(info: dict[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in _TELLING if info.get(key) is not None}


def _names(array: Any) -> list[str]:
    """Names of the metadata and of some of the chunks, evenly spread."""
    lengths = array.shards or array.chunks
    counts = [-(-length // chunk) for length, chunk in zip(array.shape, lengths, strict=True)]
    total = int(np.prod(counts, dtype=np.int64))
    numbers = sorted({total * n // _CHUNKS_ASKED for n in range(_CHUNKS_ASKED)} if total else ())
    places = (tuple(map(int, np.unravel_index(number, counts))) for number in numbers)
    return ["zarr.json", ".zarray", ".zattrs", *(array.metadata.encode_chunk_key(place) for place in places)]


async def _ask(fs: Any, root: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a web server says of files; nothing of those that are not there."""

    async def ask(name: str) -> dict[str, Any]:
        try:
            info: dict[str, Any] = await fs._info(f"{root}/{name}")
        except FileNotFoundError:
            return {}
        return info

    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(names), 32):
        some = names[start : start + 32]
        found |= zip(some, await asyncio.gather(*map(ask, some)), strict=True)
    return {name: info for name, info in found.items() if info}
