"""What all benchmarks share: spreads are told of, reports follow from the JSON alone, pages ask no network."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from zcinfer import cli, cli_demo
from zcinfer.benchmarks import figures, guard, pages, pictures, running
from zcinfer.benchmarks.benchmark import Benchmark, Options, all_tables, bar
from zcinfer.benchmarks.figures import bars
from zcinfer.benchmarks.machine import ROOT, machine
from zcinfer.benchmarks.measure import interleaved, summary
from zcinfer.benchmarks.tables import Table, is_noisy, text

STEADY, NOISY = summary([0.010, 0.011, 0.012]), summary([0.01, 0.02, 0.05])


def tables(results: Mapping[str, Any]) -> list[Table]:
    columns = {"way": "", "times as long": "x", "time": "ms", "memory": "MB"}
    return [Table("Ways & means", columns, [["zcinfer", 1.0, results["a"], 5e6], ["<b>", 2.0, results["b"], None]])]


EXAMPLE = Benchmark(
    "example", "An example", "Not at all.", lambda _: {}, tables,
    lambda results: [bars("ways", "ms", {"zcinfer": results["a"], "other": results["b"]}, published={"other": 1.0})],
)  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    found = {"on": machine(), "quick": True, "took": 1.0, "a": STEADY, "b": NOISY}
    found |= {"bars": {"fast": bar(2, 3.0), "small": bar(2, 3.0, most=True)}, "absent": {"CUDA": "no GPU"}}
    return json.loads(json.dumps(found))


def test_spread_is_that_of_quartiles() -> None:
    found = summary([1, 2, 3, 4, 100])
    assert (found["low"], found["median"], found["high"], found["n"]) == (2, 3, 4, 5)
    assert found["spread"] == pytest.approx(2 / 3)


def test_all_functions_are_called_each_round_after_a_first_call() -> None:
    calls: list[str] = []
    seconds = interleaved({name: (lambda name=name: calls.append(name)) for name in "abc"}, 4)  # type: ignore[misc]
    assert calls[:3] == ["a", "b", "c"]
    assert [sorted(calls[n : n + 3]) for n in range(3, 15, 3)] == [["a", "b", "c"]] * 4
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys("abc", 4)


def test_a_fork_gives_its_result_and_its_failure_ends_the_benchmark() -> None:
    # In a process of its own: this one may have threads.
    script = (
        "from zcinfer.benchmarks.measure import forked\nprint(forked(lambda: [1, {'a': 2}]))\nforked(lambda: 1 / 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "[1, {'a': 2}]\n")
    assert "ZeroDivisionError" in done.stderr
    assert "a measuring process failed with status 1" in done.stderr


def test_noise_is_marked_in_every_form(results: dict[str, Any]) -> None:
    assert (is_noisy(STEADY), is_noisy(NOISY)) == (False, True)
    assert text(NOISY, "ms").endswith(" noisy")
    assert "noisy" not in text(STEADY, "ms")
    (table,) = tables(results)
    assert table.markdown().count("noisy") == table.html().count(' class="noisy"') == 1
    assert table.frame().set_index(["row", "column"]).loc[("<b>", "time"), "noisy"]


def test_figures_are_scaled_to_their_units(results: dict[str, Any]) -> None:
    frame = tables(results)[0].frame().set_index(["row", "column"])["value"]
    assert frame[("zcinfer", "time")] == pytest.approx(11)
    assert frame[("zcinfer", "memory")] == pytest.approx(5)
    assert ("<b>", "memory") not in frame


def test_bars_come_first_and_what_could_not_run_last(results: dict[str, Any]) -> None:
    first, _, last = all_tables(EXAMPLE, results)
    assert [row[-1] for row in first.rows] == ["met", "NOT MET"]
    assert last.texts() == [["CUDA", "no GPU"]]


def test_files_of_a_run(tmp_path: Path, results: dict[str, Any]) -> None:
    pages.write(tmp_path, EXAMPLE, results)
    assert json.loads((tmp_path / "example.json").read_text()) == results
    frame = pd.read_csv(tmp_path / "example.csv")
    found = frame.query("row == 'zcinfer' and column == 'time'")
    assert found["value"].item() == pytest.approx(11)
    written = (tmp_path / "example.md").read_text()
    assert results["on"]["commit"] in written
    assert "| zcinfer | 1.00x" in written


def test_a_page_asks_no_network(tmp_path: Path, results: dict[str, Any]) -> None:
    page = pages.page("All", [(EXAMPLE, results), (EXAMPLE, results)])
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*"?[^">]*', page)
    assert "@@" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "&lt;b&gt;" in page
    assert "<b>" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert page.count("data-root-id") >= 2


def test_tables_go_between_the_marks(tmp_path: Path, results: dict[str, Any]) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("before\n<!-- example -->\nold\n<!-- /example -->\nafter\n")
    pages.into_docs(path, EXAMPLE, results)
    written = path.read_text()
    assert written.startswith("before\n<!-- example -->\n")
    assert written.endswith("<!-- /example -->\nafter\n")
    assert "old" not in written
    assert "| zcinfer |" in written
    pages.into_docs(path, EXAMPLE, results)
    assert path.read_text() == written
    with pytest.raises(pages.SettingsError, match="has no <!-- example -->"):
        pages.into_docs(tmp_path / "other.md", EXAMPLE, results)


@pytest.mark.slow  # as all that needs a browser
def test_plots_of_a_run_are_a_picture_in_the_docs(tmp_path: Path, results: dict[str, Any]) -> None:
    if pictures.why_not():
        pytest.skip(pictures.why_not())
    plots = [*EXAMPLE.figures(results), *EXAMPLE.figures(results)]
    pictures.write_picture(tmp_path / "images" / "two.png", plots)
    written = (tmp_path / "images" / "two.png").read_bytes()
    width, height = struct.unpack(">II", written[16:24])
    drawn = sum(plot.height for plot in plots)
    assert (written[:8], width) == (b"\x89PNG\r\n\x1a\n", pictures.WIDTH)
    assert drawn <= height <= drawn + 40
    path = tmp_path / "benchmarks.md"
    path.write_text("<!-- example -->\n<!-- /example -->\n")
    pages.into_docs(path, EXAMPLE, results, "images/two.png")
    assert "(images/two.png)\n<!-- /example -->" in path.read_text().replace("\n\n", "\n")


def test_docs_are_refused_before_anything_is_measured_where_no_picture_can_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    output = CliRunner().invoke(cli.main, ["bench", "talk", "--docs"]).output
    assert "cannot go into the docs from here" in output
    assert "apt-get install chromium" in output or "pip install 'zcinfer[browser]'" in output


@pytest.mark.parametrize(
    ("bottom", "top", "ticks"),
    [(0.42, 23, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]), (2.0, 4e6, [10.0**power for power in range(7)])],
)
def test_ticks_are_of_a_logarithmic_axis(bottom: float, top: float, ticks: list[float]) -> None:
    assert figures._ticks(bottom, top) == pytest.approx(ticks)


def test_a_ratio_that_has_fallen_by_a_third_is_told(tmp_path: Path, results: dict[str, Any]) -> None:
    path = tmp_path / "ratios.json"
    results = results | {"quick": False}
    with pytest.raises(pages.SettingsError, match="no ratios of a whole run of 'example'"):
        guard.fallen(path, "example", results)

    def run(faster: float, share: float, seconds: float = 1.0) -> dict[str, Any]:
        bars = {"faster": bar(2, faster), "share": bar(1, share, most=True), "time": bar(1, seconds, unit="s")}
        return results | {"bars": bars}

    guard.keep(path, "example", run(3.0, 0.5))
    assert guard.fallen(path, "example", run(2.1, 0.74, seconds=100.0)) == []
    assert "faster: 1.9, and was 3 on " in guard.fallen(path, "example", run(1.9, 0.5))[0]
    assert "share: 0.76, and was 0.5" in guard.fallen(path, "example", run(3.0, 0.76))[0]
    assert guard.fallen(path, "example", results | {"bars": {}}) == []
    with pytest.raises(pages.SettingsError, match="no ratios of a quick run"):
        guard.fallen(path, "example", run(3.0, 0.5) | {"quick": True})


def test_names_of_the_command_are_the_benchmarks() -> None:
    assert (*running.ENTRIES, "all") == cli_demo.BENCHMARKS
    docs = (ROOT / "docs" / "benchmarks.md").read_text()
    assert sorted(re.findall(r"<!-- (\w+) -->\n", docs)) == sorted(running.ENTRIES)


@pytest.mark.parametrize("name", [name for name in running.ENTRIES if not running.why_not(name)])
def test_each_benchmark_is_one(name: str) -> None:
    found = running.benchmark_of(name)
    assert found.name == name
    assert found.title
    assert len(found.method) > 100


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call = CliRunner().invoke
    assert "it needs a GPU" in call(cli.main, ["bench", "gpu"]).output
    entry = running.Entry("windows", ("bokeh", "no_such_package"))
    monkeypatch.setitem(running.ENTRIES, "windows", entry)
    output = call(cli.main, ["bench", "windows"]).output
    assert "not installed: no_such_package. pip install 'zcinfer[bench]'" in output
    output = call(cli.main, ["bench", "load", "--again", "--out", str(tmp_path)]).output
    assert "load.json is not there" in output


def test_parts_are_chosen_by_name() -> None:
    assert Options(only=("BERT", "Res")).wants("ResNet-50")
    assert not Options(only=("BERT",)).wants("GPT-2")


# The talk's and the models' parts that can be told apart without running them


def test_lines_are_those_of_the_user() -> None:
    from zcinfer.benchmarks import talk, talk_programs

    assert talk.lines(talk_programs.loop) == 4  # its head, the rows, the call, the return; not the clock's
    assert {talk.PROGRAMS[name][2] for name in talk.OURS} == {8, "auto"}


def test_models_are_chosen_with_a_heavy_tail() -> None:
    from zcinfer.benchmarks.many_models import MODELS, chosen

    numbers = chosen(100_000, 0, MODELS)
    counts = [numbers.count(n) for n in range(MODELS)]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.05)
    assert counts[0] / counts[MODELS - 1] == pytest.approx(MODELS, rel=0.1)


class Counter:
    """Answers so many requests a second, one after the other."""

    name = "counter"

    def __init__(self, rate: float, wrong: bool = False):
        self.seconds, self.wrong, self.lock = 1 / rate, wrong, asyncio.Lock()

    async def start(self) -> None:
        pass

    async def ask(self, number: int) -> Any:
        async with self.lock:
            await asyncio.sleep(self.seconds)
        return np.array([number + self.wrong])


def tried(system: Any, rate: float, seconds: float) -> dict[str, Any]:
    from zcinfer.benchmarks.many_models import MODELS, trial

    return asyncio.run(trial(system, [np.array([n]) for n in range(MODELS)], rate, seconds))


@pytest.mark.slow
def test_a_rate_is_held_where_no_queue_grows() -> None:
    held = tried(Counter(200), 50, 1.0)
    assert held["held"]
    assert held["p50"] < 0.5
    late = tried(Counter(40), 100, 0.9)
    assert not late["held"]
    assert late["p99"] > 0.5


def test_users_who_wait_too_long_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcinfer.benchmarks.many_models.TIMEOUT", 0.2)
    found = tried(Counter(10), 100, 5.0)
    assert not found["held"]
    assert found["given up"] > 0.01


def test_a_wrong_answer_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="gives another answer"):
        tried(Counter(1000, wrong=True), 50, 0.1)


# Smaller than a quick run: a small model, and few of the processes that take nearly all of the time to start.
SMALLER = {
    "load": """
