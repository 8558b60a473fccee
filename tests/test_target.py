"""The output: blocks are whole chunks or shards, and what killed workers leave is cleared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, OutputError, SettingsError
from zcinfer.readers import Reader
from zcinfer.target import Target, token_of, write_block

pytestmark = pytest.mark.usefixtures("registry")

X = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    zc.put(nn.Linear(4, 3).eval(), "model")
    zarr.create_array(str(tmp_path / "in.zarr"), shape=X.shape, dtype=X.dtype, chunks=(5, 4))[...] = X
    return tmp_path / "in.zarr"


def run(source: Path, target: Path, **settings: Any) -> Any:
    return zc.run("model", source, target, progress=False, **settings)


def read(path: Path) -> np.ndarray:
    found: np.ndarray = zarr.open_array(str(path), mode="r")[...]  # type: ignore[assignment]
    return found


# Chunks and shards


@pytest.mark.parametrize(
    ("settings", "blocks", "chunks", "shards"),
    [
        ({}, 5, 5, None),
        ({"chunk_rows": 5}, 5, 5, None),
        ({"chunk_rows": 1}, 5, 1, 5),
        ({"chunk_rows": 2}, 4, 2, 6),
        ({"chunk_rows": 8}, 3, 8, None),
        ({"block_rows": 10, "chunk_rows": 5}, 3, 5, 10),
        ({"block_rows": 1000, "chunk_rows": 10}, 1, 10, 30),
        ({"block_rows": 1000, "chunk_rows": 100}, 1, 100, 100),
    ],
)
def test_blocks_are_chunks_or_shards_of_them(
    tmp_path: Path, source: Path, settings: dict[str, int], blocks: int, chunks: int, shards: int | None
) -> None:
    run(source, tmp_path / "plain.zarr", batch_size=1)
    report = run(source, tmp_path / "out.zarr", batch_size=1, **settings)
    found = zarr.open_array(str(tmp_path / "out.zarr"), mode="r")
    assert (report.blocks, found.chunks[0], found.shards and found.shards[0]) == (blocks, chunks, shards)
    files = [path for path in (tmp_path / "out.zarr" / "c").rglob("*") if path.is_file()]
    assert len(files) == blocks
    assert np.array_equal(read(tmp_path / "out.zarr"), read(tmp_path / "plain.zarr"))


def test_other_chunks_are_another_job(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out.zarr", block_rows=6, chunk_rows=2)
    assert run(source, tmp_path / "out.zarr", block_rows=6, chunk_rows=2).computed == 0
    for other in ({"chunk_rows": 3}, {}):
        with pytest.raises(OutputError, match="differs in chunk_rows"):
            run(source, tmp_path / "out.zarr", block_rows=6, **other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_rows": 0}, "chunk_rows is 0: a chunk has one row at least"),
        ({"block_rows": 10, "chunk_rows": 4}, "block_rows is 10 and chunk_rows 4: .*for example block_rows=12"),
        ({"block_rows": 4, "chunk_rows": 10}, "for example block_rows=10"),
    ],
)
def test_impossible_chunks_are_refused(tmp_path: Path, source: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(source, tmp_path / "out.zarr", **settings)


@pytest.fixture(params=[None, 2])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An output of 23 rows in blocks of 6, with nothing written."""
    manifest = {
        "identity": {}, "shape": [23, 3], "dtype": "<f4", "block_rows": 6, "chunk_rows": request.param
    }  # fmt: skip
    place = Target(tmp_path / "out.zarr")
    with place.claim(manifest, True):
        place.prepare(manifest)
    return place.partial


@pytest.mark.parametrize(("rows", "block_rows", "number"), [(6, 3, 1), (4, 6, 0), (3, 6, 1), (6, 6, 3), (7, 6, 0)])
def test_parts_of_chunks_and_shards_are_not_written(prepared: Path, rows: int, block_rows: int, number: int) -> None:
    with pytest.raises(BlockError, match=rf"block {number}, rows .* is not whole (chunks|shards) of 6 rows"):
        write_block(number, np.ones((rows, 3), "f4"), str(prepared), token_of(prepared), block_rows)
    assert not read(prepared).any()
    assert not list((prepared / ".zcinfer" / "done").iterdir())


@pytest.mark.parametrize(("rows", "number"), [(6, 0), (6, 2), (5, 3), (12, 0)])
def test_whole_chunks_and_shards_are_written(prepared: Path, rows: int, number: int) -> None:
    write_block(number, np.ones((rows, 3), "f4"), str(prepared), token_of(prepared), 6)
    assert read(prepared).sum() == rows * 3
    assert [mark.name for mark in (prepared / ".zcinfer" / "done").iterdir()] == [str(number)]


# What is left


def test_halves_of_files_are_cleared_when_a_job_goes_on_and_when_it_ends(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out.zarr", tmp_path / "out.zarr.partial"
    run(source, out)
    out.rename(partial)
    (partial / ".zcinfer" / "done").mkdir()
    for number in range(4):
        (partial / ".zcinfer" / "done" / str(number)).touch()
    left = partial / "c" / "1" / "0.0123456789abcdef.partial"
    left.write_bytes(b"half")
    seen = []
    reads = Reader.__getitem__

    def reading(self: Reader, index: Any) -> Any:
        seen.append(left.exists())
        left.write_bytes(b"half")
        return reads(self, index)

    monkeypatch.setattr(Reader, "__getitem__", reading)
    assert run(source, out).computed == 1
    assert seen == [False]
    assert not list(out.rglob("*.partial"))


class Killed(BaseException):
    """In the place of a signal that nothing survives."""


def killed_after(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Be killed while directories are removed, as soon as one called ``name`` is."""
    remove = shutil.rmtree

    def rmtree(path: Any, *arguments: Any, **settings: Any) -> None:
        for below in Path(path).rglob(name):
            remove(below)
            raise Killed
        if Path(path).name == name:
            raise Killed
        remove(path, *arguments, **settings)

    monkeypatch.setattr(shutil, "rmtree", rmtree)


def test_who_is_killed_while_it_starts_over_can_start_over(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "out.zarr")
    with monkeypatch.context() as patch:
        killed_after(patch, ".zcinfer")
        with pytest.raises(Killed):
            run(source, tmp_path / "out.zarr", resume=False)
    assert run(source, tmp_path / "out.zarr").computed == 5
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out.zarr"]


@pytest.mark.parametrize("name", ["records", "done"])
def test_who_is_killed_at_the_very_end_leaves_marks_that_the_next_one_removes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        killed_after(patch, name)
        with pytest.raises(Killed):
            run(source, out, check_finite=True)
    assert (out / ".zcinfer" / "done").exists()
    (out / ".zcinfer" / "done" / "3").unlink()
    assert run(source, out, check_finite=True).checked == 5
    assert sorted(path.name for path in (out / ".zcinfer").iterdir()) == ["manifest.json", "records.json"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_place_of_the_target_is_not_removed(tmp_path: Path, source: Path, resume: bool) -> None:
    run(source, tmp_path / "elsewhere.zarr")
    (tmp_path / "out.zarr").symlink_to(tmp_path / "elsewhere.zarr")
    if resume:
        assert run(source, tmp_path / "out.zarr").computed == 0
    else:
        with pytest.raises(OutputError, match="symbolic link"):
            run(source, tmp_path / "out.zarr", resume=False)
    assert (tmp_path / "out.zarr").is_symlink()
    assert read(tmp_path / "elsewhere.zarr").any()
