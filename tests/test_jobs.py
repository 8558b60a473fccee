"""The batch job: its output equals plain torch, and what stops it at any moment costs no finished block."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from numbered import BLOCK, ROWS, read, rows, save
from processes import wait_until
from torch import nn

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, ModelNotFound, OutputError, SettingsError
from zcinfer.jobreport import Report
from zcinfer.jobs import Job
from zcinfer.target import write_block
from zcinfer.writing import write

pytestmark = pytest.mark.usefixtures("registry")

BLOCKS = (5, 5, 5, 5, 3)


class Scripted(nn.Module):
    """A linear layer that logs the first row of each batch, and stops or waits where files in its folder say so.

    ``stop``, ``interrupt`` and ``hold`` hold a row's number, which is its first column. Who waits writes its process id
    to ``held``; with ``stop-once-held`` every batch after that fails.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.folder = str(folder)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = str(int(x[0, 0]))
        folder = Path(self.folder)
        with open(folder / "log", "a") as log:
            log.write(f"{row}\n")
        if (folder / "stop").exists() and (folder / "stop").read_text() == row:
            raise ValueError("stopped")
        if (folder / "stop-once-held").exists() and (folder / "held").exists():
            raise ValueError("stopped")
        if (folder / "interrupt").exists() and (folder / "interrupt").read_text() == row:
            raise KeyboardInterrupt
        if (folder / "hold").exists() and (folder / "hold").read_text() == row:
            (folder / "held").write_text(str(os.getpid()))
            deadline = time.monotonic() + 60
            while (folder / "hold").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return self.layer(x)


class Script:
    """The folder of a `Scripted` model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def say(self, what: str, row: int) -> None:
        (self.folder / what).write_text(str(row))

    def unsay(self, what: str) -> None:
        (self.folder / what).unlink()

    def wait_until_held(self) -> int:
        """Process id of the one that waits."""
        held = self.folder / "held"
        wait_until(lambda: held.exists() and held.read_text(), 30)
        return int(held.read_text())

    def computed(self) -> Counter[int]:
        """How often each block was computed since the last call, by its first row; the first one is probed as well."""
        log = self.folder / "log"
        rows = Counter(map(int, log.read_text().split())) if log.exists() else Counter()
        log.unlink(missing_ok=True)
        del rows[0]
        return rows


@pytest.fixture
def script(tmp_path: Path) -> Script:
    script = Script(tmp_path / "script")
    zc.put(Scripted(script.folder).eval(), "scripted")
    return script


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.zarr", rows())


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval()


def by_hand(model: nn.Module, *inputs: np.ndarray, blocks: tuple[int, ...] = BLOCKS) -> np.ndarray:
    """Plain torch, block by block."""
    ends = np.cumsum(blocks).tolist()
    with torch.no_grad():
        outputs = [
            model(*(torch.from_numpy(x[end - length : end].copy()) for x in inputs))
            for end, length in zip(ends, blocks, strict=True)
        ]
    return torch.cat(outputs).numpy()


def run(*arguments: Any, **settings: Any) -> Report:
    return zc.run(*arguments, progress=False, **settings)


# What it computes


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2},
        {"zarr_format": 3},
        {"zarr_format": 3, "chunks": (BLOCK, 3)},
        {"zarr_format": 3, "chunks": (BLOCK, 2), "shards": (BLOCK, 4)},
    ],
    ids=["v2", "v3", "columns in chunks", "shards"],
)
def test_output_equals_plain_torch(tmp_path: Path, options: dict[str, Any]) -> None:
    zc.put(linear(), "model")
    report = run("model", save(tmp_path / "in.zarr", rows(), **options), tmp_path / "out.zarr")
    assert (report.shape, report.rows, report.blocks, report.computed) == ((ROWS, 3), ROWS, 5, 5)
    assert report.target == str(tmp_path / "out.zarr")
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))


def test_big_endian_source(tmp_path: Path) -> None:
    zc.put(linear(), "model")
    source = save(tmp_path / "in.zarr", rows().astype(">f4"), zarr_format=2)
    run("model", source, tmp_path / "out.zarr")
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))


@pytest.mark.parametrize("kind", ["text", "path", "URL", "zarr", "dask"])
def test_kinds_of_source(tmp_path: Path, source: Path, kind: str) -> None:
    zc.put(linear(), "model")
    given = {
        "text": str(source),
        "path": source,
        "URL": f"file://{source}",
        "zarr": zarr.open_array(str(source), mode="r"),
        "dask": da.from_zarr(str(source)),
    }[kind]
    run("model", given, tmp_path / "out.zarr")
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))


class Pair(nn.Module):
    """Takes ``(rows, tokens)`` ids and ``(rows,)`` weights; gives ``(rows,)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 3)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.embedding(ids) * weights[:, None, None]).sum((1, 2))


