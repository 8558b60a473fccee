"""Rows that fail: found, kept apart and told of, while all others are what they would have been; and values counted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from dask.base import tokenize
from numbered import BLOCK, ROWS, read, rows, save
from processes import wait_until
from torch import nn

import zcinfer as zc
from zcinfer.cli import main
from zcinfer.errors import BlockError, OutputError, SettingsError
from zcinfer.guarded import Guard, Guarded
from zcinfer.jobreport import Report
from zcinfer.jobs import Job
from zcinfer.predictor import Predictor
from zcinfer.records import Failure, Nonfinite, Outcome
from zcinfer.rows import rows_of

pytestmark = pytest.mark.usefixtures("registry")

BATCH = 2


class Picky(nn.Module):
    """A linear layer that refuses some rows, and some pairs of rows, by the numbers in their first column.

    Numbers are in files of its folder: ``bad`` (rows), ``pairs`` (rows that do not go into one batch), and ``hold``: a
    row to wait at, with its process id in ``held``.
    """

    def __init__(self, folder: Path, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.folder = str(folder)
        self.layer = nn.Linear(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folder = Path(self.folder)
        rows = {int(row) for row in x[:, 0]}
        if (folder / "hold").exists() and int((folder / "hold").read_text()) in rows:
            (folder / "held").write_text(str(os.getpid()))
            deadline = time.monotonic() + 60
            while (folder / "hold").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        for row in json.loads((folder / "bad").read_text()):
            if row in rows:
                raise ValueError(f"row {row} is bad")
        for pair in json.loads((folder / "pairs").read_text()):
            if rows >= {*pair}:
                raise ValueError(f"rows {pair} do not go together")
        return self.layer(x)


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.says(bad=[], pairs=[])

    def says(self, **what: Any) -> None:
        for name, value in what.items():
            (self.path / name).write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "picky")
    zc.put(Picky(folder.path).eval(), "picky")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.zarr", rows())


def run(source: Any, target: Path, on_error: str = "nan", model: str = "picky", **settings: Any) -> Report:
    return zc.run(model, source, target, on_error=on_error, batch_size=BATCH, progress=False, **settings)


def plain(folder: Folder, x: np.ndarray) -> np.ndarray:
    """Plain torch, in the batches of a job in which nothing fails."""
    layer = Picky(folder.path).layer
    batches = [
        x[b : min(b + BATCH, e)] for s in range(0, len(x), BLOCK) for e in [s + BLOCK] for b in range(s, e, BATCH)
    ]
    with torch.no_grad():
        return np.concatenate([layer(torch.from_numpy(batch.copy())).numpy() for batch in batches if len(batch)])


def batch_of(row: int) -> tuple[int, int]:
    return row // BLOCK, row % BLOCK // BATCH


# Rows that fail


@pytest.mark.parametrize("on_error", ["nan", "quarantine"])
@pytest.mark.parametrize("bad", [[], [7], [2, 7, 8, 22], [10, 11, 12, 13, 14], [*range(2, 23)]])
def test_bad_rows_are_nan_and_all_others_are_computed(
    tmp_path: Path, source: Path, folder: Folder, bad: list[int], on_error: str
) -> None:
    folder.says(bad=bad)
    report = run(source, tmp_path / "out.zarr", on_error)
    assert (report.failed, report.in_parts, report.computed) == (tuple(bad), (), 5)
    found, expected = read(tmp_path / "out.zarr"), plain(folder, rows())
    good = [row for row in range(ROWS) if row not in bad]
    assert np.isnan(found[bad]).all()
    assert np.allclose(found[good], expected[good], rtol=0, atol=1e-6)
    # Batches without a bad row, to the last bit.
    untouched = [row for row in good if batch_of(row) not in {batch_of(b) for b in bad}]
    assert np.array_equal(found[untouched], expected[untouched])


def test_bad_rows_of_large_blocks_at_random(tmp_path: Path, folder: Folder) -> None:
    x, draw = rows(500), np.random.default_rng(1)
    zc.put(Picky(folder.path, 40).eval(), "picky")
    predictor = Guarded(Guard("nan", 500), ["input"], "picky").bind([rows_of(x)], lambda: [x])
    expected = Predictor("picky").run_block([x], "block 0", 0, 64)
    for _ in range(15):
        bad = sorted(draw.choice(500, draw.integers(1, 8), replace=False).tolist())
        folder.says(bad=bad)
        found = predictor.run_block([x], "block 0", 0, 64)
        assert isinstance(found, Outcome)
        assert [failure["first"] for failure in found.record["failures"]] == bad
        assert np.flatnonzero(np.isnan(found.result).any(axis=1)).tolist() == bad
        good = np.setdiff1d(np.arange(500), bad)
        assert np.allclose(found.result[good], expected[good], rtol=1e-5, atol=1e-5)
        untouched = good[~np.isin(good // 64, np.array(bad) // 64)]
        assert np.array_equal(found.result[untouched], expected[untouched])


def test_what_is_kept_of_a_failure(tmp_path: Path, source: Path, folder: Folder) -> None:
    folder.says(bad=[7, 8, 22])
    run(source, tmp_path / "out.zarr", "quarantine")
    found = zc.failures(tmp_path / "out.zarr")
    assert [(f.block, f.first, f.last, f.kept, f.model) for f in found] == [
        (1, 7, 7, False, "picky@1"),
        (1, 8, 8, False, "picky@1"),
        (4, 22, 22, False, "picky@1"),
    ]
    assert found[0].error.startswith("block 1, rows 7–7, of picky@1: ")
    assert found[0].error.endswith("ValueError: row 7 is bad")
    assert 'raise ValueError(f"row {row} is bad")' in found[0].traceback
    assert found[0].traceback.startswith("Traceback (most recent call last):\n")
    for failure in found:
        assert np.array_equal(failure.inputs["input"], rows()[failure.first])


def test_inputs_are_kept_in_quarantine_alone(tmp_path: Path, source: Path, folder: Folder) -> None:
    folder.says(bad=[7])
    run(source, tmp_path / "out.zarr", "nan")
    (failure,) = zc.failures(tmp_path / "out.zarr")
    assert failure.inputs == {}
    assert not (tmp_path / "out.zarr" / ".zcinfer" / "quarantine").exists()


class Gather(nn.Module):
    """Takes ``(rows, tokens)`` ids and ``(rows,)`` weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(1) * weights[:, None]


