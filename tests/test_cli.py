"""The command line: cheap to start, the same models in every process, errors in one message."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner, Result
from torch import nn

import zcinfer as zc
from zcinfer.cli import main

COMMANDS = ["put", "ls", "info", "rm", "run", "demo", "cluster", "bench"]

MODELS = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3).eval()

class Zoo:
    pair = torch.nn.Bilinear(4, 4, 2).eval()

trained = torch.nn.BatchNorm1d(4)
number = 3

def fails():
    raise RuntimeError("no weights today")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Path) -> Path:
    """The current directory, with models in ``menagerie.py``; a registry of its own."""
    (tmp_path / "menagerie.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "menagerie", raising=False)
    monkeypatch.setenv("DASK_ZCINFER__REGISTRY", str(registry))
    monkeypatch.setenv("DASK_ZCINFER__STORE", "file")
    return tmp_path


def call(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def program(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zcinfer", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(zc.__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, **options)


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)


def save(path: Path, x: np.ndarray) -> Path:
    zarr.create_array(str(path), shape=x.shape, dtype=x.dtype, chunks=(5, *x.shape[1:]))[...] = x
    return path


def by_hand(model: nn.Module, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(*map(torch.from_numpy, inputs)).numpy()
    return found


# Starting


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
import zcinfer.cli
zcinfer.cli.main(["--help"], standalone_mode=False)
print(sorted({"torch", "ray", "dask", "distributed", "numpy", "pandas", "zarr"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_under_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert program("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(seconds) < 0.5


def test_help_lists_all_commands() -> None:
    output = call("--help").output
    for name in COMMANDS:
        assert f"\n  {name} " in output
    assert "zcinfer put mymodels:build --name bert" in output
    assert call("-h").output == output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str) -> None:
    output = call(name, "--help").output
    assert output.startswith(f"Usage: zcinfer {name}")
    assert max(map(len, output.splitlines())) <= 100


def test_version() -> None:
    assert call("--version").output == f"zcinfer, version {zc.__version__}\n"


@pytest.mark.skipif(
    not [entry for entry in entry_points(group="dask_cli") if entry.name == "zcinfer"],
    reason="zcinfer is not installed, so that dask does not know it: pip install -e .",
)
def test_dask_has_the_same_commands(here: Path) -> None:
    call("put", "menagerie:build")
    command = [sys.executable, "-m", "dask", "zcinfer", "ls", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [model["name"] for model in json.loads(done.stdout)] == ["build"]


# Models


def test_every_process_sees_the_same_models(here: Path) -> None:
    published = program("put", "menagerie:build", "--name", "bert", "--json")
    assert published.returncode == 0, published.stderr
    ref = json.loads(published.stdout)
    assert (ref["name"], ref["version"]) == ("bert", 1)
    assert [model["digest"] for model in json.loads(call("ls", "--json").output)] == [ref["digest"]]
    assert ref["digest"] in call("info", "bert").output
    with torch.no_grad():
        assert np.array_equal(zc.predict("bert", rows()), zc.load("bert")(torch.from_numpy(rows())))
    call("rm", "bert")
    missing = program("info", "bert")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert missing.stderr.startswith("error: no model 'bert'")


def test_put_makes_a_name_and_says_what_it_did(here: Path) -> None:
    assert call("put", "menagerie:build").output.startswith("build@1  ")
    assert call("put", "menagerie:build").output.startswith("build@1  ")
    assert call("put", "menagerie:Zoo.pair", "--name", "pair").output.startswith("pair@1  ")
    assert np.array_equal(zc.predict("pair", rows(), rows()), by_hand(zc.load("pair"), rows(), rows()))


def test_put_takes_an_archive(here: Path) -> None:
    zc.save(nn.Linear(2, 2).eval(), here / "archive")
    assert call("put", "archive").output.startswith("archive@1  ")
    (here / "registry" / "seals").rename(here / "forgotten")
    assert "--trust" in call("put", "archive", "--name", "again", code=1).output
    assert call("put", "archive", "--name", "again", "--trust").output.startswith("again@1  ")


def test_ls_of_nothing_says_how_to_begin(here: Path) -> None:
    assert "zcinfer put MODULE:OBJECT" in call("ls").output
    assert json.loads(call("ls", "--json").output) == []


def test_ls_for_people_and_programs(here: Path) -> None:
    zc.put(nn.Linear(500, 500).eval(), "first")
    zc.put(nn.Linear(4, 4).eval(), "second")
    lines = call("ls").output.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["name", "first", "second", "disk"]
    assert "1.0 MB" in lines[1]
    assert re.fullmatch(r"  1\.0 MB of [\d,.]+ .B taken, 2 models in it", lines[-1])
    assert all(len(line) <= 100 for line in lines)
    ref = zc.put(nn.Linear(3, 3).eval(), "third")
    (here / "registry" / "archives" / ref.digest / "description.json").write_text("{")
    assert "damaged (zcinfer info says how)" in call("ls").output
    assert all(len(line) <= 110 for line in call("ls").output.splitlines())
    assert "description.json" in call("info", "third", code=1).output
    zc.delete("third")
    found = json.loads(call("ls", "--json").output)
    assert [(model["name"], model["version"], model["tensors"]) for model in found] == [
        ("first", 1, 2),
        ("second", 1, 2),
    ]


def test_info(here: Path) -> None:
    ref = zc.put(nn.BatchNorm1d(4), "norm")
    assert ref.digest in call("info", "norm").output
    facts = json.loads(call("info", "norm@1", "--verify", "--json").output)
    assert facts["model"] == "norm@1"
    assert facts["class"] == "torch.nn.modules.batchnorm.BatchNorm1d"
    assert (facts["tensors"], facts["submodules in train mode"], facts["verified"]) == (5, 1, True)
    assert facts["needs"] == {"torch": torch.__version__}


def test_info_verify_finds_altered_weights(here: Path) -> None:
    ref = zc.put(nn.Linear(4, 4).eval(), "model")
    weights = here / "registry" / "archives" / ref.digest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[4096] ^= 1
    weights.write_bytes(content)
    assert "was altered" in call("info", "model", "--verify", code=1).output


def test_rm_takes_names_and_versions(here: Path) -> None:
    for width in (1, 2, 3):
        zc.put(nn.Linear(4, width).eval(), "model")
    zc.put(nn.Linear(4, 4).eval(), "other")
    assert call("rm", "model@2", "other").output == "model@2 is forgotten\nother is forgotten\n"
    assert [(m["name"], m["version"]) for m in json.loads(call("ls", "--json").output)] == [("model", 1), ("model", 3)]


# Running


def test_run_with_named_inputs(here: Path) -> None:
    zc.put(nn.Bilinear(4, 4, 2).eval(), "model")
    save(here / "a.zarr", rows())
    save(here / "b.zarr", rows()[::-1].copy())
    result = call(
        "run", "model", "out.zarr", "--input", "input1=a.zarr", "--input", "input2=b.zarr", "--workers", 1, "--json"
    )
    report = json.loads(result.stdout)
    assert report == report | {"target": str(here / "out.zarr"), "shape": [23, 2], "blocks": 5, "computed": 5}
    assert np.allclose(zarr.load("out.zarr"), by_hand(zc.load("model"), rows(), rows()[::-1].copy()), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    before = dict(os.environ)
    with zc.LocalCluster(n_workers=1) as cluster:
        yield cluster.scheduler_address
    os.environ.clear()
    os.environ.update(before)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x, x * 2) if not self.training else (x, x * 3)

    def halve(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x / 2


def test_run_passes_its_options_on(here: Path, scheduler: str) -> None:
    zc.put(Twice().train(), "model")
    save(here / "in.zarr", rows())
    options = ("--output", 1, "--batch-size", 4, "--block-rows", 8, "--training", "eval", "--device", "cpu")
    job = ("run", "model", "in.zarr", "out.zarr", "--scheduler", scheduler, *options)
    assert "3 blocks, 3 computed now\n" in call(*job).output
    assert zarr.open_array("out.zarr").chunks == (8, 4)
    assert np.array_equal(zarr.load("out.zarr"), rows() * 2)
    assert "3 blocks, 0 computed now, 3 by an earlier run\n" in call(*job).output
    assert "3 blocks, 3 computed now\n" in call(*job, "--start-over", "--method", "halve").output
    assert np.array_equal(zarr.load("out.zarr"), rows() / 2)


def test_run_writes_a_report(here: Path, scheduler: str) -> None:
    zc.put(nn.Linear(4, 3).eval(), "model")
    save(here / "in.zarr", rows())
    result = call("run", "model", "in.zarr", "out.zarr", "--scheduler", scheduler, "--report", "run.html", "--json")
    assert result.stderr.endswith(f"report {here / 'run.html'}\n")
    done, first = json.loads(result.stdout), json.loads(Path("run.jsonl").read_text().splitlines()[0])
    ((total, sums),) = [(job["total"], job["sums"]) for job in first["jobs"]]
    assert (done["blocks"], done["rows"]) == (total, sums["rows"]) == (5, 23)
    assert "Finished model@1 into out.zarr" in Path("run.html").read_text()


@pytest.mark.slow
def test_run_on_a_cluster_of_another_program(here: Path) -> None:
    command = [sys.executable, "-m", "zcinfer", "cluster", "--workers", "1", "--port", "0", "--store", "file"]
    environment = os.environ | {"PYTHONPATH": str(Path(zc.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as cluster:
        try:
            assert cluster.stdout is not None
            address = cluster.stdout.readline().removeprefix("scheduler ").strip()
            assert address.startswith("tcp://127.0.0.1:")
            assert cluster.stdout.readline() == f"store     file:{here / 'registry'}\n"
            zc.put(nn.Linear(4, 3).eval(), "model")
            save(here / "in.zarr", rows())
            call("run", "model", "in.zarr", "out.zarr", "--scheduler", address)
            assert np.allclose(zarr.load("out.zarr"), by_hand(zc.load("model"), rows()), rtol=0, atol=1e-6)
        finally:
            cluster.send_signal(signal.SIGINT)
    assert cluster.returncode == 0


# Errors


WRONG = {
    "model unknown": (["info", "modle"], "no model 'modle'.*Did you mean 'model'"),
    "version unknown": (["info", "model@7"], "no version 7 of 'model'"),
    "name impossible": (["put", "menagerie:build", "--name", "a b"], "'a b' cannot be a model's name"),
    "rm of nothing": (["rm", "nothing"], "no model 'nothing'"),
    "no archive": (["put", "nowhere"], "'nowhere' is neither an archive's directory nor MODULE:OBJECT"),
    "no module": (["put", "nowhere:build"], "no module 'nowhere'"),
    "no module name": (["put", ":build"], "neither an archive's directory nor MODULE:OBJECT"),
    "relative module": (["put", ".menagerie:build"], "neither an archive's directory nor MODULE:OBJECT"),
    "no object": (["put", "menagerie:nothing"], "the module 'menagerie' has no 'nothing'"),
    "no model": (["put", "menagerie:number"], "must be a torch.nn.Module, found 'int'"),
    "not an archive": (["put", "registry"], "was not written|not a complete archive"),
    "run unknown": (["run", "modle", "in.zarr", "out.zarr"], "Did you mean 'model'"),
    "source missing": (["run", "model", "nowhere.zarr", "out.zarr"], "there is no zarr array at nowhere.zarr"),
    "target foreign": (
        ["run", "model", "in.zarr", "menagerie.py"],
        "menagerie.py exists and was not written by zcinfer",
    ),
    "no source": (["run", "model", "out.zarr"], "give SOURCE and TARGET; or TARGET alone"),
    "too many": (["run", "model", "in.zarr", "out.zarr", "more.zarr"], "give SOURCE and TARGET; or TARGET alone"),
    "source and inputs": (["run", "model", "in.zarr", "out.zarr", "--input", "a=in.zarr"], "or TARGET alone"),
    "input without name": (["run", "model", "out.zarr", "--input", "in.zarr"], "write NAME=URL"),
    "scheduler": (["run", "model", "in.zarr", "out.zarr", "--scheduler", "nowhere"], "no Dask scheduler answers"),
    "workers of a scheduler": (
        ["run", "model", "in.zarr", "out.zarr", "--scheduler", "nowhere", "--workers", "2"],
        "--workers is for workers started here",
    ),
}
# Refused before anything is started: with a scheduler and a Ray that are not there, and are not asked for.
WRONG_JOB = {
    "model": (["modle", "in.zarr", "out.zarr"], "Did you mean 'model'"),
    "train mode": (["norm", "in.zarr", "out.zarr"], "training='eval'"),
    "source": (["model", "nowhere.zarr", "out.zarr"], "there is no zarr array"),
    "target": (["model", "in.zarr", "menagerie.py"], "not written by zcinfer"),
    "width": (["model", "wide.zarr", "out.zarr"], r"found .*5.*float32.*Linear"),
    "text": (["model", "text.zarr", "out.zarr"], "which is not numeric"),
    "several outputs": (["twice", "in.zarr", "out.zarr"], "output="),
    "lengths": (["pair", "out.zarr", "--input", "input1=in.zarr", "--input", "input2=short.zarr"], "numbers of rows"),
    "another job": (["model", "in.zarr", "other.zarr"], "is the output of another job"),
    "batch": (["model", "in.zarr", "out.zarr", "--batch-size", "0"], "batch_size is 0"),
    "batch word": (["model", "in.zarr", "out.zarr", "--batch-size", "big"], "batch_size is 'big'"),
    "device": (["model", "in.zarr", "out.zarr", "--device", "warp"], "device is 'warp'"),
    "store": (["model", "in.zarr", "out.zarr", "--store", "disk"], "no store 'disk'"),
    "report": (["model", "in.zarr", "out.zarr", "--report", "nowhere/run.html"], "cannot be written to .*nowhere"),
    "report's name": (["model", "in.zarr", "out.zarr", "--report", "run"], "a report is an HTML file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_error_is_one_message(here: Path, name: str) -> None:
    arguments, message = WRONG[name]
    zc.put(nn.Linear(4, 3).eval(), "model")
    save(here / "in.zarr", rows())
    assert_refused(here, arguments, message)


@pytest.mark.parametrize("name", WRONG_JOB)
def test_job_is_refused_before_anything_is_started(here: Path, name: str) -> None:
    arguments, message = WRONG_JOB[name]
    for model, called in ((nn.Linear(4, 3), "model"), (Twice(), "twice"), (nn.Bilinear(4, 4, 2), "pair")):
        zc.put(model.eval(), called)
    zc.put(nn.BatchNorm1d(4), "norm")
    save(here / "in.zarr", rows())
    save(here / "short.zarr", rows()[:9])
    save(here / "wide.zarr", np.ones((6, 5), np.float32))
    zarr.create_array(here / "text.zarr", shape=(2,), dtype="U1", zarr_format=2)
    zc.run("model", here / "short.zarr", here / "other.zarr", progress=False)
    store = [] if "--store" in arguments else ["--store", "ray:127.0.0.1:1"]
    assert_refused(here, ["run", *arguments, "--scheduler", "nowhere", *store], message)


def assert_refused(here: Path, arguments: list[str], message: str) -> None:
    result = call(*arguments, code=1)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
    assert not (here / "out.zarr").exists()


def test_error_of_the_user_s_own_code_keeps_its_traceback(here: Path) -> None:
    result = CliRunner().invoke(main, ["put", "menagerie:fails"])
    assert isinstance(result.exception, RuntimeError)


def test_debug_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCINFER_DEBUG", "1")
    result = CliRunner().invoke(main, ["info", "nothing"])
    assert isinstance(result.exception, zc.errors.ModelNotFound)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["ls", "more"], ["rm"], ["run", "model"], ["ls", "--colour"]])
def test_wrong_usage_is_told_by_click(arguments: list[str]) -> None:
    assert "Usage: zcinfer" in call(*arguments, code=2).output