def test_named_inputs_of_different_chunks_and_a_one_axis_output(tmp_path: Path) -> None:
    zc.put(Pair().eval(), "model")
    ids, weights = np.arange(ROWS * 6).reshape(ROWS, 6) % 9, rows()[:, 1].copy()
    sources = {
        "ids": str(save(tmp_path / "ids.zarr", ids)),
        "weights": save(tmp_path / "weights.zarr", weights, chunks=(10,)),
    }
    run("model", sources, tmp_path / "out.zarr")
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(Pair(), ids, weights))


@pytest.mark.parametrize(("block_rows", "blocks"), [(7, (7, 7, 7, 2)), (1000, (23,)), (1, (1,) * 23)])
def test_block_rows(tmp_path: Path, source: Path, block_rows: int, blocks: tuple[int, ...]) -> None:
    zc.put(linear(), "model")
    report = run("model", source, tmp_path / "out.zarr", block_rows=block_rows)
    assert report.blocks == len(blocks)
    assert zarr.open_array(str(tmp_path / "out.zarr"), mode="r").chunks == (min(block_rows, ROWS), 3)
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows(), blocks=blocks))


def test_no_rows(tmp_path: Path) -> None:
    zc.put(linear(), "model")
    run("model", save(tmp_path / "in.zarr", rows(0)), tmp_path / "out.zarr")
    assert read(tmp_path / "out.zarr").shape == (0, 3)


def test_settings_reach_the_model(tmp_path: Path, source: Path) -> None:
    zc.put(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "model")
    run(
        "model",
        source,
        tmp_path / "out.zarr",
        batch_size=2,
        training="eval",
        output=lambda out, inputs: -out,
        device="cpu",
    )
    expected = by_hand(zc.load("model").eval(), rows(), blocks=(2, 2, 1) * 4 + (2, 1))
    assert np.array_equal(read(tmp_path / "out.zarr"), -expected)


def test_target_says_what_it_is(tmp_path: Path, source: Path) -> None:
    ref = zc.put(linear(), "model")
    run("model", source, tmp_path / "out.zarr")
    told = zarr.open_array(str(tmp_path / "out.zarr"), mode="r").attrs["zcinfer"]
    assert isinstance(told, dict)
    assert (told["model"], told["digest"]) == ("model@1", ref.digest)
    assert told["inputs"]["input"]["url"] == str(source)


def test_parent_directories_are_made_and_nothing_else_is_left(tmp_path: Path, source: Path) -> None:
    zc.put(linear(), "model")
    run("model", source, tmp_path / "a" / "b" / "out.zarr")
    assert os.listdir(tmp_path / "a" / "b") == ["out.zarr"]


def test_progress_is_one_line_where_there_is_no_terminal(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zc.put(linear(), "model")
    zc.run("model", source, tmp_path / "out.zarr")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("model@1: done, 23 of 23 rows in ")
    assert err.count("\n") == 1


# Going on


def test_complete_output_is_left_as_it_is(tmp_path: Path, source: Path, script: Script) -> None:
    run("scripted", source, tmp_path / "out.zarr")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")}
    script.computed()
    assert run("scripted", source, tmp_path / "out.zarr").computed == 0
    assert not script.computed()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")} == before


def test_failed_job_goes_on_where_it_was(tmp_path: Path, source: Path, script: Script) -> None:
    script.say("stop", 15)
    with pytest.raises(BlockError, match=r"block 3, rows 15–19, of scripted@1: .*ValueError: stopped"):
        run("scripted", source, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    assert script.computed() == {5: 1, 10: 1, 15: 1}
    script.unsay("stop")
    assert run("scripted", source, tmp_path / "out.zarr").computed == 2
    assert script.computed() == {15: 1, 20: 1}
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))