def test_named_inputs_of_different_shapes_are_kept(tmp_path: Path) -> None:
    zc.put(Gather().eval(), "model")
    ids, weights = np.arange(ROWS * 2).reshape(ROWS, 2) % 10, np.arange(ROWS, dtype="f4")
    ids[6, 1], ids[12] = 11, -1
    sources = {"ids": save(tmp_path / "ids.zarr", ids), "weights": save(tmp_path / "weights.zarr", weights)}
    assert run(sources, tmp_path / "out.zarr", "quarantine", "model").failed == (6, 12)
    kept = [{name: array.tolist() for name, array in f.inputs.items()} for f in zc.failures(tmp_path / "out.zarr")]
    assert kept == [{"ids": [2, 11], "weights": 6.0}, {"ids": [-1, -1], "weights": 12.0}]


def test_windows_that_fail_are_kept_as_rows(tmp_path: Path, folder: Folder) -> None:
    folder.says(bad=[30, 60])
    np.save(tmp_path / "x.npy", np.arange(100, dtype="f4"))
    report = run(zc.windows(tmp_path / "x.npy", 4, 3), tmp_path / "out.zarr", "quarantine", block_rows=BLOCK)
    assert report.failed == (10, 20)
    kept = [f.inputs["input"].tolist() for f in zc.failures(tmp_path / "out.zarr")]
    assert kept == [[30, 31, 32, 33], [60, 61, 62, 63]]