from zcinfer import cli
from zcinfer.benchmarks import load

load.QUICK, load.QUICK_ROUNDS, load.QUICK_VARIANTS = ("2,000 modules",), (1, 1, 1), 2
cli.main()
""",
    "models": """
from zcinfer import cli
from zcinfer.benchmarks import many_models

many_models.QUICK_MODELS, many_models.QUICK_WORKERS = 2, 1
cli.main()
""",
}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "only", "results"),
    [
        ("load", [], "models"),
        ("article", ["--only", "ResNet"], "loads"),
        ("talk", ["--only", "in one process"], "programs"),
        ("models", ["--only", "torch.load"], "systems"),
        ("overlap", [], "seconds"),
        ("windows", [], "cases"),
    ],
)
def test_the_smallest_size_runs(name: str, only: list[str], results: str, tmp_path: Path) -> None:
    program = ["-c", SMALLER[name]] if name in SMALLER else ["-m", "zcinfer"]
    command = [sys.executable, *program, "bench", name, "--quick", *only, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / f"{name}.json").read_text())[results]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md", ".html"}


@pytest.mark.usefixtures("registry")
def test_what_watching_costs_is_measured_of_runs_that_were_what_they_say() -> None:
    from distributed import Client, LocalCluster

    import zcinfer as zc
    from zcinfer.benchmarks import telemetry
    from zcinfer.observer import Observer

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", memory_limit=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(Observer())
        zc.connect("file")
        small = telemetry.Case("small", telemetry.mlp, 10, 16, 64, 16, rounds=1)
        found = telemetry.compare(client, small)
        with pytest.raises(SystemExit, match="small, counted: 160 rows and 0 jobs were counted"):
            telemetry.check(small, telemetry.ON, (0, 3), (160, 3))
        zc.disconnect()
    results = json.loads(json.dumps({"cases": {"small": found}, "alone": telemetry.alone(20, 2)}))
    results["bars"] = telemetry.bars(results)
    assert results["cases"]["small"]["seconds"]["counted"]["n"] == 1
    assert 1e-6 < telemetry.watching(results) < 1e-3
    jobs, costs, alone = telemetry.tables(results)
    assert [row[0] for row in jobs.rows] == ["small, nothing counted", "small, counted"]
    assert [row[0] for row in costs.rows] == ["small: counting, time", "small: counting, processor time"]
    assert len(alone.rows) == 4
    assert [*results["bars"]] == [
        "small: counting, by its parts, costs percent", "small: counting, time, costs percent",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_the_cpu_where_it_says_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zcinfer.benchmarks.gpu", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {(one["way"], one["asked"]) for one in results["mlp"]} == {
        ("a loop", 8), ("four threads", 8), ("zcinfer", 8), ("zcinfer", "auto"),
    }  # fmt: skip
    assert all(one["rate"] > 0 for one in results["mlp"])
    assert [*results["models"]] == [*results["loads"]] == ["BERT-base", "ResNet-50"]
    assert len(results["bars"]) == 12
    written = (tmp_path / "gpu.md").read_text()
    for title in ("Limits", "The talk's MLP", "BERT-base to the device", "Windows of strain"):
        assert f"### {title}" in written
    assert len(running.benchmark_of("gpu").figures(results)) == 3


@pytest.mark.usefixtures("registry")
def test_processes_of_a_gpu_benchmark_tell_of_what_failed(tmp_path: Path) -> None:
    from zcinfer.benchmarks.gpu_jobs import Job

    np.save(tmp_path / "x.npy", np.zeros((10, 64), np.float32))
    np.save(tmp_path / "expected.npy", np.ones((10, 1), np.float32))
    torch.save(torch.nn.Linear(64, 1), tmp_path / "model.pt")
    job = Job("cpu", tmp_path)
    job.rows(0, 1, 10)
    with pytest.raises(RuntimeError, match="a loop, batch 4, eager: another result than torch's"):
        job.prepare("a loop", 4, "eager")