def test_interrupted_job_goes_on_where_it_was(tmp_path: Path, source: Path, script: Script) -> None:
    script.say("interrupt", 15)
    with pytest.raises(KeyboardInterrupt):
        run("scripted", source, tmp_path / "out.zarr")
    script.unsay("interrupt")
    assert run("scripted", source, tmp_path / "out.zarr").computed == 2
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))


def test_error_after_a_restart_names_the_block_of_the_whole(tmp_path: Path, source: Path, script: Script) -> None:
    for row in (10, 20):
        script.say("stop", row)
        with pytest.raises(BlockError, match=f"block {row // 5}, rows {row}–"):
            run("scripted", source, tmp_path / "out.zarr")


RUN = """
import sys
import zcinfer as zc
zc.connect(sys.argv[1])
zc.run(sys.argv[4], sys.argv[2], sys.argv[3], resume=sys.argv[4] == "scripted", progress=False)
"""


def start_program(text: str, *arguments: Any) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(zc.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def test_killed_program_leaves_what_it_finished(tmp_path: Path, source: Path, script: Script, registry: Path) -> None:
    out = tmp_path / "out.zarr"
    script.say("hold", 15)
    with start_program(RUN, f"file:{registry}", source, out, "scripted") as program:
        assert script.wait_until_held() == program.pid
        program.kill()
    assert not out.exists()
    assert (tmp_path / "out.zarr.partial").exists()
    assert script.computed() == {5: 1, 10: 1, 15: 1}
    script.unsay("hold")
    assert run("scripted", source, out).computed == 2
    assert script.computed() == {15: 1, 20: 1}
    assert np.array_equal(read(out), by_hand(linear(), rows()))


def test_torn_chunks_of_a_killed_worker_are_removed(tmp_path: Path, source: Path, script: Script) -> None:
    script.say("stop", 15)
    with pytest.raises(BlockError):
        run("scripted", source, tmp_path / "out.zarr")
    torn = tmp_path / "out.zarr.partial" / "c" / "3" / "0.8a7f2e.partial"
    torn.parent.mkdir()
    torn.write_bytes(b"half a chunk")
    script.unsay("stop")
    run("scripted", source, tmp_path / "out.zarr")
    assert not list((tmp_path / "out.zarr").rglob("*.partial"))
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))


class Zeros(Scripted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(super().forward(x))


def test_blocks_of_nothing_but_the_fill_value_count_as_done(tmp_path: Path, source: Path, script: Script) -> None:
    zc.put(Zeros(script.folder).eval(), "zeros")
    script.say("stop", 15)
    with pytest.raises(BlockError):
        run("zeros", source, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr.partial" / "c").exists()
    script.computed()
    script.unsay("stop")
    assert run("zeros", source, tmp_path / "out.zarr").computed == 2
    assert script.computed() == {15: 1, 20: 1}
    assert not read(tmp_path / "out.zarr").any()


def test_start_over_throws_the_old_output_away(tmp_path: Path, source: Path, script: Script) -> None:
    out = tmp_path / "out.zarr"
    run("scripted", source, out)
    assert run("scripted", source, out, resume=False).computed == 5
    script.say("stop", 15)
    with pytest.raises(BlockError):
        run("scripted", source, out, resume=False)
    assert not out.exists()
    script.unsay("stop")
    assert run("scripted", source, out, resume=False, batch_size=2).computed == 5
    assert np.array_equal(read(out), by_hand(linear(), rows(), blocks=(2, 2, 1) * 4 + (2, 1)))


def change_model(source: Path) -> dict[str, Any]:
    zc.put(nn.Linear(4, 3).eval(), "model")
    return {}


def change_chunk(source: Path) -> dict[str, Any]:
    zarr.open_array(str(source), mode="r+")[7] = 0
    return {}


def change_rows(source: Path) -> dict[str, Any]:
    zarr.create_array(str(source), shape=(10, 4), dtype="f4", chunks=(BLOCK, 4), overwrite=True)
    return {}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (change_model, "digest"),
        (change_chunk, "modified"),
        (change_rows, "shape"),
        (lambda _: {"batch_size": 2}, "settings"),
        (lambda _: {"output": lambda out, _: out * 2}, "settings"),
        (lambda _: {"block_rows": 7}, "block_rows"),
    ],
    ids=["model", "chunk of the input", "input", "batch", "output", "block"],
)
@pytest.mark.parametrize("complete", [True, False])
def test_output_of_another_job_is_refused_naming_what_differs(
    tmp_path: Path, source: Path, change: Callable[[Path], dict[str, Any]], differs: str, complete: bool
) -> None:
    zc.put(linear(), "model")
    out = tmp_path / "out.zarr"
    run("model", source, out)
    if not complete:
        (out / ".zcinfer" / "done").mkdir()
        out.rename(tmp_path / "out.zarr.partial")
    settings = change(source)
    with pytest.raises(
        OutputError, match=rf"output of another job \(it differs in [^)]*{differs}.*resume=False \(--start-over"
    ):
        run("model", source, out, **settings)
    assert np.array_equal(read(out if complete else tmp_path / "out.zarr.partial"), by_hand(linear(), rows()))
    assert run("model", source, out, resume=False, **settings).computed > 0