def test_texts_that_fail_are_kept_as_text(tmp_path: Path) -> None:
    zc.put(nn.Linear(1, 1).eval(), "model")
    zarr.create_array(str(tmp_path / "in.zarr"), shape=(6,), chunks=(3,), dtype=str)[:] = np.array(
        ["1", "2", "x", "3", "4", "5"], dtype=object
    )
    report = run(
        tmp_path / "in.zarr",
        tmp_path / "out.zarr",
        "quarantine",
        "model",
        preprocess=lambda texts: np.array([[float(str(text))] for text in texts], "f4"),
    )
    assert report.failed == (2,)
    assert zc.failures(tmp_path / "out.zarr")[0].inputs["input"] == "x"


def test_rows_that_fail_only_together_are_kept(tmp_path: Path, source: Path, folder: Folder) -> None:
    folder.says(bad=[17], pairs=[[7, 8], [20, 21]])
    report = run(source, tmp_path / "out.zarr", "quarantine")
    assert (report.failed, report.in_parts) == ((17,), ((7, 8), (20, 21)))
    found = zc.failures(tmp_path / "out.zarr")
    assert [(f.first, f.last, f.kept, len(f.inputs)) for f in found] == [
        (7, 8, True, 0),
        (17, 17, False, 1),
        (20, 21, True, 0),
    ]
    assert "do not go together" in found[0].error
    good = [row for row in range(ROWS) if row != 17]
    assert np.allclose(read(tmp_path / "out.zarr")[good], plain(folder, rows())[good], rtol=0, atol=1e-6)


def test_no_rows(tmp_path: Path, folder: Folder) -> None:
    report = run(save(tmp_path / "in.zarr", rows(0)), tmp_path / "out.zarr", check_finite=True)
    assert (report.shape, report.failed) == ((0, 3), ())


def test_several_outputs_are_filled_alike(folder: Folder) -> None:
    folder.says(bad=[3])
    guarded = Guarded(
        Guard("nan", check_finite=True), ["input"], "picky", postprocess=lambda y: (y, np.full(len(y), np.inf))
    )
    found = guarded.bind([rows_of(rows())], lambda: [rows()]).run_block([rows(5)], "block 0", 0, BATCH)
    assert [np.isnan(result).sum() for result in found.result] == [3, 1]
    assert found.record["nonfinite"] == [["output 1", 0, 4]]


# How many, and what then


def test_too_many_failures_stop_the_job_and_more_may_be_allowed(tmp_path: Path, source: Path, folder: Folder) -> None:
    folder.says(bad=[2, 6, 10, 11, 12, 21])
    out = tmp_path / "out.zarr"
    # More in one block than in all there may be.
    with pytest.raises(
        BlockError, match=r"block 2: more than max_errors=2 rows failed \(rows 10, 11, 12\.\.\.\), .*row 10 is"
    ):
        run(source, out, "quarantine", max_errors=2)
    assert [f.first for f in zc.failures(out)] == [2, 6]
    # More in all blocks together.
    with pytest.raises(
        BlockError, match=r"5 failures, more than max_errors=4; the first: row 2: .*row 2 is bad.*zcinfer\.failures"
    ):
        run(source, out, "quarantine", max_errors=4)
    assert not out.exists()
    assert [f.first for f in zc.failures(out)] == [2, 6, 10, 11, 12]
    # It does not forget.
    with pytest.raises(OutputError, match=r"5 failures, more than max_errors=4; .*Allow them \(on_error, max_errors\)"):
        run(source, out, "quarantine", max_errors=4)
    report = run(source, out, "nan", max_errors=6)
    assert (report.failed, report.computed) == ((2, 6, 10, 11, 12, 21), 2)
    assert [len(f.inputs) for f in zc.failures(out)] == [1, 1, 1, 1, 1, 0]


def test_a_model_that_always_fails_is_found_out_soon(tmp_path: Path, folder: Folder) -> None:
    x = rows(3000)
    source = zarr.create_array(str(tmp_path / "in.zarr"), shape=x.shape, dtype=x.dtype, chunks=(1000, 4))
    source[...] = x
    folder.says(bad=[*range(2, 3000)])
    begin = time.perf_counter()
    with pytest.raises(BlockError, match="more than max_errors=10 rows failed"):
        zc.run("picky", source, tmp_path / "out.zarr", on_error="nan", max_errors=10, batch_size=500, progress=False)
    assert time.perf_counter() - begin < 20