def test_same_content_under_another_name_goes_on(tmp_path: Path, source: Path) -> None:
    zc.put(linear(), "model")
    zc.put(linear(), "renamed")
    run("model", source, tmp_path / "out.zarr")
    assert run("renamed", source, tmp_path / "out.zarr").computed == 0


def test_named_input_is_another_job_than_the_first_argument(tmp_path: Path, source: Path) -> None:
    zc.put(linear(), "model")
    run("model", source, tmp_path / "out.zarr")
    with pytest.raises(OutputError, match="differs in settings"):
        run("model", {"input": source}, tmp_path / "out.zarr")


def test_same_source_named_otherwise_goes_on(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zc.put(linear(), "model")
    monkeypatch.chdir(tmp_path)
    run("model", "in.zarr", "out.zarr")
    for same in (str(source), source, f"file://{source}", zarr.open_array("in.zarr", mode="r")):
        assert run("model", same, tmp_path / "out.zarr").computed == 0


# What is refused


def foreign_file(path: Path) -> Path:
    path.write_text("precious")
    return path


def foreign_directory(path: Path) -> Path:
    path.mkdir()
    return foreign_file(path / "notes")


def foreign_zarr(path: Path) -> Path:
    return save(path, rows()) / "zarr.json"


def foreign_link(path: Path) -> Path:
    path.symlink_to(path.parent / "nowhere")
    return path


@pytest.mark.parametrize("name", ["out.zarr", "out.zarr.partial"])
@pytest.mark.parametrize("foreign", [foreign_file, foreign_directory, foreign_zarr])
@pytest.mark.parametrize("resume", [True, False])
def test_foreign_target_is_refused_untouched(
    tmp_path: Path, source: Path, name: str, foreign: Callable[[Path], Path], resume: bool
) -> None:
    zc.put(linear(), "model")
    kept = foreign(tmp_path / name)
    before = kept.read_bytes()
    with pytest.raises(OutputError, match=rf"{name} exists and was not written by zcinfer"):
        run("model", source, tmp_path / "out.zarr", resume=resume)
    assert kept.read_bytes() == before


def test_link_to_nowhere_is_refused(tmp_path: Path, source: Path) -> None:
    zc.put(linear(), "model")
    foreign_link(tmp_path / "out.zarr")
    with pytest.raises(OutputError, match=r"out\.zarr exists and was not written by zcinfer"):
        run("model", source, tmp_path / "out.zarr")


@pytest.mark.parametrize("place", ["out.zarr", "out.zarr/c/0", ".", "other/../out.zarr"])
@pytest.mark.parametrize("resume", [True, False])
def test_source_in_the_place_of_the_target_is_refused_untouched(
    tmp_path: Path, source: Path, place: str, resume: bool
) -> None:
    zc.put(linear(), "model")
    zc.put(nn.Linear(3, 3).eval(), "next")
    first = tmp_path / "out.zarr"
    run("model", source, first)
    with pytest.raises(OutputError, match=r"in the place of the target|not written by zcinfer"):
        run("next", first, tmp_path / place, resume=resume)
    assert np.array_equal(read(first), by_hand(linear(), rows()))


def no_group(path: Path) -> Path:
    zarr.open_group(str(path), mode="w").create_array("inside", shape=(4, 4), dtype="f4")
    return path


def no_axis(path: Path) -> Path:
    zarr.create_array(str(path), shape=(), dtype="f4")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, r"there is no zarr array at .*in2\.zarr"),
        (lambda path: foreign_file(path), "there is no zarr array at"),
        (lambda path: foreign_directory(path).parent, "there is no zarr array at"),
        (no_group, r"is a zarr group; give one of its arrays: .*in2\.zarr/inside"),
        (no_axis, "is a single number"),
        (lambda path: save(path, rows().astype("M8[s]"), zarr_format=2), "is not numeric"),
        (lambda path: save(path, rows()[:, :3]), r"found input 0 \(rows, 3\) float32; Linear expects in_features=4"),
        (lambda path: rows(), "input is a ndarray: give a path or URL"),
        (lambda path: da.ones((9, 4), chunks=3)[da.ones(9, chunks=3) > 0], r"compute_chunk_sizes\(\)"),
        (lambda path: {}, "no input given"),
    ],
    ids=["missing", "file", "directory", "group", "0-d", "dates", "shape", "numpy", "unknown rows", "none"],
)
def test_impossible_source_is_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    zc.put(linear(), "model")
    with pytest.raises(InputError, match=message):
        run("model", make(tmp_path / "in2.zarr"), tmp_path / "out.zarr")
    assert not list(tmp_path.glob("*out.zarr*"))


@pytest.mark.parametrize("target", ["notes/out.zarr", "/proc/zcinfer/out.zarr", "/"])
def test_impossible_target_is_refused(tmp_path: Path, source: Path, target: str) -> None:
    zc.put(linear(), "model")
    foreign_file(tmp_path / "notes")
    with pytest.raises(OutputError, match=r"cannot be written|cannot be a target"):
        run("model", source, tmp_path / target)


@pytest.mark.parametrize("block_rows", [0, -3])
def test_impossible_block_is_refused(tmp_path: Path, source: Path, block_rows: int) -> None:
    zc.put(linear(), "model")
    with pytest.raises(SettingsError, match=f"block_rows is {block_rows}"):
        run("model", source, tmp_path / "out.zarr", block_rows=block_rows)


def test_unknown_model_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ModelNotFound):
        run("model", source, tmp_path / "out.zarr")
    assert not list(tmp_path.glob("*out.zarr*"))


def test_job_is_checked_when_it_is_made_and_done_when_it_is_run(tmp_path: Path, source: Path) -> None:
    zc.put(linear(), "model")
    job = Job("model", source, tmp_path / "out.zarr")
    assert not list(tmp_path.glob("*out.zarr*"))
    assert job.run(progress=False).computed == 5
    with pytest.raises(OutputError, match="another job"):
        Job("model", source, tmp_path / "out.zarr", batch_size=2)
    Job("model", source, tmp_path / "out.zarr", batch_size=2, resume=False)
    assert np.array_equal(read(tmp_path / "out.zarr"), by_hand(linear(), rows()))
    with pytest.raises(InputError, match="b: there is no zarr array"):
        Job("model", {"a": source, "b": "nowhere.zarr"}, tmp_path / "other.zarr")
    with pytest.raises(OutputError):
        Job("model", source, foreign_file(tmp_path / "foreign.zarr"))


@pytest.mark.parametrize("chunks", [(3, 4, 3), (3, 4), (float("nan"), float("nan")), (float("nan"),)])
def test_uneven_blocks_cannot_be_written(tmp_path: Path, chunks: tuple[float, ...]) -> None:
    array = da.map_blocks(lambda: None, chunks=(chunks, (2,)), dtype="f4", meta=np.empty((0, 0), "f4"))
    with pytest.raises(OutputError, match=r"different or unknown lengths: rechunk the input"):
        write(array, tmp_path / "out.zarr", {})


def test_second_run_on_a_target_is_refused(tmp_path: Path, source: Path, script: Script) -> None:
    out = tmp_path / "out.zarr"
    script.say("hold", 15)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, "scripted", source, out)
        script.wait_until_held()
        for resume in (True, False):
            with pytest.raises(OutputError, match=r"another run is writing to .*out\.zarr"):
                run("scripted", source, out, resume=resume)
        script.unsay("hold")
        assert first.result(30).computed == 5
    assert np.array_equal(read(out), by_hand(linear(), rows()))