def test_stopped_job_goes_on_past_the_row_that_stopped_it(tmp_path: Path, source: Path, folder: Folder) -> None:
    folder.says(bad=[7])
    with pytest.raises(BlockError, match="row 7 is bad"):
        run(source, tmp_path / "out.zarr", "raise")
    report = run(source, tmp_path / "out.zarr", "quarantine")
    assert (report.computed, report.failed) == (4, (7,))
    # And is not done again, nor forgotten.
    assert run(source, tmp_path / "out.zarr", "nan").failed == (7,)


@pytest.mark.parametrize("complete", [True, False])
def test_failures_that_were_allowed_are_not_when_none_are(
    tmp_path: Path, source: Path, folder: Folder, complete: bool
) -> None:
    folder.says(bad=[7])
    out = tmp_path / "out.zarr"
    if complete:
        run(source, out)
    else:
        folder.says(bad=[7, *range(15, 20)])
        with pytest.raises(BlockError):
            run(source, out, max_errors=3)
    with pytest.raises(OutputError, match=r"1 failure, and on_error='raise' allows none; .*row 7.*--start-over"):
        run(source, out, "raise")
    folder.says(bad=[])
    assert run(source, out, "raise", resume=False).failed == ()
    assert zc.failures(out) == []
    assert np.array_equal(read(out), plain(folder, rows()))


def test_failures_are_refused_when_the_job_is_made_and_again_when_it_begins(
    tmp_path: Path, source: Path, folder: Folder
) -> None:
    folder.says(bad=[7])
    job = Job("picky", source, tmp_path / "out.zarr", batch_size=BATCH)
    run(source, tmp_path / "out.zarr")
    for begin in (
        lambda: job.run(progress=False),
        lambda: Job("picky", source, tmp_path / "out.zarr", batch_size=BATCH),
    ):
        with pytest.raises(OutputError, match="1 failure, and on_error='raise' allows none"):
            begin()


def test_failures_of_a_block_that_was_not_finished_do_not_count(tmp_path: Path, source: Path, folder: Folder) -> None:
    folder.says(bad=[7])
    out = tmp_path / "out.zarr"
    run(source, out, "quarantine")
    # As if it had been killed between the record of block 1 and its mark.
    inner = out / ".zcinfer"
    (inner / "records").mkdir()
    (inner / "records" / "1.json").write_text(json.dumps(json.loads((inner / "records.json").read_text())["1"]))
    (inner / "records.json").unlink()
    (inner / "done").mkdir()
    for number in (0, 2, 3, 4):
        (inner / "done" / str(number)).touch()
    out.rename(tmp_path / "out.zarr.partial")
    assert zc.failures(out) == []
    folder.says(bad=[])
    report = run(source, out, "raise")
    assert (report.computed, report.failed) == (1, ())
    assert zc.failures(out) == []
    assert not list(out.rglob("*.npz"))


RUN = """
import sys
import zcinfer as zc
zc.connect(sys.argv[1])
zc.run("picky", sys.argv[2], sys.argv[3], on_error="quarantine", batch_size=2, check_finite=True)
"""