# Disks that fail


def test_block_that_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    zc.put(nn.Linear(4, 1000).eval(), "model")
    source = save(tmp_path / "in.zarr", rows(200), chunks=(100, 4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BlockError, match=r"block 0 could not be written to .*out\.zarr\.partial: .*File too large"):
            run("model", source, tmp_path / "out.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run("model", source, tmp_path / "out.zarr").computed == 2


def test_source_that_is_gone_is_not_taken_for_fill_values(tmp_path: Path, source: Path, script: Script) -> None:
    script.say("hold", 10)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, "scripted", source, tmp_path / "out.zarr")
        script.wait_until_held()
        source.rename(tmp_path / "gone.zarr")
        script.unsay("hold")
        with pytest.raises(InputError, match=r"no zarr array at .*in\.zarr on .*all workers must see it"):
            job.result(30)
    assert not (tmp_path / "out.zarr").exists()


def test_damaged_chunk_of_the_source_names_the_block(tmp_path: Path, source: Path) -> None:
    zc.put(linear(), "model")
    (source / "c" / "2" / "0").write_bytes(b"not a chunk")
    with pytest.raises(BlockError, match=r"block 2: .*the same call goes on from there"):
        run("model", source, tmp_path / "out.zarr")
    marks = json.dumps(sorted(os.listdir(tmp_path / "out.zarr.partial" / ".zcinfer" / "done")))
    assert marks == '["0", "1"]'


def test_what_is_not_complete_gets_no_name(tmp_path: Path, source: Path, script: Script) -> None:
    script.say("hold", 15)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, "scripted", source, tmp_path / "out.zarr")
        script.wait_until_held()
        (tmp_path / "out.zarr.partial" / ".zcinfer" / "done" / "1").unlink()
        script.unsay("hold")
        with pytest.raises(BlockError, match=r"1 blocks are not in .*, the first of them block 1,"):
            job.result(30)
    assert not (tmp_path / "out.zarr").exists()
    script.computed()
    assert run("scripted", source, tmp_path / "out.zarr").computed == 1
    assert script.computed() == {5: 1}


# On a cluster


@pytest.fixture
def long_source(tmp_path: Path) -> Path:
    return save(tmp_path / "long.zarr", rows(200))


@pytest.mark.usefixtures("client")
def test_relative_paths_mean_the_directory_of_the_client(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zc.put(linear(), "model")
    monkeypatch.chdir(tmp_path)  # and not the workers
    for given in ("in.zarr", Path("in.zarr"), zarr.open_array("in.zarr", mode="r")):
        run("model", given, "out.zarr", resume=False)
        assert np.allclose(read(tmp_path / "out.zarr"), by_hand(linear(), rows()), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("client")
def test_failed_job_on_a_cluster_goes_on_where_it_was(tmp_path: Path, long_source: Path, script: Script) -> None:
    script.say("stop", 100)
    with pytest.raises(BlockError, match=r"block 20, rows 100–104, of scripted@1"):
        run("scripted", long_source, tmp_path / "out.zarr")
    # Blocks that were running may still be written.
    done = os.listdir(tmp_path / "out.zarr.partial" / ".zcinfer" / "done")
    script.unsay("stop")
    assert 0 < run("scripted", long_source, tmp_path / "out.zarr").computed <= 40 - len(done)
    assert np.allclose(read(tmp_path / "out.zarr"), by_hand(linear(), rows(200), blocks=(5,) * 40), rtol=0, atol=1e-4)


CLUSTER = """
import sys
import zcinfer as zc
if __name__ == "__main__":
    with zc.LocalCluster(n_workers=1, dashboard=False) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_job_whose_scheduler_is_killed_fails_and_goes_on(tmp_path: Path, long_source: Path, script: Script) -> None:
    """Dask cancels what its client waits for then; it must not be taken for done."""
    (tmp_path / "cluster.py").write_text(CLUSTER)
    paths = os.pathsep.join([str(Path(zc.__file__).parents[1]), str(Path(__file__).parent)])
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "cluster.py")],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True,
    ) as cluster, ThreadPoolExecutor(1) as pool:  # fmt: skip
        assert cluster.stdout is not None
        script.say("hold", 100)
        with Client(cluster.stdout.readline().strip()):
            job = pool.submit(run, "scripted", long_source, tmp_path / "out.zarr")
            script.wait_until_held()
            cluster.kill()
            begin = time.monotonic()
            with pytest.raises(BlockError, match="the connection to Dask's scheduler was lost"):
                job.result(30)
        assert time.monotonic() - begin < 10  # Dask's client itself would go on looking for it for 30
    script.unsay("hold")
    assert not (tmp_path / "out.zarr").exists()
    assert 0 < run("scripted", long_source, tmp_path / "out.zarr").computed < 40
    assert np.allclose(read(tmp_path / "out.zarr"), by_hand(linear(), rows(200), blocks=(5,) * 40), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_straggler_of_a_stopped_run_leaves_the_next_one_alone(
    client: Client, tmp_path: Path, long_source: Path, script: Script, registry: Path
) -> None:
    zc.put(nn.Linear(4, 3).eval(), "other")
    out = tmp_path / "out.zarr"
    script.say("hold", 100)
    script.say("stop-once-held", 0)
    with pytest.raises(BlockError, match="stopped"):
        run("scripted", long_source, out)
    script.wait_until_held()
    with start_program(RUN, f"file:{registry}", long_source, out, "other") as program:
        assert program.wait(60) == 0
    script.unsay("hold")
    wait_until(lambda: not any(client.processing().values()))
    # Workers are told of a cancelled task, but end it themselves.
    wait_until(lambda: not any(client.run(lambda dask_worker: dask_worker.state.executing_count).values()))
    assert not (tmp_path / "out.zarr.partial").exists()
    assert np.allclose(read(out), by_hand(zc.load("other"), rows(200), blocks=(5,) * 40), rtol=0, atol=1e-4)


def test_block_of_another_run_is_not_written(tmp_path: Path, source: Path, script: Script) -> None:
    script.say("stop", 15)
    with pytest.raises(BlockError):
        run("scripted", source, tmp_path / "out.zarr")
    partial = tmp_path / "out.zarr.partial"
    with pytest.raises(BlockError, match="another one writes there"):
        write_block(3, np.zeros((5, 3), "f4"), str(partial), "an older token", 5)
    assert not (partial / "c" / "3").exists()
    assert not (partial / ".zcinfer" / "done" / "3").exists()


@pytest.mark.usefixtures("client")
def test_killed_worker_costs_its_block_alone(tmp_path: Path, long_source: Path, script: Script) -> None:
    run("scripted", long_source, tmp_path / "undisturbed.zarr")
    assert script.computed() == dict.fromkeys(range(5, 200, 5), 1)
    marks = tmp_path / "out.zarr.partial" / ".zcinfer" / "done"
    script.say("hold", 100)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, "scripted", long_source, tmp_path / "out.zarr")
        worker = script.wait_until_held()
        # The other worker does the rest meanwhile.
        wait_until(lambda: len(os.listdir(marks)) >= 35)
        os.kill(worker, signal.SIGKILL)
        script.unsay("hold")
        assert job.result(60).computed == 40
    again = {row: times for row, times in script.computed().items() if times > 1}
    # Of those that were done only the last few, which the client had not heard of.
    assert 100 in again
    assert len(again) <= 6
    assert np.array_equal(read(tmp_path / "out.zarr"), read(tmp_path / "undisturbed.zarr"))


@pytest.mark.slow
def test_workers_import_nothing_that_they_do_not_need(tmp_path: Path) -> None:
    zc.put(nn.Linear(4, 3).eval(), "model")
    np.save(tmp_path / "rows.npy", np.zeros((20, 4), np.float32))
    with zc.LocalCluster(n_workers=1, dashboard=False) as cluster, cluster.get_client() as client:
        zc.connect("file")
        zc.run("model", tmp_path / "rows.npy", tmp_path / "out.zarr", block_rows=5, progress=False)
        unneeded = {"dask.array", "xarray", "pandas", "pyarrow"}
        (found,) = client.run(lambda: unneeded & sys.modules.keys()).values()
    assert found == set()