@pytest.mark.slow
def test_killed_program_loses_no_failure(tmp_path: Path, source: Path, folder: Folder, registry: Path) -> None:
    out = tmp_path / "out.zarr"
    folder.says(bad=[2, 7, 22], hold=15)
    paths = os.pathsep.join([str(Path(zc.__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", RUN, f"file:{registry}", str(source), str(out)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) as program:
        held = folder.path / "held"
        wait_until(lambda: held.exists() and held.read_text(), 60)
        program.kill()
    assert not out.exists()
    assert [f.first for f in zc.failures(out)] == [2, 7]
    (folder.path / "hold").unlink()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    # The true total, of which a part was there.
    assert "picky@1: done, 23 of 23 rows in " in done.stderr
    assert "3 of 23 rows failed and are NaN: 2, 7, 22 (zcinfer.failures tells why)" in done.stderr
    found = zc.failures(out)
    assert [f.first for f in found] == [2, 7, 22]
    assert all(np.array_equal(f.inputs["input"], rows()[f.first]) for f in found)
    report = run(source, out, "quarantine")
    assert (report.computed, report.failed, report.checked) == (0, (2, 7, 22), 5)
    assert np.isnan(read(out)[[2, 7, 22]]).all()


# What is refused


@pytest.mark.parametrize("on_error", ["nan", "quarantine"])
def test_integer_outputs_are_refused_before_anything_is_started(
    tmp_path: Path, source: Path, folder: Folder, on_error: str
) -> None:
    folder.says(bad=[7])
    with pytest.raises(SettingsError, match=r"the output of picky@1 is int64, which has none: .*postprocess=lambda"):
        run(source, tmp_path / "out.zarr", on_error, postprocess=lambda y: y.argmax(axis=1))
    assert not list(tmp_path.glob("out.zarr*"))
    run(source, tmp_path / "out.zarr", on_error, postprocess=lambda y: y.argmax(axis=1).astype("float64"))
    assert np.flatnonzero(np.isnan(read(tmp_path / "out.zarr"))).tolist() == [7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore': choose 'raise', 'nan' or 'quarantine'"),
        ({"max_errors": 0}, "max_errors is 0: give 1 or more, or on_error='raise'"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, source: Path, folder: Folder, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(source, tmp_path / "out.zarr", **settings)


def test_failures_of_nothing(tmp_path: Path, source: Path) -> None:
    for place in (tmp_path / "nowhere.zarr", source):
        with pytest.raises(OutputError, match=r"there is no output of zcinfer at"):
            zc.failures(place)


def test_guarded_blocks_are_not_taken_for_plain_ones(folder: Folder) -> None:
    plain, guarded = Predictor("picky"), Guarded(Guard("nan"), ["input"], "picky")
    assert plain.fingerprint() == guarded.fingerprint()  # a job goes on with other guards
    assert len({tokenize(p) for p in (plain, guarded, Guarded(Guard("quarantine"), ["input"], "picky"))}) == 3
    assert tokenize(guarded) == tokenize(Guarded(Guard("nan"), ["input"], "picky"))


# Values that are NaN or infinite


@pytest.fixture
def holed(tmp_path: Path) -> Path:
    x = rows()
    x[3, 1:] = np.nan, np.inf, -np.inf
    x[21, 3] = np.nan
    return save(tmp_path / "holed.zarr", x)


def test_nonfinite_values_are_counted_by_block(tmp_path: Path, holed: Path, folder: Folder) -> None:
    folder.says(bad=[22])
    report = run(holed, tmp_path / "out.zarr", check_finite=True)
    assert report.checked == 5
    assert report.nonfinite == (
        Nonfinite(0, "input", 1, 2),
        Nonfinite(0, "output", 3, 0),
        Nonfinite(4, "input", 1, 0),
        Nonfinite(4, "output", 3, 0),
    )
    assert np.isnan(read(tmp_path / "out.zarr")).sum() == 9  # row 22 failed, and is not counted as output
    assert report.findings() == [
        "1 of 23 rows failed and are NaN: 22 (zcinfer.failures tells why)",
        "input: 2 NaN and 2 infinite values, in 2 of 5 blocks that were checked (0, 4)",
        "output: 6 NaN and 0 infinite values, in 2 of 5 blocks that were checked (0, 4)",
    ]
    assert run(holed, tmp_path / "out.zarr").nonfinite == report.nonfinite


def test_nonfinite_values_are_counted_without_changing_anything(tmp_path: Path, holed: Path, folder: Folder) -> None:
    run(holed, tmp_path / "plain.zarr", "raise")
    report = run(holed, tmp_path / "out.zarr", "raise", check_finite=True)
    assert (report.failed, report.checked) == ((), 5)
    assert np.array_equal(read(tmp_path / "out.zarr"), read(tmp_path / "plain.zarr"), equal_nan=True)
    assert run(holed, tmp_path / "plain.zarr", "raise").checked == 0


def test_blocks_that_were_not_checked_are_not_said_to_be(tmp_path: Path, holed: Path, folder: Folder) -> None:
    folder.says(bad=[12])
    with pytest.raises(BlockError):
        run(holed, tmp_path / "out.zarr", "raise")
    report = run(holed, tmp_path / "out.zarr", check_finite=True)
    assert (report.computed, report.checked) == (3, 3)
    assert report.nonfinite == (Nonfinite(4, "input", 1, 0), Nonfinite(4, "output", 3, 0))


def test_named_inputs_are_counted_by_name_and_integers_not_at_all(tmp_path: Path) -> None:
    zc.put(Gather().eval(), "model")
    weights = np.ones(ROWS, "f4")
    weights[4] = np.inf
    sources = {
        "ids": save(tmp_path / "ids.zarr", np.zeros((ROWS, 2), int)),
        "weights": save(tmp_path / "weights.zarr", weights),
    }
    report = run(sources, tmp_path / "out.zarr", "raise", "model", check_finite=True)
    assert report.nonfinite == (Nonfinite(0, "input weights", 0, 1), Nonfinite(0, "output", 0, 3))


def test_findings_are_warned_of_and_nothing_else(
    tmp_path: Path, source: Path, holed: Path, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "zcinfer"):
        run(source, tmp_path / "out.zarr", check_finite=True)
        assert caplog.messages == []
        run(holed, tmp_path / "out2.zarr", check_finite=True)
    assert [message.partition(".zarr: ")[2].partition(":")[0] for message in caplog.messages] == ["input", "output"]


# On the command line, and on a cluster


def test_command_line(
    tmp_path: Path, source: Path, folder: Folder, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_ZCINFER__REGISTRY", str(registry))
    monkeypatch.setenv("DASK_ZCINFER__STORE", "file")
    monkeypatch.setattr("zcinfer.cli_run._cluster", lambda *_: nullcontext())  # in this process
    folder.says(bad=[7])

    def call(*arguments: Any, code: int) -> str:
        job = ["run", "picky", source, tmp_path / "out.zarr", "--batch-size", "2", *arguments]
        result = CliRunner().invoke(main, [*map(str, job)])
        assert result.exit_code == code, result.output
        return result.output

    assert "row 7 is bad" in call(code=1)
    assert "on_error='raise' allows none" not in call("--max-errors", 3, code=1)
    told = call("--on-error", "quarantine", "--max-errors", 1, "--check-finite", "--chunk-rows", 5, code=0)
    assert "\n1 of 23 rows failed and are NaN: 7 (zcinfer.failures tells why)\n" in told
    report = json.loads(call("--on-error", "nan", "--json", code=0).splitlines()[-1])
    assert (report["failed"], report["checked"], report["nonfinite"]) == ([7], 4, [])
    assert "on_error='raise' allows none" in call(code=1)


@pytest.mark.slow
@pytest.mark.usefixtures("client")
def test_cluster_keeps_the_same(tmp_path: Path, folder: Folder) -> None:
    source = save(tmp_path / "long.zarr", rows(200))
    bad = [7, 8, 100, 101, 150, 199]
    folder.says(bad=bad, pairs=[[60, 61]])
    report = run(source, tmp_path / "out.zarr", "quarantine", check_finite=True)
    assert (report.failed, report.in_parts, report.checked) == (tuple(bad), ((60, 61),), 40)
    found: list[Failure] = [f for f in zc.failures(tmp_path / "out.zarr") if not f.kept]
    assert all(np.array_equal(f.inputs["input"], rows(200)[f.first]) for f in found)
    assert np.flatnonzero(np.isnan(read(tmp_path / "out.zarr")).any(axis=1)).tolist() == bad


@pytest.mark.usefixtures("client")
def test_too_many_failures_in_all_workers_together_stop_the_job(tmp_path: Path, folder: Folder) -> None:
    source = save(tmp_path / "long.zarr", rows(200))
    folder.says(bad=[*range(2, 200, 5)])
    with pytest.raises(BlockError, match=r"11 failures, more than max_errors=10"):
        run(source, tmp_path / "out.zarr", max_errors=10)
    assert not (tmp_path / "out.zarr").exists()
